"""The HTML report: one file that opens offline, with every figure inside and every text escaped."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from karat_scale import __version__
from karat_scale.analysis.output import Written
from karat_scale.files import write_atomically

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
    environment = Environment(
        loader=PackageLoader("karat_scale.analysis"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["data_uri"] = _data_uri
    environment.filters["cell"] = _cell
    environment.filters["sort_key"] = _sort_key
    page = environment.get_template("report.html.j2").render(
        runs=runs, written=written, problems=problems, titles=TITLES, version=__version__
    )
    write_atomically(path, page)


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _cell(value: Any) -> str:
    """Format a number to four figures; a dash if it is undefined."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _sort_key(value: Any) -> str:
    return "" if value is None else str(value)
