"""A finished run timed again on draws of its devices and links from their bands, without training again.

Where the policy looks at no clock, each job keeps its work and gets other seconds (`fedsim.study.retime`). Where it
does, the run is played again, timing only, on each drawn fleet: then its choices follow that fleet's clock, and what
was learned stands only where they are the run's own. How many are is told.

Draw k takes the k-th joint sample of every device (`fedsim.cost.bands`) and the k-th of the links, whatever the run:
runs of different methods are compared on the same draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from fedsim.contracts.common import FloatArray
from fedsim.contracts.flights import Arrivals, Learned
from fedsim.cost.bands import band
from fedsim.errors import ConfigError
from fedsim.files import replacing
from fedsim.fleet.fleet import Fleet
from fedsim.fleet.fleet_file import Number, fleet_path, read_fleet_file
from fedsim.fleet.link import Links
from fedsim.records.reader import Run, load
from fedsim.runner.build import build
from fedsim.runner.run import perturbation
from fedsim.settings import Config
from fedsim.sim.server import simulate
from fedsim.study.retime import Jobs, blind, checked_jobs, fleet_of, times_on

FILE = "profile_draws.parquet"
"""In the run directory: ``draw round end_s energy_j same_arms``, a row per draw and merge."""


@dataclass(frozen=True, eq=False)
class Draws:
    """A run's clock on N drawn fleets.

    Attributes:
        end_s, energy_j: at each merge, shape (N, merges).
        same_arms: share of the jobs whose arms are those of the run, shape (N,).
        replayed: whether the policy was played again.
    """

    end_s: FloatArray
    energy_j: FloatArray
    same_arms: FloatArray
    replayed: bool

    def as_text(self) -> str:
        """One or two sentences."""
        low, high = band(self.end_s[:, -1])
        text = f"{len(self.end_s)} draws of devices and links: total {low:.4g} to {high:.4g} simulated s (95%)"
        if not self.replayed:
            return text
        return (
            f"{text}; the policy looks at the clock and was played again, timing only: on average "
            f"{100 * self.same_arms.mean():.0f}% of its arms are those of the run; what was learned stands for those"
        )


def profile_error(run: Run, draws: int) -> Draws:
    """Time a finished run on `draws` drawn fleets.

    Raises:
        ConfigError: fewer than one draw.
        RunError: the run hangs on the clock by more than its policy, with the reason.
    """
    if draws < 1:
        raise ConfigError(f"--profile-error: value {draws} is not allowed (at least 1)")
    config, jobs, _ = checked_jobs(run)
    if blind(config):
        return _retimed(config, jobs, draws)
    return _replayed(config, run, draws)


def _retimed(config: Config, jobs: Jobs, draws: int) -> Draws:
    ends, energies = [], []
    for draw in range(draws):
        times = times_on(jobs, drawn_fleet(config, draw), fits_as_recorded=True)
        ends.append(times.end_s)
        energies.append(np.add.reduceat(times.energy_j, jobs.firsts))
    return Draws(np.array(ends), np.array(energies), np.ones(draws), replayed=False)


def _replayed(config: Config, run: Run, draws: int) -> Draws:
    rows = run.client_rounds.sort_values(["round", "client"], kind="stable")
    recorded = rows["prune_ratio_target"].to_numpy(), rows["lora_rank"].to_numpy()
    quiet = config.model_copy(
        update={"train": config.train.model_copy(update={"engine": "none", "surrogate": None, "rank_decay": 1.0})}
    )
    ends, energies, same = [], [], []
    for draw in range(draws):
        experiment = build(quiet, lambda line: None, perturbation(draw))
        fleet = replace(experiment.fleet, links=drawn_links(config, experiment.fleet, draw))
        end_s, energy_j, ratio, rank = _played(fleet, experiment.federation, quiet)
        ends.append(end_s)
        energies.append(energy_j)
        alike = len(ratio) == len(recorded[0])
        same.append(float(np.mean((np.abs(ratio - recorded[0]) < 1e-9) & (rank == recorded[1]))) if alike else 0.0)
    return Draws(np.array(ends), np.array(energies), np.array(same), replayed=True)


def _played(fleet: Fleet, federation: object, config: Config) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """End and energy of each merge, and ratio and rank of each flight."""
    ends: list[float] = []
    joules: list[float] = []
    ratios: list[FloatArray] = []
    ranks: list[np.ndarray] = []

    def on_merge(arrivals: Arrivals, learned: Learned, block: object, state: object) -> None:
        ends.append(arrivals.end_s)
        joules.append(float(arrivals.energy_joules.sum()))
        ratios.append(arrivals.flights.ratio_asked)
        ranks.append(arrivals.flights.rank)

    simulate(fleet, federation, config.server, config.seed, on_merge, player="arrays")  # type: ignore[arg-type]
    return np.array(ends), np.array(joules), np.concatenate(ratios), np.concatenate(ranks)


def drawn_fleet(config: Config, draw: int) -> Fleet:
    """A run's fleet with devices and links drawn from their bands."""
    fleet = fleet_of(config, perturbation(draw))
    return replace(fleet, links=drawn_links(config, fleet, draw))


