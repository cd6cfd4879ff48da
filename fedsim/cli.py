"""The command line. Parsing loads nothing heavy; each command imports what it needs.

Exit codes: 0 done, 1 cells of a sweep failed or a checked run is not sound, 2 something the user can put right (one
sentence on standard error), 130 interrupted.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.errors import FedsimError
from fedsim.parser import Action, make_parser

if TYPE_CHECKING:
    from fedsim.study.comparison import Comparison


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the ``fedsim`` command; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal or log that cannot show a character of a path gets it escaped: a finished run has not failed.
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")
    arguments = argparse.Namespace()
    try:
        arguments = _parse(argv)
        return int(arguments.action(arguments) or 0)
    except FedsimError as error:
        sentence = _ENDLESS.sub(lambda found: f"{found[0][:100]}...", str(error))
        print(f"fedsim: error: {sentence}{_cure(arguments, sentence)}", file=sys.stderr)
        return 2
    except MemoryError as error:
        print(
            f"fedsim: error: out of memory on this computer{f' ({error})' if str(error) else ''}: take fewer clients, "
            "a smaller batch or model, or fewer workers; an unfinished run goes on with --resume",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("fedsim: interrupted; an unfinished run goes on with --resume", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, say) has gone; there is nobody left to tell.
        sys.stderr.close()
        return 0
    except OSError as error:
        if error.filename is None:
            raise
        print(f"fedsim: error: '{error.filename}': {error.strerror or error}", file=sys.stderr)
        return 2


_OWN = re.compile(
    r"(?<!--baseline: )unknown (method|control\.policy|aggregate\.rule|prune\.criterion|server\.selection) '"
)
_ENDLESS = re.compile(r"\S{1000,}")
"""Something that was given as a name, and is none: its beginning tells enough."""
_NO_DATA = re.compile(r"(data\.(?:test_)?path) '[^']*': no such file")


def _cure(arguments: argparse.Namespace, error: str) -> str:
    """What a refusal's sentence ends with where an argument of this command puts it right; empty elsewhere."""
    if getattr(arguments, "imports", None) == [] and _OWN.search(error):
        return "; one of your own needs --import FILE.py"
    lost = _NO_DATA.search(error)
    given = [*getattr(arguments, "overrides", ()), *getattr(arguments, "grid", ())]
    if lost and not any(word.startswith(f"{lost[1]}=") for word in given):
        return "; give data.path=... and data.test_path=... here, or correct the configuration"
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
    return make_parser(_version, _ACTIONS)


def _import_own(arguments: argparse.Namespace) -> None:
    """Import what ``--import`` names; a sweep does so itself, as its cells' processes must too."""
    if arguments.imports:
        from fedsim.sweeps.fork_host import import_user_modules

        import_user_modules(arguments.imports)


def _version() -> str:
    from importlib import metadata

    try:
        return f"fedsim {metadata.version('fedspine-sim')}"
    except metadata.PackageNotFoundError:
        return "fedsim (not installed)"


def _run(arguments: argparse.Namespace) -> None:
    from fedsim.errors import ConfigError
    from fedsim.runner.config import parse_overrides

    overrides = parse_overrides(arguments.overrides)
    draws = arguments.profile_error
    if draws is not None and draws < 1:
        raise ConfigError(f"--profile-error: value {draws} is not allowed (at least 1)")
    if not arguments.quiet:
        print("fedsim: reading the configuration", file=sys.stderr, flush=True)
    from fedsim.runner.run import default_directory, run

    _import_own(arguments)
    out = arguments.out or default_directory(arguments.config, overrides)
    options: dict[str, Any] = {"resume": arguments.resume, "force": arguments.force, "quiet": arguments.quiet}
    result = run(arguments.config, out=out, **options, **overrides)
    print(result.summary())
    if draws is not None:
        from fedsim.study.profile_error import time_again

        time_again(result.path, draws, print)


