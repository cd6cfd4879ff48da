"""What the command line takes. Nothing here knows what a command does."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import TypeAlias

from fedsim.places import user_path

BASELINE_HELP = "method or row to measure speedups against (default: fedlora, else fedspine_uniform, else the slowest)"
WHERE_HELP = "only runs with this setting, such as fleet.name=fedspine-80 (several values: commas; may be repeated)"

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Action = Callable[[argparse.Namespace], int | None]


def make_parser(version: Callable[[], str], actions: Mapping[str, Action]) -> argparse.ArgumentParser:
    """The parser of all commands; the namespace has the command's `action` and its own `parser`.

    Args:
        version: gives what ``--version`` prints; called for that alone, as it costs a third of a start.
        actions: what each command does, by its name.
    """
    parser = argparse.ArgumentParser(
        prog="fedsim",
        description="Federated fine-tuning with real learning on simulated devices.",
    )

    class ShowVersion(argparse.Action):
        def __call__(self, parser: argparse.ArgumentParser, *given: object) -> None:
            print(version())
            parser.exit()

    parser.add_argument("--version", action=ShowVersion, nargs=0, help="show the version of fedsim and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in _COMMANDS:
        add(commands)
    for name, command in commands.choices.items():
        command.set_defaults(action=actions[name], parser=command)
    return parser


def _run(commands: Commands) -> None:
    run = commands.add_parser("run", help="run one experiment", description="Run one experiment.")
    run.add_argument("config", metavar="CONFIG", help="YAML file, or the name of a preset such as quickstart")
    run.add_argument(
        "overrides", nargs="*", metavar="key=value", help="configuration keys, such as train.local_steps=10"
    )
    run.add_argument("--out", metavar="DIR", type=user_path, help="run directory (default: runs/CONFIG-METHOD-seedN)")
    again = run.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    again.add_argument("--force", action="store_true", help="overwrite an existing run")
    run.add_argument(
        "--profile-error",
        metavar="N",
        type=int,
        help="then time the finished run again on N draws of devices and links from their bands, without training",
    )
    _add_import(run)
    run.add_argument("--quiet", action="store_true", help="no progress")


def _sweep(commands: Commands) -> None:
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
    sweep.add_argument("--out", metavar="DIR", type=user_path, help="the sweep's folder (default: runs/NAME)")
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


def _compare(commands: Commands) -> None:
    compare = commands.add_parser("compare", help="table and figures of finished runs")
    _add_comparison(compare)
    compare.add_argument(
        "--out", metavar="DIR", type=user_path, help="folder for figures and their CSV (default: none drawn)"
    )
    compare.add_argument("--round", metavar="N", type=int, help="round of the timeline (default: the middle one)")
    compare.add_argument("--json", action="store_true", help="machine-readable output")
    _add_import(compare)


def _report(commands: Commands) -> None:
    report = commands.add_parser(
        "report",
        help="one self-contained page on finished runs",
        description="Write one HTML page on all finished runs at or below DIR. It works offline and without scripts.",
    )
    _add_comparison(report)
    report.add_argument(
        "--out", metavar="FILE.html", type=user_path, help="default: report.html in DIR, or here for several DIR"
    )
    _add_import(report)


def _surrogate(commands: Commands) -> None:
    surrogate = commands.add_parser(
        "fit-surrogate",
        help="fit a loss model to a finished run, to stand in for training in large fleets",
        description="Fit a loss model to a finished run that trained. Runs with train.engine=surrogate and "
        "train.surrogate=FILE draw losses and accuracies from it; all their outputs say so.",
    )
    surrogate.add_argument("run", metavar="RUN", type=user_path, help="run directory, finished, with client_rounds")
    surrogate.add_argument("--out", metavar="FILE", type=user_path, required=True, help="JSON file to write")
    _add_import(surrogate)


def _export(commands: Commands) -> None:
    export = commands.add_parser(
        "export",
        help="write a model of a finished run for plain transformers and peft",
        description="Write one client's pruned model, or the consensus, with the run's LoRA. The folder's README.md "
        "says how to load it.",
    )
    export.add_argument("run", metavar="RUN", type=user_path, help="run directory, finished")
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
    export.add_argument("--out", metavar="DIR", type=user_path, required=True, help="folder to make")
    _add_import(export)


def _check(commands: Commands) -> None:
    check = commands.add_parser(
        "check",
        help="is a finished run what it says: digests of its files, and what must hold in its records",
        description="Compare the files of a finished run with their digests, and its records with each other: seconds "
        "of each client, versions, sums of each round, the trace's hash. Exit code 1 where anything is wrong.",
    )
    check.add_argument("run", metavar="RUN", type=user_path, help="run directory, finished")
    _add_import(check)


def _bench(commands: Commands) -> None:
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


def _devices(commands: Commands) -> None:
    devices = commands.add_parser("devices", help="device profiles: every number with its status and source")
    devices.add_argument("name", nargs="?", metavar="NAME", help="device name or profile file (default: a list)")
    devices.add_argument("--json", action="store_true", help="machine-readable output")


def _estimate(commands: Commands) -> None:
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
    tuning.add_argument("--adapter-width", type=int, metavar="W", help="bottleneck adapters, one a layer, of width W")
    tuning.add_argument("--full", action="store_true", help="full tuning")
    tuning.add_argument("--inference", action="store_true", help="forward pass only")
    estimate.add_argument("--lora-targets", metavar="A,B", help="LoRA on these Linears only, such as query,value")
    estimate.add_argument("--causal-lm", action="store_true", help="the model predicts tokens (default: it classifies)")
    estimate.add_argument(
        "--micro-batches", type=int, default=1, metavar="N", help="batches whose gradients one step sums (default: 1)"
    )
    estimate.add_argument("--checkpointing", action="store_true", help="run each layer's forward again going back")
    estimate.add_argument("--no-dropout", action="store_true", help="no dropout, whose masks are then not kept")
    estimate.add_argument(
        "--cached-activations", action="store_true", help="below the top layers nothing is run or held"
    )
    estimate.add_argument(
        "--optimizer", choices=["fused", "per_tensor"], default="fused", help="how AdamW is run (default: fused)"
    )
    estimate.add_argument("--train-top-layers", type=int, metavar="K", help="train the top K layers only")
    estimate.add_argument("--prune-ratio", type=float, default=0.0, metavar="P", help="pruning ratio (default: 0)")
    estimate.add_argument("--precision", choices=["fp32", "fp16"], default="fp32", help="arithmetic (default: fp32)")
    estimate.add_argument("--json", action="store_true", help="machine-readable output")


def _validate(commands: Commands) -> None:
    validate = commands.add_parser(
        "validate",
        help="the cost model beside what others measured",
        description="Predicted beside measured, for every measurement that the cost model can state.",
    )
    validate.add_argument("--profile", metavar="FILE.yaml", type=user_path, help="a profile of your own (default: all)")
    validate.add_argument("--log", metavar="FILE.csv", type=user_path, help="your own measurements (default: built-in)")
    validate.add_argument("--page", metavar="FILE.md", type=user_path, help="write a page with tables and a figure")
    validate.add_argument("--json", action="store_true", help="machine-readable output")


def _calibrate(commands: Commands) -> None:
    calibrate = commands.add_parser(
        "calibrate",
        help="this host, or a log of measured steps, as a device profile",
        description="Time some training steps on this host (or take those of a log) and fit a profile to them.",
    )
    calibrate.add_argument("--out", metavar="FILE.yaml", type=user_path, required=True, help="profile to write")
    calibrate.add_argument("--log", metavar="FILE.csv", type=user_path, help="measured steps (default: time this host)")
    calibrate.add_argument("--torch-device", choices=["cpu", "cuda"], default="cpu", help="what to time (default: cpu)")
    calibrate.add_argument("--threads", type=int, default=1, metavar="N", help="threads of torch (default: 1)")
    calibrate.add_argument("--check", action="store_true", help="then time 12 more steps that the fit has not seen")


def _add_import(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="FILE.py",
        help="a Python file (or module) that registers methods, policies, rules and so on of your own",
    )


def _add_comparison(command: argparse.ArgumentParser) -> None:
    """What a table and a page of the same runs both take."""
    command.add_argument("directories", nargs="+", metavar="DIR", type=user_path, help="runs, or folders of runs")
    command.add_argument("--target-accuracy", metavar="X", type=float, help="default: what every run reaches")
    command.add_argument("--baseline", metavar="METHOD", help=BASELINE_HELP)
    command.add_argument("--where", metavar="KEY=VALUE", action="append", default=[], help=WHERE_HELP)


def _retime(commands: Commands) -> None:
    retime = commands.add_parser(
        "retime",
        help="a finished run under other devices, power modes or links, without training again",
        description="Write a finished run as it would have been timed on another fleet. Refused where the order of "
        "merges, who took part, or what the policy chose hangs on the clock.",
    )
    retime.add_argument("run", metavar="RUN", type=user_path, help="run directory, finished, with client_rounds")
    retime.add_argument("--fleet", metavar="FLEET", help="fleet or its file (default: the run's)")
    retime.add_argument("--mode", metavar="MODE", help="power mode of every device, or fastest, or uniform")
    retime.add_argument("--links", metavar="FLEET", help="fleet whose links are taken (default: its own)")
    retime.add_argument("--out", metavar="DIR", type=user_path, required=True, help="run directory to make")
    _add_import(retime)


_COMMANDS = (
    _run,
    _sweep,
    _compare,
    _report,
    _surrogate,
    _export,
    _check,
    _bench,
    _devices,
    _estimate,
    _validate,
    _calibrate,
    _retime,
)
