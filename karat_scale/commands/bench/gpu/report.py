"""The report of `karat bench gpu`: its sections and their results, on the terminal, as JSON and as Markdown.

A section has a place in the order, a share of the time, needs and tables. The Markdown is a section of
docs/benchmarks.md. The command's options are here, too. This module imports no torch.
"""

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from karat_scale import __version__
from karat_scale.foundation.arguments import new_file, positive
from karat_scale.foundation.console import write_json
from karat_scale.foundation.files import write_atomically


@dataclass(frozen=True)
class Section:
    """One part of the report; its figures come from `place`, a function of this package.

    Args:
        title: the title of its table.
        share: its share of the time that is left, relative to those of the later sections that can run.
        table: the columns, each as the key of a row, and its heading if that differs.
        packages: the packages that it needs besides torch.
        ranks: whether a process runs on each card.
        decides: whether it decides if training is right.
    """

    name: str
    title: str
    share: float
    table: str
    place: str
    packages: tuple[str, ...] = ()
    ranks: bool = False
    decides: bool = False

    @property
    def columns(self) -> list[tuple[str, str]]:
        """The key of a row and the heading of each column."""
        parts = (column.partition("=") for column in self.table.split("|"))
        return [(key.strip(), heading.strip() or key.strip()) for key, _, heading in parts]


_TRAINER = ("timm", "deepspeed", "pydantic", "torchvision", "rich", "psutil", "yaml")
LOSSES = Section(
    "losses",
    "Losses of 20 steps against fp32 on the CPU",
    6.0,
    "mode | difference = largest difference | allowed | losses = same losses | skips = skips a NaN | "
    "twice = same bits twice | resumes = and resumed | linear_dtype = linear layers in | "
    "operator_dtype = operator in | right",
    place="losses:measure",
    packages=_TRAINER,
    decides=True,
)
KERNELS = Section(
    "kernels",
    "Kernels against the float64 reference and a plain formula",
    1.5,
    "call | error = relative error | worst = of | formula_error = against the formula | tolerance = allowed | right",
    place="kernels:measure",
    decides=True,
)
ATTENTION = Section(
    "attention",
    "Attention against every backend of SDPA",
    2.0,
    "case | attention | forward_ms = forward, ms | both_ms = and backward, ms | ratio_forward = forward to SDPA | "
    "ratio_both = and backward to SDPA | ratio_best = to the fastest SDPA | "
    "forward_wall_ms = forward by the clock, ms | both_wall_ms = and backward by the clock, ms | peak_mb = peak, MB",
    place="attention:measure",
)
RANKS = Section(
    "ranks",
    "ZeRO stages against DistributedDataParallel",
    1.5,
    "case | contender | milliseconds_a_step = ms a step | images_per_second = images/s | ratio_to_ddp = to DDP | "
    "difference = losses differ from DDP's by | allowed | right",
    place="steps:measure_stages",
    packages=_TRAINER,
    ranks=True,
)
# Sections on whether the card can be trusted come first, then sections on how fast it is.
_ORDER = (
    LOSSES,
    replace(LOSSES, name="rank_losses", title=f"{LOSSES.title}, a rank a card", share=4.0, ranks=True),
    KERNELS,
    ATTENTION,
    Section(
        "training",
        "Training steps through our loop and DeepSpeed",
        4.0,
        "model | mode | attention | batch | images_per_second = images/s | ratio_to_softmax = to softmax | mfu = MFU | "
        "peak_mb = peak, MB | launches = launches a step | kernels = kernels a step | waits = waits for the device",
        place="steps:measure_attention",
        packages=_TRAINER,
    ),
    Section(
        "loader",
        "Loading JPEGs",
        1.0,
        "loader | images_per_second = images/s | ratio = to the first",
        place="loader:measure",
        packages=_TRAINER,
    ),
    RANKS,
)
SECTIONS = {section.name: section for section in _ORDER}
DEFAULT_FILE = "karat_bench_gpu.json"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: toy sizes, to try the command")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="run only these sections")
    parser.add_argument("--minutes", type=positive, default=10.0, help="for all sections (default: 10)")
    parser.add_argument(
        "--json", type=new_file, metavar="FILE", help="file of all figures (default: karat_bench_gpu.json)"
    )


TOPIC = "topic"
# The number of wrong checks that the verdict names.
NAMED = 3


def markdown(report: Mapping[str, Any]) -> str:
    """Return the Markdown of a report, finished or not."""
    machine, card = report["machine"], report["machine"].get("card", "no card yet")
    versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items())
    about = [
        f"`{report['command']}`, {report['started']}, karat_scale {report['karat_scale']}",
        "driver {driver}, CUDA {cuda}, cuDNN {cudnn}".format_map(machine) if machine.get("driver") else "",
        f"{machine['cards']} cards" if machine.get("cards", 1) > 1 else "",
        versions,
        "a slice of a card (MIG), whose peak is not known, so there is no MFU" if " MIG " in card else "",
        "" if report["finished"] else "**not finished**",
    ]
    lines = [f"### {card}: {report['verdict']}", "", f"{'; '.join(filter(None, about))}.", ""]
    for name, found in report["sections"].items():
        lines += [f"#### {SECTIONS[name].title}", ""]
        if found["rows"] and name == KERNELS.name:
            wrong = [row for row in found["rows"] if not row["right"]]
            lines += ["Calls that are right, and the largest of their errors over what is allowed:", ""]
            lines += [*_summary(found["rows"]), ""]
            lines += ["Wrong:", "", *_table(KERNELS.columns, wrong), ""] if wrong else []
        elif found["rows"]:
            lines += [*_table(SECTIONS[name].columns, found["rows"]), ""]
        lines += [f"- {line}" for line in _remarks(found)]
        lines += [""] if lines[-1] else []
    return "\n".join(lines)


