"""Many runs from one command: a table of cells, processes to run them, a ledger of how they ended.

A cell is a run like any other, in a run directory named after its configuration: whatever ran it, wherever and beside
whatever else, its records are the same to the bit. With one seed, all methods see the same split, fleet, draws of the
devices and choice of clients (`fedsim.rng`: a draw depends on its key alone), so that differences are paired.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedsim.errors import ConfigError, RunError
from fedsim.places import user_path
from fedsim.records.reader import Run, load
from fedsim.runner.config import value_text
from fedsim.runner.names import own_names
from fedsim.sweeps.cell_jobs import Job, Setup
from fedsim.sweeps.cells import Grid, SweepPlan, plan_sweep
from fedsim.sweeps.checks import check_cells
from fedsim.sweeps.fork_host import being_imported, import_user_modules
from fedsim.sweeps.ledger import FAILED, FINISHED, SweepLedger, anything_due, error_text, open_ledger, read_ledger
from fedsim.sweeps.local import LocalPool, Pool, usable_cores
from fedsim.sweeps.news import SweepNews

_ROWS_SHOWN = 60


@dataclass(frozen=True, eq=False)
class Sweep:
    """A sweep as it stands on disk.

    Attributes:
        path: its folder.
        cells: the records of ``sweep.json``: index, label, overrides, method, seed, config_hash, directory, state,
            error, host_s (and traceback, worker, summary where there are any).
    """

    path: Path
    cells: tuple[dict[str, Any], ...] = field(repr=False)

    @property
    def failed(self) -> list[dict[str, Any]]:
        """Cells that failed."""
        return [cell for cell in self.cells if cell["state"] == FAILED]

    @property
    def runs(self) -> list[Run]:
        """The finished runs, in the order of the cells."""
        return [load(self.path / cell["directory"]) for cell in self.cells if cell["state"] == FINISHED]

    def summary(self) -> str:
        """One line, and one for each cell that failed."""
        counts: dict[str, int] = {}
        for cell in self.cells:
            counts[cell["state"]] = counts.get(cell["state"], 0) + 1
        told = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
        lines = [f"{len(self.cells)} cells, {told}: {self.path}"]
        for cell in self.failed:
            lines.append(f"failed: cell {cell['index']} ({cell['label']}): {error_text(self.path, cell)}")
        return "\n".join(lines)


def sweep(
    config: str | Path | Mapping[str, Any],
    *,
    grid: Grid | None = None,
    seeds: Any = None,
    out: str | Path | None = None,
    workers: int | None = None,
    ray: str | None = None,
    tiny: bool = False,
    rerun_failed: bool = False,
    imports: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> Sweep:
    """Run every cell of a sweep that is not finished yet.

    Args:
        config, grid, seeds, overrides, tiny: see `fedsim.sweeps.cells.plan_sweep`.
        out: the sweep's folder, by default ``runs/<name>``; each cell's run directory lies in it.
        workers: cells at a time on this computer; default: its cores over the largest ``train.threads``.
        ray: address of a Ray cluster, or ``local`` for one of this computer's own; not with `workers`.
        rerun_failed: run cells that failed before again, from their last checkpoint.
        imports: modules, or paths of Python files, that register methods, policies, rules, criteria and so on of your
            own; every process that runs cells imports them (what a script registers itself, they do not know).
        quiet: no table and no progress.
    Raises:
        FedsimError: before any cell runs. A cell that fails raises nothing: see `Sweep.failed`.
        KeyboardInterrupt: interrupted; the same call goes on later.
    """
    if being_imported() is not None:
        raise ConfigError(
            f"'{being_imported()}' starts a sweep while it is imported: put that call under if __name__ == '__main__'"
        )
    if ray is not None and workers is not None:
        raise ConfigError("--workers and --ray exclude each other: a Ray cluster's cores say how many cells run")
    if workers is not None and workers < 1:
        raise ConfigError(f"--workers: value {workers} is not allowed (at least 1)")
    files = tuple(str(user_path(name).resolve()) if name.endswith(".py") else name for name in imports)
    import_user_modules(files)
    plan = plan_sweep(config, grid=grid, seeds=seeds, overrides=overrides, tiny=tiny)
    path = user_path(out) if out is not None else Path("runs") / plan.name
    due = anything_due(path, plan, rerun_failed)
    trains = any(cell.config.train.engine not in ("none", "surrogate") for cell in plan.cells)
    own = tuple(dict.fromkeys(pair for cell in plan.cells for pair in own_names(cell.config).items()))
    setup = Setup(trains, files, tuple(sys.path), own)
    threads = max(cell.config.train.threads for cell in plan.cells)
    pool: Pool | None = None
    try:
        if due and ray is None:
            # Started before the checks: it loads its libraries while they run.
            at_once = min(workers or max(1, usable_cores() // threads), len(plan.cells))
            pool = LocalPool(setup, at_once)
        if due:
            check_cells(plan, here=ray is None)
        if due and ray is not None:
            from fedsim.sweeps.ray_cluster import RayPool  # an optional package

            pool = RayPool(setup, ray, threads)  # joined before anything is written: the address may be wrong
        if pool is not None and own:
            pool.check()
        ledger = open_ledger(path, plan)
        try:
            if not quiet:
                print(table_text(plan, ledger), flush=True)
            if pool is not None:
                pool.serve(ledger)
                _play(plan, ledger, pool, rerun_failed, quiet)
        finally:
            ledger.close()
    finally:
        if pool is not None:
            pool.close()
    return Sweep(path, tuple(ledger.cells))


def load_sweep(path: str | Path, unfinished: bool = False) -> list[Run]:
    """The runs of a sweep's folder, in the order of its cells; one whose directory was removed is not among them.

    Args:
        unfinished: also those that have begun and are not finished (`Run.finished` tells them).
    Raises:
        RunError: not the folder of a sweep.
    """
    path = user_path(path)
    runs = []
    for cell in read_ledger(path)["cells"]:
        try:
            run = load(path / cell["directory"])
        except RunError:
            if cell["state"] == FINISHED and (path / cell["directory"]).exists():
                raise
            continue
        if run.finished or unfinished:
            runs.append(run)
    return runs


def table_text(plan: SweepPlan, ledger: SweepLedger) -> str:
    """The cells before they run: index, what tells them apart, seed, directory and state."""
    heads = ["cell", *plan.keys, "seed", "directory", "state"]
    rows = [
        [
            str(cell["index"]),
            *("" if key not in cell["overrides"] else value_text(cell["overrides"][key]) for key in plan.keys),
            str(cell["seed"]),
            str(cell["directory"]),
            str(cell["state"]),
        ]
        for cell in ledger.cells[:_ROWS_SHOWN]
    ]
    widths = [max(len(row[place]) for row in [heads, *rows]) for place in range(len(heads))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in [heads, *rows]]
    if len(ledger.cells) > _ROWS_SHOWN:
        lines.append(f"and {len(ledger.cells) - _ROWS_SHOWN} more (all are in {ledger.path / 'sweep.json'})")
    told = ", ".join(f"{count} {state}" for state, count in ledger.count().items())
    lines += [f"note: {note}" for note in plan.notes]
    return "\n".join([*(line.rstrip() for line in lines), f"{len(ledger.cells)} cells ({told}) in {ledger.path}"])


def _play(plan: SweepPlan, ledger: SweepLedger, pool: Pool, rerun_failed: bool, quiet: bool) -> None:
    """Run what is due; the ledger follows.

    Seed by seed, not method by method: a sweep that is stopped holds whole comparisons of its first seeds.
    """
    seeds = {seed: place for place, seed in enumerate(dict.fromkeys(cell.config.seed for cell in plan.cells))}
    waiting = sorted(ledger.due(rerun_failed), key=lambda index: (seeds[plan.cells[index].config.seed], index))
    news = SweepNews(plan, ledger.path, len(waiting), quiet)
    waiting.reverse()
    try:
        while waiting or news.running:
            while waiting and pool.idle > 0:
                index = waiting.pop()
                ledger.begin(index)
                cell = plan.cells[index]
                path = (ledger.path / cell.directory).resolve()
                pool.start(Job(index, cell.config.model_dump(mode="json"), str(path)))
                news.began(index)
            for done in pool.wait(news.patience_s):
                ledger.end(done)
                news.ended(done, error_text(ledger.path, ledger.cells[done.index]))
            news.still_running()
    except BaseException:
        ledger.interrupt()
        raise
