"""The settings and the result of every analysis, and the pass of its images through the model.

The files of a result are figures as PNG and SVG, numbers as JSON, and arrays as npz. Each is written atomically.
`shown.json` holds the other contents of the report, so that a later report can show them again.
"""

import io
import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

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
"""From this many seconds on, the cost of work is printed."""


@dataclass(frozen=True)
class Settings(Options):
    """The options of `karat analyze`, and where an analysis works."""

    directory: Path = Path()
    """The directory of the analysis, for its result and for unfinished work."""
    eigenvalues: int = 3
    world: World = ALONE
    """The ranks that share the points of the landscape."""
    progress: Callable[[str, int, int], None] = lambda what, done, total: None
    """Called with the current work, the steps done and the total number of steps."""
    tell: Callable[[str], None] = lambda text: None
    """Called with a text on the cost of the work, before it starts."""
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


class Drawn(NamedTuple):
    """A figure that was written."""

    name: str
    caption: str
    svg: bytes


@dataclass
class Result:
    """One analysis of one run, or of all runs together.

    numbers: values of JSON's types. arrays: the data of the figures, for npz. figures: the figures by file name, each
    with a caption; a figure that is a function is drawn when it is written, since very many would not fit in memory.
    galleries: pictures by title. notes: what the reader must know about this run, such as images that could not be
    read. findings: sentences for the top of the report. svgs: the figures of a result that was read back. is_earlier:
    whether another command wrote it.
    """

    numbers: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    figures: dict[str, tuple[Figure | Callable[[], Figure], str]] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    galleries: dict[str, list[Tile]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    svgs: list[Drawn] = field(default_factory=list)
    is_earlier: bool = False

    def add_records(self, name: str, rows: list[list[Any]], title: str, columns: Mapping[str, str]) -> None:
        """Add rows as numbers, with an object for each row, and as a table if there are any.

        columns: the names of the objects' fields, each with the head of its column.
        """
        self.numbers[name] = [dict(zip(columns, row, strict=True)) for row in rows]
        if rows:
            self.tables.append(Table(title, list(columns.values()), rows))


def say_cost(settings: Settings, what: str, count: int, seconds: float, shorter: str) -> None:
    """Report what `count` equal units of work cost, from the measured time of one, if the work is long.

    shorter: a text on the options that make it shorter.
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
        for batch, _ in images.batches(images.raw(settings.batch), run.device):
            model(batch)
            done += len(batch)
            settings.progress(what, done, len(images))
    return done


SHOWN = "shown.json"


def write_result(result: Result, fingerprint: str, settings: Settings) -> None:
    """Write NAME.png, NAME.svg, numbers.json, arrays.npz and shown.json into the directory of the settings.

    fingerprint: the fingerprint of the analysed run; `read_written` requires the same one.
    """
    directory = settings.directory
    make_folder(directory)
    (directory / SHOWN).unlink(missing_ok=True)  # until all files that it lists exist
    for number, (name, (figure, _)) in enumerate(result.figures.items(), start=1):
        drawn = figure if isinstance(figure, Figure) else figure()
        svg = rendered(drawn, "svg")  # before the PNG, which has another resolution
        replace_file(directory / f"{safe_name(name)}.png", rendered(drawn, "png"))
        replace_file(directory / f"{safe_name(name)}.svg", svg)
        settings.progress("draw figures", number, len(result.figures))
    if result.galleries:
        make_folder(directory / "pictures")
    for tile in chain(*result.galleries.values()):
        replace_file(_picture(directory, tile.name), tile.png)
    replace_file(directory / "numbers.json", _json({**result.numbers, "notes": result.notes}, indent=2))
    content = io.BytesIO()
    np.savez_compressed(content, **result.arrays)  # type: ignore[arg-type]
    replace_file(directory / "arrays.npz", content.getvalue())
    shown = {
        "fingerprint": fingerprint,
        "figures": [[name, caption] for name, (_, caption) in result.figures.items()],
        "tables": [asdict(table) for table in result.tables],
        "galleries": {title: [[tile.name, tile.lines] for tile in tiles] for title, tiles in result.galleries.items()},
        "notes": result.notes,
        "findings": result.findings,
    }
    replace_file(directory / SHOWN, _json(shown))


def read_written(directory: Path, fingerprint: str) -> Result | None:
    """Read what `write_result` wrote to `directory`. None if it is missing, incomplete or of another fingerprint."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        shown = parse_json(read_text(directory / SHOWN))
        if shown["fingerprint"] == fingerprint:
            found = Result(notes=shown["notes"], findings=shown["findings"])
            for name, caption in shown["figures"]:
                found.svgs.append(Drawn(name, caption, read_image(directory / f"{safe_name(name)}.svg")))
            for title, tiles in shown["galleries"].items():
                found.galleries[title] = [
                    Tile(name, lines, read_image(_picture(directory, name))) for name, lines in tiles
                ]
            found.tables += [Table(**table) for table in shown["tables"]]
            return found
    return None


def safe_name(text: str) -> str:
    """Return a name that any file system accepts."""
    return re.sub(r"[^\w.-]+", "_", text).strip(".") or "unnamed"


def _picture(directory: Path, name: str) -> Path:
    return directory / "pictures" / f"{safe_name(name)}.png"


def _json(content: Any, indent: int | None = None) -> str:
    """Return content as JSON, which has neither nan nor infinity: they become null."""
    plain = json.loads(json.dumps(content), parse_constant=lambda _: None)
    return json.dumps(plain, indent=indent) + "\n"
