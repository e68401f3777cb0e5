"""Shared code of the scripts: their options, their progress display and their exit codes."""

import argparse
import errno
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from karat_scale.arguments import OneLineParser, count
from karat_scale.data.formats.shard_format import OddRecord, SkippedRecord
from karat_scale.errors import DataError, UserError
from karat_scale.machine import usable_cores

PLAIN_LINE_SECONDS = 10.0
LISTED = 5


def make_parser(description: str, writes: bool = True) -> OneLineParser:
    """Return a parser with the options of every script, or of every script that writes."""
    parser = OneLineParser(description=description, allow_abbrev=False)
    if not writes:
        return parser
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to write to")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and write nothing")
    return parser


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of scripts that convert a source."""
    parser.add_argument("--src", type=Path, required=True, metavar="DIR", help="the directory of the images")
    parser.add_argument("--split", metavar="NAME", help="make only this split (default: all)")
    parser.add_argument("--workers", type=count, default=usable_cores(), metavar="N", help="processes (default: cores)")


def add_choice_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that select and order a source's images, and that say what to do with odd ones."""
    parser.add_argument("--seed", type=int, default=0, help="seed of the order in the output (default 0)")
    parser.add_argument("--subset", type=count, metavar="N", help="only N images of each class, drawn by the seed")
    parser.add_argument(
        "--check", choices=("header", "decode"), default="header", help="read only headers, or decode every image"
    )
    parser.add_argument(
        "--on-odd",
        choices=("convert", "keep", "skip", "stop"),
        default="keep",
        help="what to do with CMYK, misnamed, EXIF-rotated, truncated images and corrupt EXIF (default keep)",
    )
    parser.add_argument(
        "--encoding",
        choices=("png", "jpeg"),
        help="encoding of images that are raw pixels: PNG, lossless, or JPEG (default png; for IDX files jpeg)",
    )
    parser.add_argument(
        "--any-hash", action="store_true", help="accept files of a published data set that have another hash"
    )
    parser.add_argument("--val-labels", type=Path, metavar="FILE", help="ImageNet's validation labels")
    parser.add_argument("--synsets", type=Path, metavar="FILE", help="`number wnid` lines for the devkit's numbers")
    parser.add_argument("--names", type=Path, metavar="FILE", help="`wnid name` lines: readable names of the classes")


def check_split_name(split: str | None) -> None:
    """Refuse a split that is not a plain name. Raises DataError."""
    if split is not None and not re.fullmatch(r"\w+", split):
        raise DataError(f"--split {split!r} is not a name; use letters, digits and _")


def check_files(options: argparse.Namespace, *names: str) -> None:
    """Refuse an option with a file that does not exist. Raises DataError."""
    for name in names:
        path = getattr(options, name)
        if path is not None and not path.is_file():
            raise DataError(f"--{name.replace('_', '-')} {path}: the file does not exist")


def list_troubles(skipped: Sequence[SkippedRecord], odd: Sequence[OddRecord], listed_in: str) -> None:
    """Print the first images that were skipped or are odd, and the file that lists all of them."""
    lines = [f"skipped {item.path}: {item.reason}" for item in skipped]
    lines += [f"{item.done} {item.path}: {item.what}" for item in odd if item.done != "skipped"]
    for line in lines[:LISTED]:
        print(f"  {line}")
    if len(lines) > LISTED:
        print(f"  ... all are listed in {listed_in}")


def add_shard_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of scripts that read finished shards."""
    parser.add_argument("--src", type=Path, required=True, metavar="DIR", help="a directory of shards")
    parser.add_argument("--split", metavar="NAME", help="use only this split (default: all)")
    parser.add_argument("--workers", type=count, default=usable_cores(), metavar="N", help="processes (default: cores)")


def run(main: Callable[[], None]) -> NoReturn:
    """Run a script: exit code 0, or 2 with one line on stderr for what the user can fix, 130 for Ctrl-C."""
    try:
        main()
    except UserError as error:
        sys.exit(_fail(str(error), 2))
    except OSError as error:
        sys.exit(_fail(_described(error), 2))
    except KeyboardInterrupt:
        sys.exit(_fail("stopped; run the same command again to resume", 130))
    sys.exit(0)


def _described(error: OSError) -> str:
    reason = error.strerror or error
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error.filename or '--out'}: {reason}; free space there and run the same command again"
    return f"{error.filename or 'the system'}: {reason}"


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


@contextmanager
def progress(what: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Show `what` advancing to `total`: a bar with rate and time left on a terminal, else an occasional line."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(unit),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(what, total=total)
            yield lambda count: bar.advance(task, count)
        return
    plain = _PlainProgress(what, total, unit)
    yield plain.advance
    plain.report()


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} {self._unit}/s" if speed else "")


class _PlainProgress:
    def __init__(self, what: str, total: int, unit: str) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._done = 0
        self._started = self._reported = time.monotonic()

    def advance(self, count: int) -> None:
        self._done += count
        if time.monotonic() - self._reported >= PLAIN_LINE_SECONDS:
            self.report()

    def report(self) -> None:
        self._reported = time.monotonic()
        rate = self._done / max(self._reported - self._started, 1e-9)
        left = (self._total - self._done) / rate if rate else 0
        print(
            f"{self._what}: {self._done} of {self._total} {self._unit}, {rate:,.0f} a second, {left:.0f} s left",
            flush=True,
        )
