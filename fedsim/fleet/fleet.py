"""A fleet: devices, power modes and links of all clients, as arrays. No object per client.

Client i's device, link, mode draws and jitter are functions of the seed, of i, and of the round (modes) or of how often
i was sent off before (jitter) alone, so a larger fleet leaves the clients of a smaller one as they were.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedsim.contracts.common import FloatArray, IntArray, Labels
from fedsim.contracts.control import Work
from fedsim.cost.device import DeviceProfile, Rates, load_profile, rates_of, stack_rates
from fedsim.cost.estimate import compute_time
from fedsim.cost.workload import Precision
from fedsim.errors import ProfileError, unknown
from fedsim.fleet.dynamics import Dynamics, dynamics_of
from fedsim.fleet.fleet_file import DeviceSpec, FleetFile, fleet_names, fleet_path, profile_path, read_fleet_file
from fedsim.fleet.link import Links, download_seconds, transfer_seconds, upload_seconds
from fedsim.fleet.mode_clock import ModeClock
from fedsim.fleet.number import Number
from fedsim.rng import Stream, mean_one_jitter, uniforms
from fedsim.settings import FleetSettings

__all__ = ["Fleet", "fleet_names", "load_fleet"]

Perturb = Callable[[DeviceProfile], DeviceProfile]


@dataclass(frozen=True, eq=False)
class _Modes:
    """How each client's power mode is drawn, and the rates of every mode of every profile.

    Attributes:
        cumulative: per line of the fleet file, the cumulative probability of each mode, shape (lines, most modes).
        line_of: each client's line, shape (clients,).
        first_row: per line, the row of its profile's first mode in `names` and `table`.
        names: mode names of all profiles one after another; `table`: their rates, same order.
        period: rounds between draws; 0: one draw for all rounds.
        drawn: the draws of the last two periods, all clients', so that a round need not repeat them.
    """

    cumulative: FloatArray
    line_of: IntArray
    first_row: IntArray
    names: NDArray[np.str_]
    table: Rates
    period: int
    drawn: dict[int, IntArray] = field(default_factory=dict)

    def draw(self, seed: int, round_index: int) -> IntArray:
        """Every client's mode in a round; a function of (seed, client, period) alone."""
        epoch = round_index // self.period if self.period else 0
        if epoch not in self.drawn:
            for old in [known for known in self.drawn if known != epoch - 1]:
                del self.drawn[old]
            draws = uniforms(seed, Stream.POWER_MODE, np.arange(len(self.line_of)), epoch)
            self.drawn[epoch] = (draws[:, None] >= self.cumulative[self.line_of]).sum(axis=1)
        return self.drawn[epoch]

    def rows(self, seed: int, round_index: int, clients: IntArray) -> IntArray:
        rows: IntArray = self.first_row[self.line_of[clients]] + self.draw(seed, round_index)[clients]
        return rows


