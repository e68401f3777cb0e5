"""An analysis's files: figures as PNG and SVG, numbers as JSON, arrays as npz; each whole or not there."""

import io
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from karat_scale.analysis.result import Result, Table
from karat_scale.files import write_atomically

DPI = 130


@dataclass(frozen=True)
class WrittenFigure:
    """One figure on disk. `png` is its bytes, for the report."""

    name: str
    caption: str
    png: bytes
    path: Path


@dataclass(frozen=True)
class Written:
    """One analysis of one run, on disk."""

    figures: list[WrittenFigure]
    tables: list[Table]
    notes: list[str]


def write_result(result: Result, directory: Path) -> Written:
    """Write everything into `directory`, which is made: NAME.png, NAME.svg, numbers.json, arrays.npz."""
    directory.mkdir(parents=True, exist_ok=True)
    figures = []
    for name, (figure, caption) in result.figures.items():
        figure = figure if isinstance(figure, Figure) else figure()
        png = _render(figure, "png")
        path = directory / f"{safe_name(name)}.png"
        write_atomically(path, png)
        write_atomically(path.with_suffix(".svg"), _render(figure, "svg"))
        figures.append(WrittenFigure(name, caption, png, path))
    numbers = {**result.numbers, "notes": result.notes}
    write_atomically(directory / "numbers.json", json.dumps(_plain(numbers), indent=2) + "\n")
    content = io.BytesIO()
    np.savez_compressed(content, **result.arrays)  # type: ignore[arg-type]
    write_atomically(directory / "arrays.npz", content.getvalue())
    return Written(figures, result.tables, result.notes)


def safe_name(text: str) -> str:
    """A name that any file system takes."""
    return re.sub(r"[^\w.-]+", "_", text).strip(".") or "unnamed"


def _render(figure: Figure, kind: str) -> bytes:
    content = io.BytesIO()
    # Without the date, equal numbers give equal files.
    figure.savefig(content, format=kind, dpi=DPI, metadata={"Date": None} if kind == "svg" else None)
    return content.getvalue()


def _plain(value: Any) -> Any:
    """JSON has no nan and no infinity: None."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
