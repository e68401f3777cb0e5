"""An analysis's files: figures as PNG and SVG, numbers as JSON, arrays as npz. Each is written atomically.

`shown.json` holds the other contents of the report, so that a later report can show them again.
"""

import io
import json
import math
import re
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from karat_scale.commands.analyze.figures import rendered
from karat_scale.commands.analyze.result import Result, Settings, Table, Tile
from karat_scale.foundation.files import make_folder, parse_json, read_image, read_text, replace_file

SHOWN = "shown.json"


@dataclass(frozen=True)
class WrittenFigure:
    """One figure on disk. `svg` is its bytes, for the report."""

    name: str
    caption: str
    svg: bytes
    path: Path


@dataclass(frozen=True)
class Written:
    """One analysis of one run, on disk. `earlier` is True if an earlier command wrote it."""

    figures: list[WrittenFigure]
    tables: list[Table]
    notes: list[str]
    galleries: dict[str, list[Tile]] = field(default_factory=dict)
    earlier: bool = False


def write_result(result: Result, directory: Path, fingerprint: str, settings: Settings | None = None) -> Written:
    """Write everything into `directory`, which is created: NAME.png, NAME.svg, numbers.json, arrays.npz, shown.json.

    Args:
        fingerprint: of the analysed run; `read_written` requires the same one.
        settings: hears of the progress.
    """
    make_folder(directory)
    (directory / SHOWN).unlink(missing_ok=True)  # until all files that it lists exist
    figures = []
    for number, (name, (figure, caption)) in enumerate(result.figures.items(), start=1):
        figure = figure if isinstance(figure, Figure) else figure()
        path, svg = directory / f"{safe_name(name)}.png", rendered(figure, "svg")
        replace_file(path, rendered(figure, "png"))
        replace_file(path.with_suffix(".svg"), svg)
        figures.append(WrittenFigure(name, caption, svg, path))
        if settings:
            settings.progress("draw figures", number, len(result.figures))
    if result.galleries:
        make_folder(directory / "pictures")
    for tiles in result.galleries.values():
        for tile in tiles:
            replace_file(_picture(directory, tile.name), tile.png)
    numbers = {**result.numbers, "notes": result.notes}
    replace_file(directory / "numbers.json", json.dumps(_plain(numbers), indent=2) + "\n")
    content = io.BytesIO()
    np.savez_compressed(content, **result.arrays)  # type: ignore[arg-type]
    replace_file(directory / "arrays.npz", content.getvalue())
    shown = {
        "fingerprint": fingerprint,
        "figures": [[figure.name, figure.caption] for figure in figures],
        "tables": [asdict(table) for table in result.tables],
        "galleries": {title: [[tile.name, tile.lines] for tile in tiles] for title, tiles in result.galleries.items()},
        "notes": result.notes,
    }
    replace_file(directory / SHOWN, json.dumps(_plain(shown)) + "\n")
    return Written(figures, result.tables, result.notes, result.galleries)


def read_written(directory: Path, fingerprint: str) -> Written | None:
    """Read what `write_result` wrote to `directory`. None if it is missing, incomplete or of another fingerprint."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        shown = parse_json(read_text(directory / SHOWN))
        if shown["fingerprint"] == fingerprint:
            paths = [directory / f"{safe_name(name)}.png" for name, _ in shown["figures"]]
            figures = [
                WrittenFigure(name, caption, read_image(path.with_suffix(".svg")), path)
                for (name, caption), path in zip(shown["figures"], paths, strict=True)
            ]
            galleries = {
                title: [Tile(name, lines, read_image(_picture(directory, name))) for name, lines in tiles]
                for title, tiles in shown["galleries"].items()
            }
            tables = [Table(**table) for table in shown["tables"]]
            return Written(figures, tables, shown["notes"], galleries, earlier=True)
    return None


def safe_name(text: str) -> str:
    """Return a name that any file system accepts."""
    return re.sub(r"[^\w.-]+", "_", text).strip(".") or "unnamed"


def _picture(directory: Path, name: str) -> Path:
    return directory / "pictures" / f"{safe_name(name)}.png"


def _plain(value: Any) -> Any:
    """Replace nan and infinity by None, since JSON has neither."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
