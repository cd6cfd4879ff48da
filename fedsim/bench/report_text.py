"""The report as a table for people."""

from __future__ import annotations

from itertools import groupby

from fedsim.bench.all_sections import Report
from fedsim.bench.measure import Row, Target

_HEADINGS = {
    "engines": "engines: client-rounds per second; ratios are over the faster plain PEFT loop, turn by turn,\n"
    "  by the clock and by processor time (which other processes disturb less)",
    "chunks": "chunks: the sliced engine, by clients trained together",
    "simulator": "simulator: changes of a client's state per second",
    "runs": "runs: whole timing-only runs",
    "control": "control: S-UCB",
    "memory": "memory: bytes held between rounds",
}


def report_text(report: Report) -> str:
    """Host, tables by section and case, what was checked and what was skipped."""
    lines = _host_lines(report)
    for section, rows in groupby(report.findings.rows, key=lambda row: row.section):
        lines += ["", _HEADINGS[section]]
        for case, inner in groupby(rows, key=lambda row: row.case):
            lines += [f"  {case}", *_table(list(inner))]
    checks = report.findings.checks
    if checks:
        lines += ["", f"checked before timing: {len(checks)} comparisons, all within their limits"]
        lines += [f"  {one.case}: {one.name}: {one.figure:.2g} (at most {one.limit:g})" for one in checks]
    if report.findings.skipped:
        lines += ["", "not measured"]
        lines += [f"  {one.section}, {one.case}: {one.reason}" for one in report.findings.skipped]
    missed = [row for row in report.findings.rows if row.target is not None and not row.target.met_by(row)]
    judged = sum(row.target is not None for row in report.findings.rows)
    lines += ["", f"targets: {judged - len(missed)} of {judged} met; {report.host_s:.0f} s in all"]
    return "\n".join(lines)


def _host_lines(report: Report) -> list[str]:
    host = report.host
    git = host.get("git")
    source = "installed package"
    if isinstance(git, dict):
        source = f"commit {str(git['commit'])[:12]}{', changed since' if git['dirty'] else ''}"
    versions = host["versions"]
    assert isinstance(versions, dict)
    lines = [
        f"fedsim bench, {report.options.size} size, {source}",
        f"processor: {host['processor']}, {host['cores']} cores, {_bytes(host['memory_bytes'])}, "
        f"load {host['load_average']} at the start",
        f"python {host['python']}, " + ", ".join(f"{name} {version}" for name, version in versions.items()),
    ]
    if "torch_device" in host:
        device = str(host["torch_device"])
        if "card" in host:
            device += f" ({host['card']}, {_bytes(host['card_memory_bytes'])}, CUDA {host['cuda']})"
        else:
            device += f" ({host['vector_instructions']})"
        bf16 = "yes" if host["bf16_products"] else "no"
        lines.append(f"torch device: {device}, {host['torch_threads']} thread(s), native bf16 products: {bf16}")
    return lines


def _table(rows: list[Row]) -> list[str]:
    cells = [[row.name, _value(row), _ratio(row), _target(row), row.note] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(4)]
    return [
        "    " + "  ".join([*(text.ljust(width) for text, width in zip(line, widths, strict=False)), line[4]]).rstrip()
        for line in cells
    ]


def _value(row: Row) -> str:
    if row.unit == "bytes":
        return f"{_bytes(row.value)}"
    spread = f" ({_number(row.low)} to {_number(row.high)}, {row.repeats} turns)" if row.repeats > 1 else ""
    return f"{_number(row.value)} {row.unit}{spread}"


def _ratio(row: Row) -> str:
    if row.ratio is None:
        return ""
    return f"{row.ratio:.2f}x" + ("" if row.cpu_ratio is None else f" ({row.cpu_ratio:.2f}x cpu)")


def _target(row: Row) -> str:
    if row.target is None:
        return ""
    return f"target {_limit(row.target, row.unit)}: {'met' if row.target.met_by(row) else 'NOT MET'}"


def _limit(target: Target, unit: str) -> str:
    sign, limit = (">=", target.at_least) if target.at_least is not None else ("<=", target.at_most)
    assert limit is not None  # one of the two is given
    if target.of == "ratio":
        return f"{sign} {limit:g}x"
    return f"{sign} {_bytes(limit) if unit == 'bytes' else _number(limit)}"


def _number(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _bytes(value: object) -> str:
    size = float(value)  # type: ignore[arg-type]
    for unit in ("bytes", "KB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
