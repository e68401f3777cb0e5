"""An analysis's files: figures as PNG and SVG, numbers as JSON, arrays as npz. Each is written atomically.

`shown.json` holds the other contents of the report, so that a later report can show them again.
"""

import io
import json
import math
import re
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from karat_scale.analysis.figures import rendered
from karat_scale.analysis.result import Result, Table
from karat_scale.console import write_json
from karat_scale.files import write_atomically

SHOWN = "shown.json"


@dataclass(frozen=True)
class WrittenFigure:
    """One figure on disk. `png` is its bytes, for the report."""

    name: str
    caption: str
    png: bytes
    path: Path


@dataclass(frozen=True)
class Written:
    """One analysis of one run, on disk. `earlier` is True if an earlier command wrote it."""

    figures: list[WrittenFigure]
    tables: list[Table]
    notes: list[str]
    earlier: bool = False


def write_result(result: Result, directory: Path, fingerprint: str) -> Written:
    """Write everything into `directory`, which is created: NAME.png, NAME.svg, numbers.json, arrays.npz, shown.json.

    Args:
        fingerprint: of the analysed run; `read_written` requires the same one.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / SHOWN).unlink(missing_ok=True)  # until all files that it lists exist
    figures = []
    for name, (figure, caption) in result.figures.items():
        figure = figure if isinstance(figure, Figure) else figure()
        png = rendered(figure, "png")
        path = directory / f"{safe_name(name)}.png"
        write_atomically(path, png)
        write_atomically(path.with_suffix(".svg"), rendered(figure, "svg"))
        figures.append(WrittenFigure(name, caption, png, path))
    numbers = {**result.numbers, "notes": result.notes}
    write_json(directory / "numbers.json", _plain(numbers))
    content = io.BytesIO()
    np.savez_compressed(content, **result.arrays)  # type: ignore[arg-type]
    write_atomically(directory / "arrays.npz", content.getvalue())
    shown = {
        "fingerprint": fingerprint,
        "figures": [[figure.name, figure.caption] for figure in figures],
        "tables": [asdict(table) for table in result.tables],
        "notes": result.notes,
    }
    write_atomically(directory / SHOWN, json.dumps(_plain(shown)) + "\n")
    return Written(figures, result.tables, result.notes)


def read_written(directory: Path, fingerprint: str) -> Written | None:
    """Read what `write_result` wrote to `directory`. None if it is missing, incomplete or of another fingerprint."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        shown = json.loads((directory / SHOWN).read_bytes())
        if shown["fingerprint"] == fingerprint:
            paths = [directory / f"{safe_name(name)}.png" for name, _ in shown["figures"]]
            figures = [
                WrittenFigure(name, caption, path.read_bytes(), path)
                for (name, caption), path in zip(shown["figures"], paths, strict=True)
            ]
            return Written(figures, [Table(**table) for table in shown["tables"]], shown["notes"], earlier=True)
    return None


def safe_name(text: str) -> str:
    """Return a name that any file system accepts."""
    return re.sub(r"[^\w.-]+", "_", text).strip(".") or "unnamed"


def _plain(value: Any) -> Any:
    """Replace nan and infinity by None, since JSON has neither."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