@dataclass(frozen=True, eq=False)
class Fleet:
    """All clients of a run. Methods take client numbers of shape (P,) and return arrays of that shape.

    Attributes:
        name: of the fleet file.
        device: each client's device name, shape (clients,).
        links: see `fedsim.fleet.link`.
        seed: the run's root seed.
        compute_jitter_sigma: standard deviation of the logarithm of the compute time's jitter (mean one).
    """

    name: str
    device: Labels
    links: Links
    seed: int
    compute_jitter_sigma: float
    _modes: _Modes
    dynamics: Dynamics = field(default_factory=Dynamics)
    mode_clock: ModeClock | None = None
    _opened_s: dict[int, float] = field(default_factory=dict)

    @property
    def clients(self) -> int:
        """How many clients."""
        return len(self.device.codes)

    @property
    def device_of(self) -> NDArray[np.str_]:
        """Each client's device name, shape (clients,)."""
        return self.device.texts

    def devices(self, clients: IntArray) -> Labels:
        """Device name of each client."""
        return Labels(self.device.codes[clients], self.device.names)

    def modes(self, round_index: int, clients: IntArray | None = None) -> IntArray:
        """Index of each client's power mode among its profile's modes; of all clients when None."""
        if self.mode_clock is not None:
            everyone = np.arange(self.clients, dtype=np.int64) if clients is None else clients
            return self.mode_rows(round_index, everyone) - self._modes.first_row[self._modes.line_of[everyone]]
        drawn = self._modes.draw(self.seed, round_index)
        return drawn.copy() if clients is None else drawn[clients]

    def mode_changes(self, round_index: int) -> IntArray:
        """The clients whose power mode differs from the round before (in round 0: all), ascending."""
        if round_index == 0:
            return np.arange(self.clients, dtype=np.int64)
        if self.mode_clock is not None or not self._modes.period or round_index % self._modes.period:
            return np.empty(0, dtype=np.int64)
        return np.flatnonzero(self.modes(round_index) != self.modes(round_index - 1))

    def mode_names(self, round_index: int, clients: IntArray | None = None) -> NDArray[np.str_]:
        """Name of each client's power mode; of all clients when None."""
        everyone = np.arange(self.clients, dtype=np.int64)
        return self.mode_labels(round_index, everyone if clients is None else clients).texts

    def mode_labels(self, round_index: int, clients: IntArray) -> Labels:
        """Name of each client's power mode, in columns."""
        return self.modes_at(self.mode_rows(round_index, clients))

    def opened(self, version: int, now_s: float) -> None:
        """Note the clock at a merge: where modes change by the clock, they are known as they were then."""
        for old in [known for known in self._opened_s if known < version - 1 or known > version]:
            del self._opened_s[old]
        self._opened_s[version] = now_s

    def mode_rows_at(self, now_s: FloatArray, clients: IntArray) -> IntArray:
        """As `mode_rows`, of modes that change by the clock, at `now_s`, shape (P,)."""
        clock = self.mode_clock
        assert clock is not None
        rows: IntArray = self._modes.first_row[self._modes.line_of[clients]] + clock.modes(
            clients, clock.epoch(clients, now_s)
        )
        return rows

    def mode_changes_between(self, after_s: float, until_s: float) -> tuple[FloatArray, IntArray, IntArray]:
        """Time, client and mode of every change by the clock in (after_s, until_s]; none where rounds change modes."""
        if self.mode_clock is None:
            return np.empty(0), np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        return self.mode_clock.changes(np.arange(self.clients, dtype=np.int64), after_s, until_s)

    def busy_joules(self, clients: IntArray, start_s: FloatArray, end_s: FloatArray) -> FloatArray:
        """Energy of computing from start to end, where modes change by the clock."""
        assert self.mode_clock is not None
        joules, at_s = np.zeros(len(clients)), start_s
        while True:
            epoch = self.mode_clock.epoch(clients, at_s)
            until_s = np.minimum(end_s, self.mode_clock.change_s(clients, epoch + 1))
            watts = self.rates_at(self.mode_rows_at(at_s, clients)).busy_power_watts
            joules = joules + np.asarray(watts) * (until_s - at_s)
            if (until_s >= end_s).all():
                return joules
            at_s = until_s

    def mode_rows(self, round_index: int, clients: IntArray) -> IntArray:
        """Which device in which power mode, as the row of `rates_at` and `modes_at`."""
        if self.mode_clock is not None:
            return self.mode_rows_at(np.full(len(clients), self._opened_s.get(round_index, 0.0)), clients)
        return self._modes.rows(self.seed, round_index, clients)

    def modes_at(self, rows: IntArray) -> Labels:
        """Name of each power mode, in columns."""
        return Labels(rows, self._modes.names)

    def rates_at(self, rows: IntArray) -> Rates:
        """Rates of each device in its mode."""
        return _take(self._modes.table, rows)

    def compute_seconds(self, flight: IntArray, clients: IntArray, work: Work, rates: Rates) -> FloatArray:
        """Seconds of each client's local job, with the jitter of that flight of its.

        Raises:
            ProfileError, ValueError: a rate or a time that is not positive and finite (from `compute_time`).
        """
        jitter = mean_one_jitter(self.seed, Stream.COMPUTE_JITTER, clients, flight, self.compute_jitter_sigma)
        return np.broadcast_to(compute_time(work, rates).total_s, clients.shape) * jitter

    def download_seconds(self, flight: IntArray, clients: IntArray, bytes_: ArrayLike) -> FloatArray:
        """Seconds of each client's download, with the jitter of that flight."""
        return download_seconds(self.links, self.seed, flight, clients, bytes_)

    def upload_seconds(self, flight: IntArray, clients: IntArray, bytes_: ArrayLike) -> FloatArray:
        """Seconds of each client's upload, with the jitter of that flight."""
        return upload_seconds(self.links, self.seed, flight, clients, bytes_)

    def expected_seconds(self, round_index: int, clients: IntArray, work: Work) -> FloatArray:
        """Seconds from dispatch to the end of upload without jitter: a `fedsim.contracts.control.ExpectedTime`.

        Args:
            work: scalars, or arrays whose first axis is the clients' and which may have more axes.
        Returns:
            Array of the shape of `work`, at least (P,).
        """
        more = max(np.ndim(getattr(work, one.name)) for one in fields(work)) - 1
        column = (len(clients),) + (1,) * max(0, more)
        rows = self.mode_rows(round_index, clients).reshape(column)
        ids = clients.reshape(column)
        latency_s = self.links.latency_s[ids]
        down_s = transfer_seconds(work.download_bytes, self.links.down_bits_per_s[ids], latency_s, 1.0)
        up_s = transfer_seconds(work.upload_bytes, self.links.up_bits_per_s[ids], latency_s, 1.0)
        return down_s + compute_time(work, _take(self._modes.table, rows)).total_s + up_s

    def speed_classes(self) -> IntArray:
        """Each client's device class by the arithmetic rate of its profile's fastest mode, 0 the slowest, ascending.

        Profiles of equal rate share a class. Shape (clients,).
        """
        first_rows = np.unique(self._modes.first_row)
        fastest = np.maximum.reduceat(np.asarray(self._modes.table.flops_per_s), first_rows)
        _, class_of_profile = np.unique(fastest, return_inverse=True)
        profile_of_line = np.searchsorted(first_rows, self._modes.first_row)
        classes: IntArray = class_of_profile[profile_of_line[self._modes.line_of]].astype(np.int64)
        return classes

    def bandwidth(self, round_index: int, clients: IntArray) -> tuple[FloatArray, FloatArray]:
        """Mean bits per second down and up (the same in every round: the jitter comes on top)."""
        return self.links.down_bits_per_s[clients], self.links.up_bits_per_s[clients]

    def latency(self, clients: IntArray) -> FloatArray:
        """Seconds of latency, one way, once per transfer."""
        return self.links.latency_s[clients]


