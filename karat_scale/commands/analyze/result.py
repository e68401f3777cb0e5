"""What every analysis takes and returns: settings, a visit of images by the model, and figures, numbers and tables.

The files of a result are figures as PNG and SVG, numbers as JSON, and arrays as npz. Each is written atomically.
`shown.json` holds the other contents of the report, so that a later report can show them again.
"""

import io
import json
import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from torch import nn

from karat_scale.commands.analyze.analyses import Options
from karat_scale.commands.analyze.trained_run import TrainedRun, ValidationImages
from karat_scale.commands.figures import rendered
from karat_scale.engine.distributed import ALONE, World
from karat_scale.foundation.console import duration
from karat_scale.foundation.errors import UserError
from karat_scale.foundation.files import make_folder, parse_json, read_image, read_text, replace_file
from karat_scale.models.attention_matrices import Visit, watched


class NothingToShowError(UserError):
    """An analysis does not apply to this run: nothing is wrong, and the message says why."""


WORTH_TELLING = 5.0
"""Seconds of work from which its cost is told."""


@dataclass(frozen=True)
class Settings(Options):
    """The options of `karat analyze`, and where an analysis works."""

    directory: Path = Path()
    """The directory of the analysis, for what is not finished."""
    eigenvalues: int = 3
    world: World = ALONE
    """The ranks that share the points of the landscape."""
    progress: Callable[[str, int, int], None] = lambda what, done, total: None
    """Called with the current work, the steps done and the total number of steps."""
    tell: Callable[[str], None] = lambda text: None
    """Called with what work will cost, before it starts."""
    expect: Callable[[float], None] = lambda seconds: None
    """Called with the measured seconds of an analysis."""


@dataclass(frozen=True)
class Table:
    """Rows of numbers and texts for the report."""

    title: str
    columns: list[str]
    rows: list[list[Any]]


@dataclass(frozen=True)
class Tile:
    """A small picture of a gallery: a PNG and the lines below it."""

    name: str
    lines: list[str]
    png: bytes


@dataclass
class Result:
    """One analysis of one run, or of all runs together.

    numbers: values of JSON's types. arrays: the data of the figures, for npz. figures: by file name, each with a
    caption; a figure that is a function is drawn when it is written, since very many would not fit in memory.
    galleries: pictures by title. notes: what the reader must know about this run, such as images that could not be
    read. findings: sentences for the top of the report.
    """

    numbers: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    figures: dict[str, tuple[Figure | Callable[[], Figure], str]] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    galleries: dict[str, list[Tile]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)

    def add_records(self, name: str, rows: list[list[Any]], title: str, columns: Mapping[str, str]) -> None:
        """Add numbers, an object for each row, and a table of the same if there are rows.

        columns: the names of the objects' fields, each with the head of its column.
        """
        self.numbers[name] = [dict(zip(columns, row, strict=True)) for row in rows]
        if rows:
            self.tables.append(Table(title, list(columns.values()), rows))


def say_cost(settings: Settings, what: str, count: int, seconds: float, shorter: str) -> None:
    """Tell what work of `count` equal units costs, from the measured time of one, if it is long enough to wonder.

    shorter: the options that make it shorter.
    """
    settings.expect(count * seconds)
    if count * seconds > WORTH_TELLING:
        each = f"{count} x {duration(seconds)}"
        settings.tell(f"{what} takes about {duration(count * seconds)} ({each}); {shorter}")


def note_bad_images(result: Result, bad: int) -> None:
    """Note how many of the chosen images are missing in the figures."""
    if bad:
        result.notes.append(f"{bad} of the chosen images cannot be read and are left out")


@torch.no_grad()
def visit_images(
    model: nn.Module, run: TrainedRun, images: ValidationImages, settings: Settings, what: str, visit: Visit
) -> int:
    """Call `visit` for each block on each batch of images, and show the progress as `what`; return their number."""
    done = 0
    with watched(model, visit):
        for batch, _ in images.batches(settings.batch, run.device):
            model(batch)
            done += len(batch)
            settings.progress(what, done, len(images))
    return done


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
    galleries: dict[str, list[Tile]]
    findings: list[str]
    earlier: bool = False


def write_result(result: Result, fingerprint: str, settings: Settings) -> Written:
    """Write NAME.png, NAME.svg, numbers.json, arrays.npz and shown.json into the directory of the settings.

    fingerprint: of the analysed run; `read_written` requires the same one.
    """
    directory = settings.directory
    make_folder(directory)
    (directory / SHOWN).unlink(missing_ok=True)  # until all files that it lists exist
    figures = []
    for number, (name, (figure, caption)) in enumerate(result.figures.items(), start=1):
        figure = figure if isinstance(figure, Figure) else figure()
        path, svg = directory / f"{safe_name(name)}.png", rendered(figure, "svg")
        replace_file(path, rendered(figure, "png"))
        replace_file(path.with_suffix(".svg"), svg)
        figures.append(WrittenFigure(name, caption, svg, path))
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
        "findings": result.findings,
    }
    replace_file(directory / SHOWN, json.dumps(_plain(shown)) + "\n")
    return Written(figures, result.tables, result.notes, result.galleries, result.findings)


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
            return Written(figures, tables, shown["notes"], galleries, shown["findings"], earlier=True)
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