def drawn_links(config: Config, fleet: Fleet, draw: int) -> Links:
    """Links with latency and jitter drawn from the bands of the fleet file, log-uniform, one factor for all clients.

    Bandwidths are drawn per client by the file itself; between draws their common level moves by the half-width of
    the widest such range over the square root of the number of clients, as the mean of so many draws does.
    """
    spec = read_fleet_file(fleet_path(config.fleet.name))
    rng = np.random.default_rng([draw, 0xFEED])

    def factor(numbers: Sequence[Number]) -> float:
        banded = [one for one in numbers if one.draw != "uniform" and one.value > 0]
        if not banded:
            return 1.0
        low, high = min(one.low / one.value for one in banded), max(one.high / one.value for one in banded)
        return float(np.exp(rng.uniform(np.log(low), np.log(high)))) if low > 0 else float(rng.uniform(low, high))

    def level(numbers: Sequence[Number]) -> float:
        ranges = [(one.high - one.low) / (one.high + one.low) for one in numbers if one.draw == "uniform"]
        spread = max(ranges, default=0.0) / np.sqrt(max(1, fleet.clients))
        return float(1.0 + spread * rng.uniform(-1.0, 1.0)) * factor(numbers)

    kinds = list(spec.links.values())
    links = fleet.links
    return Links(
        down_bits_per_s=links.down_bits_per_s * level([kind.down_mbps for kind in kinds]),
        up_bits_per_s=links.up_bits_per_s * level([kind.up_mbps for kind in kinds]),
        latency_s=links.latency_s * factor([kind.latency_ms for kind in kinds]),
        jitter_sigma=links.jitter_sigma * factor([kind.jitter_sigma for kind in kinds]),
    )


def write_draws(run: Run, draws: Draws) -> Path:
    """Keep the draws in the run directory, whole or not at all."""
    count, merges = draws.end_s.shape
    frame = pd.DataFrame(
        {
            "draw": np.repeat(np.arange(count), merges),
            "round": np.tile(run.rounds["round"].to_numpy(), count),
            "end_s": draws.end_s.ravel(),
            "energy_j": draws.energy_j.ravel(),
            "same_arms": np.repeat(draws.same_arms, merges),
        }
    )
    path = run.path / FILE
    with replacing(path) as temporary:
        frame.to_parquet(temporary, index=False)
    return path


def read_draws(run: Run) -> Draws | None:
    """The draws of a run; None where it has none."""
    path = run.path / FILE
    if not path.is_file():
        return None
    frame = pd.read_parquet(path).sort_values(["draw", "round"], kind="stable")
    count = int(frame["draw"].nunique())
    shape = (count, len(frame) // count)
    same = frame["same_arms"].to_numpy().reshape(shape)[:, 0]
    return Draws(
        frame["end_s"].to_numpy().reshape(shape),
        frame["energy_j"].to_numpy().reshape(shape),
        same,
        replayed=bool((same < 1.0).any()),
    )


def time_again(path: Path, draws: int, say: Callable[[str], None]) -> None:
    """What ``fedsim run --profile-error N`` does when the run is finished."""
    run = load(path)
    result = profile_error(run, draws)
    write_draws(run, result)
    say(result.as_text())