def load_fleet(settings: FleetSettings, precision: Precision, seed: int, perturb: Perturb | None = None) -> Fleet:
    """Build the fleet of a run.

    Args:
        settings: `fleet.clients` repeats the file's list of devices up to that number; `fleet.mode_period` replaces
            the file's, and may not be given beside a file's `mode_period_s`.
        precision: of the clock's workload, for the rates.
        seed: the run's root seed.
        perturb: applied once to each distinct profile (error bands); None leaves them as they are.
    Raises:
        ProfileError: an unknown fleet, profile, mode or link, or a bad value in a file.
    """
    path = fleet_path(settings.name)
    spec = read_fleet_file(path)
    pattern = spec.pattern
    clients = np.arange(settings.clients or spec.clients or len(pattern), dtype=np.int64)
    line_of = clients % len(pattern)
    kind_of = _kind_of(spec, clients, line_of)

    profiles = _load_profiles(path, pattern, perturb)
    first_row: dict[str, int] = {}
    names: list[str] = []
    rates: list[Rates] = []
    for reference, profile in profiles.items():
        first_row[reference] = len(names)
        names += list(profile.modes)
        rates += [rates_of(profile, mode, precision) for mode in profile.modes]
    modes = _Modes(
        cumulative=_cumulative([_mode_weights(path, device, profiles[device.profile]) for device in pattern]),
        line_of=line_of,
        first_row=np.array([first_row[device.profile] for device in pattern], dtype=np.int64),
        names=np.array(names),
        table=stack_rates(rates),
        period=spec.mode_period if settings.mode_period is None else settings.mode_period,
    )
    dynamics = dynamics_of(spec, path, len(clients), line_of, kind_of, seed)
    if dynamics.mode_period_s is not None and modes.period:
        raise ProfileError(
            f"fleet.mode_period: value {modes.period} is not allowed (the fleet's modes change by the clock)"
        )
    return Fleet(
        name=spec.name,
        device=Labels(line_of, np.array([profiles[device.profile].name for device in pattern])),
        links=_links(spec, clients, kind_of, seed),
        seed=seed,
        compute_jitter_sigma=spec.compute_jitter_sigma.value,
        _modes=modes,
        dynamics=dynamics,
        mode_clock=None
        if dynamics.mode_period_s is None
        else ModeClock(dynamics.mode_period_s, modes.cumulative, line_of, seed),
    )


