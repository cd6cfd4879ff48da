"""The command line. Parsing loads nothing heavy; each command imports what it needs.

Exit codes: 0 done, 1 cells of a sweep failed, 2 something the user can mend (one sentence on standard error), 130
interrupted.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.errors import FedsimError

if TYPE_CHECKING:
    from fedsim.experiment.comparison import Comparison

BASELINE_HELP = "method or row to measure speedups against (default: fedlora, else fedspine_uniform, else the slowest)"
WHERE_HELP = "only runs with this setting, such as fleet.name=fedspine-80 (several values: commas; may be repeated)"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the ``fedsim`` command; returns the exit code."""
    arguments = _parse(argv)
    try:
        return int(arguments.action(arguments) or 0)
    except FedsimError as error:
        print(f"fedsim: error: {error}{_cure(arguments, str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fedsim: interrupted; an unfinished run goes on with --resume", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, say) has gone; there is nobody left to tell.
        sys.stderr.close()
        return 0


_OWN = re.compile(r"(?<!--baseline: )unknown (method|control\.policy) '|prune\.criterion: unknown value '")
_NO_DATA = re.compile(r"(data\.(?:test_)?path) '[^']*': no such file")


def _cure(arguments: argparse.Namespace, error: str) -> str:
    """What a refusal's sentence ends with where an argument of this command mends it; empty elsewhere."""
    if getattr(arguments, "imports", None) == [] and _OWN.search(error):
        return "; one of your own needs --import FILE.py"
    lost = _NO_DATA.search(error)
    given = [*getattr(arguments, "overrides", ()), *getattr(arguments, "grid", ())]
    if lost and not any(word.startswith(f"{lost[1]}=") for word in given):
        return "; give data.path=... and data.test_path=... here, or mend the configuration"
    return ""


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; ``key=value`` may also stand behind an option, which argparse alone refuses."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    late = [word for word in rest if "=" in word and not word.startswith("-")]
    if len(late) < len(rest) or (late and not hasattr(arguments, "overrides")):
        # The command's own usage, not that of all commands.
        arguments.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if late:
        arguments.overrides += late
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedsim",
        description="Federated fine-tuning with real learning on simulated devices.",
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    run = commands.add_parser("run", help="run one experiment", description="Run one experiment.")
    run.add_argument("config", metavar="CONFIG", help="YAML file, or the name of a preset such as quickstart")
    run.add_argument(
        "overrides", nargs="*", metavar="key=value", help="configuration keys, such as train.local_steps=10"
    )
    run.add_argument("--out", metavar="DIR", type=Path, help="run directory (default: runs/CONFIG-METHOD-seedN)")
    again = run.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    again.add_argument("--force", action="store_true", help="overwrite an existing run")
    run.add_argument(
        "--profile-error",
        metavar="N",
        type=int,
        help="repeat the run over N draws of the device profiles from their error bands, in DIR/draw-000 and so on",
    )
    _add_import(run)
    run.add_argument("--quiet", action="store_true", help="no progress")
    run.set_defaults(action=_run)

    sweep = commands.add_parser(
        "sweep",
        help="run a grid of experiments, several at a time",
        description="Run every combination of the grid's values and seeds. The same command goes on after a stop: "
        "finished cells are kept, unfinished ones go on from their last checkpoint. Exit code 1 where cells failed.",
    )
    sweep.add_argument("config", metavar="CONFIG", help="YAML file or preset; a sweep file may hold grid and seeds")
    sweep.add_argument("overrides", nargs="*", metavar="key=value", help="configuration keys, set in every cell")
    sweep.add_argument(
        "--grid", action="append", default=[], metavar="key=v1,v2", help="values of one key; again for another key"
    )
    sweep.add_argument("--seeds", metavar="0-4", help="a range, or a list 0,2,5 (default: the configuration's seed)")
    sweep.add_argument("--out", metavar="DIR", type=Path, help="the sweep's folder (default: runs/NAME)")
    where = sweep.add_mutually_exclusive_group()
    where.add_argument("--workers", metavar="N", type=int, help="cells at a time (default: the number of cores)")
    where.add_argument(
        "--ray",
        metavar="ADDRESS",
        nargs="?",
        const="local",
        help="run the cells on a Ray cluster: auto, HOST:PORT or ray://HOST:PORT; without ADDRESS on one of this "
        "computer's own",
    )
    sweep.add_argument("--tiny", action="store_true", help="the small scale of tiny.yaml beside CONFIG")
    sweep.add_argument("--rerun-failed", action="store_true", help="run cells again that failed before")
    _add_import(sweep)
    sweep.add_argument("--quiet", action="store_true", help="no table and no progress")
    sweep.set_defaults(action=_sweep)

    compare = commands.add_parser("compare", help="table and figures of finished runs")
    compare.add_argument("directories", nargs="+", metavar="DIR", type=Path, help="runs, or folders of runs")
    compare.add_argument("--target-accuracy", metavar="X", type=float, help="default: what every run reaches")
    compare.add_argument("--baseline", metavar="METHOD", help=BASELINE_HELP)
    compare.add_argument("--where", metavar="KEY=VALUE", action="append", default=[], help=WHERE_HELP)
    compare.add_argument(
        "--out", metavar="DIR", type=Path, help="folder for figures and their CSV (default: none drawn)"
    )
    compare.add_argument("--round", metavar="N", type=int, help="round of the timeline (default: the middle one)")
    compare.add_argument("--json", action="store_true", help="machine-readable output")
    _add_import(compare)
    compare.set_defaults(action=_compare)

    report = commands.add_parser(
        "report",
        help="one self-contained page on finished runs",
        description="Write one HTML page on all finished runs at or below DIR. It works offline and without scripts.",
    )
    report.add_argument("directories", nargs="+", metavar="DIR", type=Path, help="runs, or folders of runs")
    report.add_argument(
        "--out", metavar="FILE.html", type=Path, help="default: report.html in DIR, or here for several DIR"
    )
    report.add_argument("--target-accuracy", metavar="X", type=float, help="default: what every run reaches")
    report.add_argument("--baseline", metavar="METHOD", help=BASELINE_HELP)
    report.add_argument("--where", metavar="KEY=VALUE", action="append", default=[], help=WHERE_HELP)
    _add_import(report)
    report.set_defaults(action=_report)

    surrogate = commands.add_parser(
        "fit-surrogate",
        help="fit a loss model to a finished run, to stand in for training in large fleets",
        description="Fit a loss model to a finished run that trained. Runs with train.engine=surrogate and "
        "train.surrogate=FILE draw losses and accuracies from it; all their outputs say so.",
    )
    surrogate.add_argument("run", metavar="RUN", type=Path, help="run directory, finished, with client_rounds")
    surrogate.add_argument("--out", metavar="FILE", type=Path, required=True, help="JSON file to write")
    _add_import(surrogate)
    surrogate.set_defaults(action=_fit_surrogate)

    export = commands.add_parser(
        "export",
        help="write a model of a finished run for plain transformers and peft",
        description="Write one client's pruned model, or the consensus, with the run's LoRA. The folder's README.md "
        "says how to load it.",
    )
    export.add_argument("run", metavar="RUN", type=Path, help="run directory, finished")
    whose = export.add_mutually_exclusive_group(required=True)
    whose.add_argument("--device", metavar="CLIENT", type=int, help="the structure of one client, counted from 0")
    whose.add_argument(
        "--consensus", action="store_true", help="one structure cut to the fleet-mean ratio by the averaged importance"
    )
    export.add_argument(
        "--format",
        choices=["dense", "sliced"],
        default="dense",
        help="dense: original shapes, zeros where pruned (default); sliced: small shapes, loaded with fedsim's classes",
    )
    export.add_argument("--merge", action="store_true", help="add the LoRA to the weights (default: in DIR/adapter)")
    export.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder to make")
    _add_import(export)
    export.set_defaults(action=_export)

    bench = commands.add_parser(
        "bench",
        help="how fast this host trains clients and plays rounds, against plain loops in the same process",
        description="Measure engines, simulator, policies and memory; every result is checked before it is timed.",
    )
    bench.add_argument("--torch-device", choices=["cpu", "cuda"], default="cpu", help="where to train (default: cpu)")
    bench.add_argument(
        "--only",
        metavar="SECTION,...",
        default="",
        help="engines, chunks, simulator, runs, control, memory (default: all; with cuda: engines and chunks)",
    )
    size = bench.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="smallest sizes, in seconds; no target is judged")
    size.add_argument("--full", action="store_true", help="more cases and more repetitions")
    bench.add_argument("--threads", type=int, default=1, metavar="N", help="threads of torch (default: 1)")
    bench.add_argument("--json", action="store_true", help="machine-readable output")
    bench.set_defaults(action=_bench)

    devices = commands.add_parser("devices", help="device profiles: every number with its status and source")
    devices.add_argument("name", nargs="?", metavar="NAME", help="device name or profile file (default: a list)")
    devices.add_argument("--json", action="store_true", help="machine-readable output")
    devices.set_defaults(action=_devices)

    estimate = commands.add_parser("estimate", help="seconds, joules and memory of one local step on a device")
    which = estimate.add_mutually_exclusive_group(required=True)
    which.add_argument("--device", metavar="NAME", help="device name, such as jetson-tx2")
    which.add_argument("--profile", metavar="FILE.yaml", help="a profile of your own")
    estimate.add_argument("--mode", help="power mode (default: the fastest)")
    estimate.add_argument("--model", required=True, help="built-in shape, local folder or hub name")
    estimate.add_argument("--batch-size", type=int, required=True, help="samples per step")
    estimate.add_argument("--seq-len", type=int, required=True, help="tokens per sample")
    tuning = estimate.add_mutually_exclusive_group()
    tuning.add_argument("--lora-rank", type=int, metavar="R", help="LoRA on every prunable Linear (default: 8)")
    tuning.add_argument("--full", action="store_true", help="full tuning")
    tuning.add_argument("--inference", action="store_true", help="forward pass only")
    estimate.add_argument("--train-top-layers", type=int, metavar="K", help="train the top K layers only")
    estimate.add_argument("--prune-ratio", type=float, default=0.0, metavar="P", help="pruning ratio (default: 0)")
    estimate.add_argument("--precision", choices=["fp32", "fp16"], default="fp32", help="arithmetic (default: fp32)")
    estimate.add_argument("--json", action="store_true", help="machine-readable output")
    estimate.set_defaults(action=_estimate)
    for command in commands.choices.values():
        command.set_defaults(parser=command)
    return parser


