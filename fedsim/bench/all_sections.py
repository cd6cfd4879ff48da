"""All sections, and what is told of them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from fedsim.bench.controller_cost import measure_control, measure_memory
from fedsim.bench.engines import measure_chunks, measure_engines
from fedsim.bench.machine import host_facts
from fedsim.bench.measure import Findings
from fedsim.bench.options import Options
from fedsim.bench.simulator import measure_runs, measure_simulator

SCHEMA = 1
"""Version of the ``--json`` output: raised where a key changes its meaning or goes."""

Measure = Callable[[Options, Callable[[str], None]], Findings]

_MEASURES: dict[str, Measure] = {
    "engines": measure_engines,
    "chunks": measure_chunks,
    "simulator": measure_simulator,
    "runs": measure_runs,
    "control": measure_control,
    "memory": measure_memory,
}
_USES_TORCH = ("engines", "chunks", "memory")


@dataclass(frozen=True)
class Report:
    """What was measured, on what."""

    options: Options
    host: dict[str, object]
    findings: Findings
    host_s: float

    def as_dict(self) -> dict[str, object]:
        """The ``--json`` output; see ``docs/performance.md``."""
        return {
            "schema": SCHEMA,
            "host": self.host,
            "options": {
                "torch_device": self.options.torch_device,
                "size": self.options.size,
                "sections": list(self.options.asked),
                "threads": self.options.threads,
            },
            "rows": [row.as_dict() for row in self.findings.rows],
            "checks": [asdict(check) for check in self.findings.checks],
            "skipped": [asdict(one) for one in self.findings.skipped],
            "host_s": self.host_s,
        }


def bench(options: Options, say: Callable[[str], None] | None = None) -> Report:
    """Measure the sections asked for.

    Args:
        say: called with a line before each slow step; by default printed to standard error.
    Raises:
        ConfigError: a device that is not there.
        BenchError: contenders that disagree on the result.
    """
    began_s = time.perf_counter()
    tell = say or (lambda line: print(f"fedsim bench: {line}", file=sys.stderr, flush=True))
    host = host_facts()
    if any(section in _USES_TORCH for section in options.asked):
        tell("loading torch")
        from fedsim.learn.bench.contenders import check_device, device_facts, set_threads

        check_device(options.torch_device)
        set_threads(options.threads)
        host |= device_facts(options.torch_device)
    findings = Findings()
    for section in options.asked:
        findings += _MEASURES[section](options, tell)
    return Report(options, host, findings, time.perf_counter() - began_s)