def cell(value: Any) -> str:
    """Format a figure to at least three digits; a missing one is a dash."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.1e}" if 0 < abs(value) < 1e-2 else f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"


def verdict_of(sections: Mapping[str, Mapping[str, Any]]) -> tuple[bool | None, str]:
    """Return whether training is right (None if that is unknown), and the same in words."""
    checks = [
        (f"{name}: {row[SECTIONS[name].columns[0][0]]}", row["right"])
        for name, found in sections.items()
        for row in found["rows"]
        if "right" in row
    ]
    deciding = [(name, found) for name, found in sections.items() if SECTIONS[name].decides]
    failed = {f"{name}: {one['what']}" for name, found in deciding for one in found["failed"]}
    checks += [(what, False) for what in sorted(failed - {what for what, _ in checks})]
    wrong = [what for what, right in checks if not right]
    if wrong:
        more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        return False, f"WRONG in {len(wrong)} of {len(checks)} checks: {'; '.join(wrong[:NAMED])}{more}"
    if not any(found["rows"] for name, found in deciding if SECTIONS[name].place == LOSSES.place):
        return None, f"it is not known whether training is right{f'; {len(checks)} other checks are' if checks else ''}"
    if any(one.get("late") for _, found in deciding for one in found["left_out"]):
        return None, f"right in {len(checks)} checks, but others were left out for lack of time or memory"
    return True, f"training is right in all {len(checks)} checks"


def _summary(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each topic and a column for each dtype; the JSON has the figures of each call."""
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
    """Return the lines of a table without its empty columns."""
    shown = [(key, heading) for key, heading in columns if any(row.get(key) is not None for row in rows)]
    lines = [f"| {' | '.join(heading for _, heading in shown)} |", f"|{'---|' * len(shown)}"]
    return lines + [f"| {' | '.join(cell(row.get(key)) for key, _ in shown)} |" for row in rows]


def _remarks(found: Mapping[str, Any]) -> Iterator[str]:
    yield from found["notices"]
    for kind, word in (("left_out", "Left out"), ("failed", "FAILED")):
        for one in found[kind]:
            why = one["why"].splitlines()
            yield f"{word}: {one['what']}: {why[0]}" + (f" ... {why[-1]}" if len(why) > 1 else "")


class Report:
    """Keeps the JSON file `path` and the Markdown next to it up to date."""

    def __init__(self, path: Path, command: str) -> None:
        self._path = path
        self._begun = time.monotonic()
        self._data: dict[str, Any] = {
            "verdict": "",
            "right": None,
            "command": command,
            "karat_scale": __version__,
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "finished": False,
            "machine": {},
            "sections": {},
        }

    def write(self) -> None:
        """Write both files."""
        self._data["right"], self._data["verdict"] = verdict_of(self._data["sections"])
        write_json(self._path, self._data)
        write_atomically(self._path.with_suffix(".md"), markdown(self._data))

    def begin(self, section: Section) -> None:
        """Start a section; the events that follow belong to it."""
        self._section, self._section_begun = section, time.monotonic()
        self.running = "the section"  # the part that its process runs now, as reported
        self._now: dict[str, Any] = {"rows": [], "notices": [], "left_out": [], "failed": []}
        self._data["sections"][section.name] = self._now

    def end(self) -> None:
        """End the section."""
        self._now["seconds"] = round(time.monotonic() - self._section_begun, 1)
        self.write()

    def receive(self, kind: str, content: Any) -> None:
        """Add an event of a worker."""
        if kind == "machine" and not self._data["machine"]:
            self._data["machine"] = content
            versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
            print(f"{content['card']}, {versions}", flush=True)
        elif kind == "begin":
            self.running = content
        elif kind == "row":
            self._now["rows"].append(content)
            (first, _), *others = self._section.columns
            figures = [f"{heading} {cell(content[key])}" for key, heading in others if key in content]
            self._print(", ".join([cell(content.get(first)), *figures]))
        elif kind == "notice":
            self._now["notices"].append(content)
            self._print(content)
        elif kind in ("left_out", "failed"):
            self._now[kind].append(content)
            self._print(f"{kind.replace('_', ' ')}: {content['what']}: {content['why']}")
        self.write()

    def finish(self) -> int:
        """Print where the files are; return the command's exit code."""
        failures = sum(len(section["failed"]) for section in self._data["sections"].values())
        code = int(failures > 0 or verdict_of(self._data["sections"])[0] is False)
        self._data.update(finished=True, exit=code)
        self.write()
        print(f"{self._data['verdict']}; {failures} failures", flush=True)
        print(f"{self._path} and {self._path.with_suffix('.md')}", flush=True)
        return code

    def _print(self, text: str) -> None:
        print(f"[{time.monotonic() - self._begun:4.0f} s] {self._section.name}: {text}", flush=True)