def _add_import(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="FILE.py",
        help="a Python file (or module) that registers methods, policies or criteria of your own",
    )


def _import_own(arguments: argparse.Namespace) -> None:
    """Import what ``--import`` names; a sweep does so itself, as its cells' processes must too."""
    if arguments.imports:
        from fedsim.sweeps.host import import_user_modules

        import_user_modules(arguments.imports)


def _version() -> str:
    from importlib import metadata

    try:
        return f"fedsim {metadata.version('fedspine-sim')}"
    except metadata.PackageNotFoundError:
        return "fedsim (not installed)"


def _run(arguments: argparse.Namespace) -> None:
    from fedsim.errors import ConfigError
    from fedsim.experiment.config import parse_overrides

    overrides = parse_overrides(arguments.overrides)
    draws = arguments.profile_error
    if draws is not None and draws < 1:
        raise ConfigError(f"--profile-error: value {draws} is not allowed (at least 1)")
    if not arguments.quiet:
        print("fedsim: reading the configuration", file=sys.stderr, flush=True)
    from fedsim.experiment.run import default_directory, run

    _import_own(arguments)
    out = arguments.out or default_directory(arguments.config, overrides)
    options: dict[str, Any] = {"resume": arguments.resume, "force": arguments.force, "quiet": arguments.quiet}
    if draws is None:
        result = run(arguments.config, out=out, **options, **overrides)
        print(result.summary())
        return
    for draw in range(draws):
        result = run(arguments.config, out=out / f"draw-{draw:03d}", profile_draw=draw, **options, **overrides)
        print(result.summary())


