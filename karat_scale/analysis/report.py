"""The HTML report: one file that opens offline, with every figure inside and every text escaped."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from karat_scale.analysis.output import Written
from karat_scale.files import write_atomically
from karat_scale.html_page import render_page

TITLES = {
    "spectrum": "Spectral behaviour",
    "content": "What S depends on",
    "maps": "Attention maps",
    "functions": "Learned functions",
    "distributions": "Weight distributions",
    "landscape": "Loss landscape and optimizer path",
}


@dataclass(frozen=True)
class RunSummary:
    """The report's information about a run; facts are shown unchanged."""

    label: str
    facts: Mapping[str, str]


@dataclass(frozen=True)
class Problem:
    """An analysis that was not possible."""

    analysis: str
    label: str
    message: str


def write_report(
    path: Path,
    runs: Sequence[RunSummary],
    written: Mapping[str, Mapping[str, Written]],
    problems: Sequence[Problem],
) -> None:
    """Write the report.

    Args:
        written: by analysis, then by the run's label.
    """
    page = render_page(
        "karat_scale.analysis", "report.html.j2", runs=runs, written=written, problems=problems, titles=TITLES
    )
    write_atomically(path, page)
