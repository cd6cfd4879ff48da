"""What a surrogate is fitted to: the rows of a finished run, with the inputs that its records do not state outright.

Two things are found by playing the records again: each client's achieved ratio when its job began (the one recorded is
the asked one), and the fleet's mean squared ratio at each evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from fedsim.contracts.common import FloatArray, IntArray
from fedsim.errors import RunError
from fedsim.methods.catalogue import method_named
from fedsim.methods.rates import rate_shares
from fedsim.records.reader import Run
from fedsim.runner.config import build_config
from fedsim.settings import Config

LEAST_ROWS = 30
LEAST_ROUNDS = 4
LEAST_EVALUATIONS = 5
"""Four coefficients describe each tested quantity; fewer evaluations leave nothing over to judge them by."""


@dataclass(frozen=True, eq=False)
class SourceRows:
    """A run as the fit sees it. Shape (N,) over trained client rounds, (E,) over evaluations, (R,) over rounds.

    Attributes:
        round_index, client, rank, dose, ratio_start, ratio, loss_before, loss_after: per trained job; `dose` is
            relative to that of a round at the full rate, ratios are achieved ones.
        importance: over the largest of the round; NaN where the records do not hold it.
        round_dose: dose of each round.
        evaluated: rounds with evaluation; accuracy, loss, accuracy_consensus: what was measured.
        mean_square_ratio: the fleet's, at each evaluation.
        first_dose: full learning rate x local steps.
    """

    config: Config
    round_index: IntArray
    client: IntArray
    rank: IntArray
    dose: FloatArray
    ratio_start: FloatArray
    ratio: FloatArray
    loss_before: FloatArray
    loss_after: FloatArray
    importance: FloatArray
    round_dose: FloatArray
    participants: IntArray
    evaluated: IntArray
    accuracy: FloatArray
    loss: FloatArray
    accuracy_consensus: FloatArray
    mean_square_ratio: FloatArray
    first_dose: float


def source_rows(run: Run) -> SourceRows:
    """Read and check a run.

    Raises:
        RunError: unfinished, not trained (timing only or a surrogate itself), without client records, or too short.
    """
    where = f"run '{run.path}'"
    if not run.finished:
        raise RunError(f"{where} is unfinished; a surrogate is fitted to a finished run (go on with --resume)")
    engine = str((run.config.get("train") or {}).get("engine"))
    if "surrogate" in (engine, run.manifest.get("engine")):
        raise RunError(f"{where} is itself a surrogate run; a surrogate is fitted to a run that was trained")
    if "none" in (engine, run.manifest.get("engine")):
        raise RunError(f"{where} is timing only (train.engine none); a surrogate is fitted to a run that was trained")
    if not run.has("client_rounds"):
        raise RunError(f"{where} has no client_rounds (records.client_rounds: false); a surrogate needs their losses")
    config = build_config(run.config)
    rounds, table = run.rounds, run.client_rounds.sort_values(["round", "client"], ignore_index=True)
    trained = (table["outcome"] == "ok") & np.isfinite(table["loss_before"]) & np.isfinite(table["loss_after"])
    tested = rounds.dropna(subset=["accuracy", "loss", "accuracy_consensus"])
    for what, count, least in (
        ("rounds", len(rounds), LEAST_ROUNDS),
        ("trained client rounds", int(trained.sum()), LEAST_ROWS),
        ("evaluations", len(tested), LEAST_EVALUATIONS),
    ):
        if count < least:
            raise RunError(f"{where} has {count} {what}; a surrogate needs at least {least}")

    clients = int((run.manifest.get("fleet") or {}).get("clients", table["client"].max() + 1))
    table["ratio"], table["ratio_start"], square = _replayed(run, table, trained, clients)
    importance = _importance(table, trained)
    train = config.train
    shares = rate_shares(method_named(config.method), config, len(rounds))
    own = table[trained]
    number = own["round"].to_numpy(dtype=np.int64)
    evaluated = tested["round"].to_numpy(dtype=np.int64)
    return SourceRows(
        config=config,
        round_index=number,
        client=own["client"].to_numpy(dtype=np.int64),
        rank=own["lora_rank"].to_numpy(dtype=np.int64),
        dose=shares[number],
        ratio_start=np.minimum(own["ratio_start"], own["ratio"]).to_numpy(),
        ratio=own["ratio"].to_numpy(),
        loss_before=own["loss_before"].to_numpy(),
        loss_after=own["loss_after"].to_numpy(),
        importance=importance[trained.to_numpy()],
        round_dose=shares,
        participants=rounds["participants"].to_numpy(dtype=np.int64),
        evaluated=evaluated,
        accuracy=tested["accuracy"].to_numpy(),
        loss=tested["loss"].to_numpy(),
        accuracy_consensus=tested["accuracy_consensus"].to_numpy(),
        mean_square_ratio=square[evaluated],
        first_dose=train.learning_rate * train.local_steps,
    )


def _replayed(
    run: Run, table: pd.DataFrame, trained: pd.Series, clients: int
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Achieved ratio after the job and before it (N,), and the fleet's mean squared ratio by round (R,).

    The last round's record holds the ratio after the final cut, which its losses never saw: there the asked one stands
    in. Clients outside the last round are taken to have been cut to the fleet's mean.
    """
    last = len(run.rounds) - 1
    in_last = (table["round"] == last).to_numpy()
    after = np.where(in_last, table["prune_ratio_target"], table["prune_ratio"])
    before, achieved, square = np.zeros(len(table)), np.zeros(clients), np.zeros(last + 1)
    good = trained.to_numpy()
    for number, places in table.groupby("round").indices.items():
        who = table["client"].to_numpy()[places]
        before[places] = achieved[who]
        kept = good[places]
        achieved[who[kept]] = after[places[kept]]
        square[int(number)] = float(np.mean(achieved**2))
    final = np.full(clients, float((run.manifest.get("final_prune_ratio") or {}).get("mean", achieved.mean())))
    cut = table[in_last & good]
    final[cut["client"]] = cut["prune_ratio"]
    square[last] = float(np.mean(final**2))
    return after, before, square


def _importance(table: pd.DataFrame, trained: pd.Series) -> FloatArray:
    """Importance over the largest of its round, (N,); NaN where the records do not hold it."""
    recorded = table["lora_importance"].astype(float).where(trained)
    largest = recorded.groupby(table["round"]).transform("max")
    return (recorded / largest.where(largest > 0)).to_numpy()