def _sweep(arguments: argparse.Namespace) -> int:
    from fedsim.experiment.config import parse_overrides
    from fedsim.sweeps.grid import parse_grid
    from fedsim.sweeps.sweep import sweep

    try:
        result = sweep(
            arguments.config,
            grid=parse_grid(arguments.grid),
            seeds=arguments.seeds,
            out=arguments.out,
            workers=arguments.workers,
            ray=arguments.ray,
            tiny=arguments.tiny,
            rerun_failed=arguments.rerun_failed,
            imports=arguments.imports,
            overrides=parse_overrides(arguments.overrides),
            quiet=arguments.quiet,
        )
    except KeyboardInterrupt:
        print("fedsim: interrupted; the same command goes on with the sweep", file=sys.stderr)
        return 130
    print(result.summary())
    return 1 if result.failed else 0


def _compare(arguments: argparse.Namespace) -> None:
    from fedsim.experiment.choose import choose_runs
    from fedsim.experiment.compare import compare
    from fedsim.experiment.results import find_runs
    from fedsim.sweeps.notes import sweep_notes

    _import_own(arguments)
    runs = choose_runs(find_runs(arguments.directories), arguments.where)
    comparison = compare(runs, arguments.target_accuracy, arguments.baseline, sweep_notes(arguments.directories))
    paths = []
    if arguments.out is not None:
        from fedsim.plots import write_figures

        # Before the table: what is refused here (a round that is not there) is then all that is said.
        paths = write_figures(runs, arguments.out, arguments.round)
        paths += _write_speedups(comparison, arguments.out)
    print(json.dumps(comparison.as_dict(), indent=2) if arguments.json else comparison.as_text())
    if paths:
        print(f"{len(paths)} files written to {arguments.out}", file=sys.stderr)