def _load_profiles(path: Path, pattern: list[DeviceSpec], perturb: Perturb | None) -> dict[str, DeviceProfile]:
    profiles: dict[str, DeviceProfile] = {}
    for device in pattern:
        reference = device.profile
        if reference in profiles:
            continue
        own_file = reference.endswith((".yaml", ".yml"))
        try:
            profile = load_profile(profile_path(path, reference) if own_file else reference)
        except ProfileError as error:
            raise ProfileError(f"fleet file '{path}': {error}") from error
        if any(profile.name == other.name for other in profiles.values()):
            raise ProfileError(
                f"fleet file '{path}': two profiles are called '{profile.name}' (allowed: one profile per device name)"
            )
        profiles[reference] = profile if perturb is None else perturb(profile)
    return profiles


def _mode_weights(path: Path, device: DeviceSpec, profile: DeviceProfile) -> FloatArray:
    """Probability of each of the profile's modes."""
    names = list(profile.modes)
    if device.mode == "uniform":
        weights = dict.fromkeys(names, 1.0)
    elif device.mode == "fastest":
        weights = {profile.default_mode: 1.0}
    elif isinstance(device.mode, str):
        weights = {device.mode: 1.0}
    else:
        weights = device.mode
    for name in weights:
        if name not in names:
            kind = f"mode of {profile.name}"
            raise ProfileError(f"fleet file '{path}': {unknown(kind, name, names)}, or 'fastest' or 'uniform'")
    asked = np.array([weights.get(name, 0.0) for name in names])
    return asked / asked.sum()


def _cumulative(weights: list[FloatArray]) -> FloatArray:
    """Cumulative probabilities, shape (lines, most modes), 1 from each line's last possible mode on."""
    table = np.ones((len(weights), max(len(row) for row in weights)))
    for line, row in enumerate(weights):
        last = int(np.flatnonzero(row)[-1])
        table[line, :last] = np.cumsum(row)[:last]
    return table


def _kind_of(spec: FleetFile, clients: IntArray, line_of: IntArray) -> IntArray:
    """Each client's link: the one its device names, else the listed ones in turn, shifted by one on every pass."""
    kinds = list(spec.links)
    pattern = spec.pattern
    named = np.array([-1 if device.link is None else kinds.index(device.link) for device in pattern])[line_of]
    in_turn = (line_of + clients // len(pattern)) % len(kinds)
    kind_of: IntArray = np.where(named >= 0, named, in_turn)
    return kind_of


def _links(spec: FleetFile, clients: IntArray, kind_of: IntArray, seed: int) -> Links:
    kinds = list(spec.links)
    columns = []
    for key, name in enumerate(("down_mbps", "up_mbps", "latency_ms", "jitter_sigma")):
        draws = uniforms(seed, Stream.LINK_MEAN, clients, key)
        numbers: list[Number] = [getattr(spec.links[kind], name) for kind in kinds]
        low = np.array([number.low if number.draw == "uniform" else number.value for number in numbers])[kind_of]
        high = np.array([number.high if number.draw == "uniform" else number.value for number in numbers])[kind_of]
        columns.append(low + (high - low) * draws)
    down_mbps, up_mbps, latency_ms, jitter_sigma = columns
    payload = 1.0 + spec.overhead.value
    return Links(1e6 * down_mbps / payload, 1e6 * up_mbps / payload, 1e-3 * latency_ms, jitter_sigma)


def _take(rates: Rates, rows: IntArray) -> Rates:
    return Rates(**{one.name: np.asarray(getattr(rates, one.name))[rows] for one in fields(rates)})
