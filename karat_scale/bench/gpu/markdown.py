"""The report as a section of docs/benchmarks.md."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from karat_scale.bench.gpu.sections import KERNELS, SECTIONS, Section

TOPIC = "topic"


def markdown(report: Mapping[str, Any]) -> str:
    """Of what is in the JSON, finished or not."""
    machine = report["machine"]
    lines = [f"### {machine.get('card', 'no card yet')}", "", _about(report, machine), ""]
    for name, found in report["sections"].items():
        lines += [f"#### {SECTIONS[name].title}", ""]
        if found["rows"]:
            lines += [*_section_table(SECTIONS[name], found["rows"]), ""]
        lines += [f"- {line}" for line in _remarks(found)]
        lines += [""] if lines[-1] else []
    return "\n".join(lines)


def cell(value: Any) -> str:
    """A figure to three digits at least; what is not there is a dash."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.1e}" if 0 < abs(value) < 1e-2 else f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"


def _about(report: Mapping[str, Any], machine: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items())
    parts = [f"`{report['command']}`, {report['started']}, karat_scale {report['karat_scale']}"]
    if machine.get("driver"):
        parts.append(f"driver {machine['driver']}, CUDA {machine['cuda']}, cuDNN {machine['cudnn']}")
    if machine.get("cards", 1) > 1:
        parts.append(f"{machine['cards']} cards")
    if versions:
        parts.append(versions)
    if not report["finished"]:
        parts.append("**not finished**")
    return "; ".join(parts) + "."


def _section_table(section: Section, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if section is not KERNELS:
        return _table(section.columns, rows)
    lines = ["Calls that are right, and the largest of their errors over what is allowed:", "", *_summary(rows)]
    wrong = [row for row in rows if not row["right"]]
    return [*lines, "", "Wrong:", "", *_table(section.columns, wrong)] if wrong else lines


def _summary(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each topic and a column for each dtype; the figures of each call are in the JSON."""
    groups: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for row in rows:
        groups.setdefault(row[TOPIC], {}).setdefault(row["dtype"], []).append(row)
    dtypes = dict.fromkeys(row["dtype"] for row in rows)
    cells = [{TOPIC: topic, **{dtype: _summed_up(of[dtype]) for dtype in of}} for topic, of in groups.items()]
    return _table([(TOPIC, "what varies"), *((dtype, dtype) for dtype in dtypes)], cells)


def _summed_up(rows: Sequence[Mapping[str, Any]]) -> str:
    shares = [row["error"] / row["tolerance"] for row in rows if row["error"] is not None]
    right = f"{sum(row['right'] for row in rows)} of {len(rows)}"
    return f"{right}, {max(shares):.2f}" if len(shares) == len(rows) else f"{right}, not finite"


def _table(columns: Sequence[tuple[str, str]], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Columns that no row has are left out."""
    shown = [(key, heading) for key, heading in columns if any(row.get(key) is not None for row in rows)]
    lines = [f"| {' | '.join(heading for _, heading in shown)} |", f"|{'---|' * len(shown)}"]
    return lines + [f"| {' | '.join(cell(row.get(key)) for key, _ in shown)} |" for row in rows]


def _remarks(found: Mapping[str, Any]) -> Iterator[str]:
    yield from found["notices"]
    for kind, word in (("left_out", "Left out"), ("failed", "FAILED")):
        for one in found[kind]:
            why = one["why"].splitlines()
            yield f"{word}: {one['what']}: {why[0]}" + (f" ... {why[-1]}" if len(why) > 1 else "")