def _write_speedups(comparison: Comparison, out: Path) -> list[Path]:
    """The speedups as PNG, PDF and CSV beside the other figures; nothing where there is only the baseline."""
    if len(comparison.rows) < 2:
        return []
    from fedsim.plots.figures import SURROGATE
    from fedsim.plots.style import save
    from fedsim.plots.summary import draw_speedups
    from fedsim.plots.summary_frames import speedups

    of, written = comparison.speedup_of_text(), list[Path]()
    draw_speedups(
        speedups(comparison),
        of + (" (provisional)" if comparison.target_is_provisional else ""),
        comparison.baseline,
        comparison.clock,
        SURROGATE if comparison.is_surrogate else None,
        lambda figure, frame, name, mark: written.extend(save(figure, frame, out, name, mark)),
    )
    return written


def _report(arguments: argparse.Namespace) -> None:
    from fedsim.report.page import write_report

    _import_own(arguments)
    path = write_report(
        arguments.directories, arguments.out, arguments.target_accuracy, arguments.baseline, arguments.where
    )
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")


def _fit_surrogate(arguments: argparse.Namespace) -> None:
    from fedsim.experiment.fit_surrogate import fit_surrogate, fit_text

    _import_own(arguments)
    print(fit_text(fit_surrogate(arguments.run, arguments.out)))
    print(f"written to {arguments.out}; use it with train.engine=surrogate train.surrogate={arguments.out}")


def _export(arguments: argparse.Namespace) -> None:
    from fedsim.experiment.export import check_export, export_run

    _import_own(arguments)
    run, _ = check_export(arguments.run, arguments.out, arguments.device, arguments.consensus, arguments.format)
    print("fedsim: loading torch and the model", file=sys.stderr, flush=True)
    result = export_run(
        run,
        arguments.out,
        device=arguments.device,
        consensus=arguments.consensus,
        format=arguments.format,
        merge=arguments.merge,
    )
    print(result.as_text())


def _bench(arguments: argparse.Namespace) -> None:
    from fedsim.bench.options import Options
    from fedsim.bench.run import bench
    from fedsim.bench.text import report_text

    options = Options(
        torch_device=arguments.torch_device,
        size="quick" if arguments.quick else "full" if arguments.full else "default",
        sections=tuple(name for name in arguments.only.split(",") if name),
        threads=arguments.threads,
    )
    report = bench(options)
    print(json.dumps(report.as_dict(), indent=2) if arguments.json else report_text(report))


def _devices(arguments: argparse.Namespace) -> None:
    from fedsim.cost.describe import devices_json, devices_text

    if arguments.json:
        print(json.dumps(devices_json(arguments.name), indent=2))
    else:
        print(devices_text(arguments.name))


def _estimate(arguments: argparse.Namespace) -> None:
    from fedsim.cost.describe import estimate_text
    from fedsim.cost.estimate import estimate

    figures = estimate(
        device=arguments.profile or arguments.device,
        mode=arguments.mode,
        model=arguments.model,
        batch_size=arguments.batch_size,
        seq_len=arguments.seq_len,
        tuning="full" if arguments.full else "inference" if arguments.inference else "lora",
        lora_rank=8 if arguments.lora_rank is None else arguments.lora_rank,
        train_top_layers=arguments.train_top_layers,
        prune_ratio=arguments.prune_ratio,
        precision=arguments.precision,
    )
    print(json.dumps(figures, indent=2) if arguments.json else estimate_text(figures))


if __name__ == "__main__":
    sys.exit(main())