def _sweep(arguments: argparse.Namespace) -> int:
    from fedsim.runner.config import parse_overrides
    from fedsim.sweeps.cells import parse_grid
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
    from fedsim.errors import ConfigError
    from fedsim.records.reader import find_runs
    from fedsim.study.choose import choose_runs, whole_runs
    from fedsim.study.compare import compare
    from fedsim.sweeps.notes import sweep_notes

    _import_own(arguments)
    damaged: list[str] = []
    runs = whole_runs(choose_runs(find_runs(arguments.directories, damaged), arguments.where), damaged)
    notes = [*sweep_notes(arguments.directories), *damaged]
    comparison = compare(runs, arguments.target_accuracy, arguments.baseline, notes)
    paths = []
    if arguments.out is not None:
        from fedsim.file_set import publishing
        from fedsim.plots import write_figures

        # Before the table: what is refused here (a round that is not there) is then all that is said.
        with publishing(arguments.out) as staging:
            paths = write_figures(runs, staging, arguments.round, list(comparison.rows["method"]))
            paths += _write_speedups(comparison, staging)
    elif arguments.round is not None:
        raise ConfigError("--round chooses the round of a figure, and no figures are drawn without --out DIR")
    from fedsim.study.draw_bands import draw_bands, draw_text
    from fedsim.study.energy_note import energy_note

    bands = draw_bands(runs, comparison.target_accuracy)
    if arguments.json:
        print(json.dumps(comparison.as_dict() | ({"profile_error": bands} if bands else {}), indent=2))
    else:
        more = [draw_text(bands)] if bands else []
        note = energy_note(runs)
        print("\n".join([comparison.as_text(), *([note] if note else []), *more]))
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

    written = list[Path]()
    draw_speedups(
        speedups(comparison),
        comparison.speedup_title(),
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
    from fedsim.study.fit_surrogate import fit_surrogate, fit_text

    _import_own(arguments)
    print(fit_text(fit_surrogate(arguments.run, arguments.out)))
    print(f"written to {arguments.out}; use it with train.engine=surrogate train.surrogate={arguments.out}")


def _export(arguments: argparse.Namespace) -> None:
    from fedsim.study.export_run import check_export, export_run

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


def _check(arguments: argparse.Namespace) -> int:
    from fedsim.study.check_run import check_run

    _import_own(arguments)
    found = check_run(arguments.run)
    print(found.as_text())
    return 0 if found.is_sound else 1


def _bench(arguments: argparse.Namespace) -> None:
    from fedsim.bench.all_sections import bench
    from fedsim.bench.options import Options
    from fedsim.bench.report_text import report_text

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
        tuning=_tuning(arguments),
        lora_rank=8 if arguments.lora_rank is None else arguments.lora_rank,
        lora_roles=_lora_roles(arguments),
        adapter_width=arguments.adapter_width,
        train_top_layers=arguments.train_top_layers,
        prune_ratio=arguments.prune_ratio,
        precision=arguments.precision,
        causal_lm=arguments.causal_lm,
        micro_batches=arguments.micro_batches,
        checkpointing=arguments.checkpointing,
        dropout=not arguments.no_dropout,
        cached_activations=arguments.cached_activations,
        optimizer=arguments.optimizer,
    )
    print(json.dumps(figures, indent=2) if arguments.json else estimate_text(figures))


def _tuning(arguments: argparse.Namespace) -> str:
    if arguments.adapter_width is not None:
        return "adapter"
    return "full" if arguments.full else "inference" if arguments.inference else "lora"


def _lora_roles(arguments: argparse.Namespace) -> frozenset[str] | None:
    """Roles of ``--lora-targets``, which takes names of Linears (``q_proj``) and roles (``query``)."""
    if arguments.lora_targets is None:
        return None
    from fedsim.cost.setting import linear_roles
    from fedsim.cost.shapes import load_shape
    from fedsim.errors import ConfigError
    from fedsim.learn.model.linears import target_linears

    if _tuning(arguments) != "lora":
        raise ConfigError(f"--lora-targets {arguments.lora_targets} is only allowed where LoRA is tuned")
    shape = load_shape(arguments.model, labels=0 if arguments.causal_lm else 2)
    names = [name for name in arguments.lora_targets.split(",") if name]
    roles = {name for name in names if name in linear_roles(shape)}
    named = [name for name in names if name not in roles]
    if named:
        roles |= {linear.role.value for linear in target_linears(shape, named)}
    return frozenset(roles)


def _validate(arguments: argparse.Namespace) -> None:
    from fedsim.cost.describe import validation_text
    from fedsim.cost.validate import validate

    result = validate(arguments.profile, arguments.log)
    print(json.dumps(result.as_dict(), indent=2) if arguments.json else validation_text(result))
    if arguments.page is not None:
        from fedsim.report.fidelity_page import write_fidelity_page

        for path in write_fidelity_page(result, arguments.page):
            print(f"written to {path}", file=sys.stderr)


def _calibrate(arguments: argparse.Namespace) -> None:
    from fedsim.bench.calibrate_host import calibrate_host, calibrate_log

    if arguments.log is not None:
        print(calibrate_log(arguments.log, arguments.out).as_text())
        return

    def say(text: str) -> None:
        print(f"fedsim: {text}", file=sys.stderr, flush=True)

    result = calibrate_host(arguments.out, arguments.torch_device, arguments.threads, arguments.check, say)
    print(result.as_text())


def _retime(arguments: argparse.Namespace) -> None:
    from fedsim.records.reader import load
    from fedsim.study.retime import retime_run

    _import_own(arguments)
    path = retime_run(load(arguments.run), arguments.out, arguments.fleet, arguments.mode, arguments.links)
    print(load(path).summary())


_ACTIONS: dict[str, Action] = {
    "run": _run,
    "sweep": _sweep,
    "compare": _compare,
    "report": _report,
    "fit-surrogate": _fit_surrogate,
    "export": _export,
    "check": _check,
    "bench": _bench,
    "devices": _devices,
    "estimate": _estimate,
    "validate": _validate,
    "calibrate": _calibrate,
    "retime": _retime,
}


if __name__ == "__main__":
    sys.exit(main())
