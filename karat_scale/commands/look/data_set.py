"""`karat data PATH`: what a data set holds. Counts are of all images; sizes and colours of a sample of them.

Its page is one HTML file that opens offline, with every text escaped.
"""

import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from karat_scale.commands.analyze.figures import new_figure, rendered
from karat_scale.commands.look.split_facts import Split, SplitFacts, examine
from karat_scale.data.decoders.decode import UndecodableImageError, decode_rgb
from karat_scale.data.loading.assemble import PreparesSamples
from karat_scale.data.shards.beton import BetonSplit
from karat_scale.data.shards.folder import FolderSplit
from karat_scale.data.shards.shard_format import DATASET_FILE, dataset_directory, read_dataset_record
from karat_scale.data.shards.shards import ShardSplit
from karat_scale.foundation.console import print_table, printable, write_json
from karat_scale.foundation.errors import DataError
from karat_scale.foundation.files import write_atomically
from karat_scale.foundation.html_page import render_page

Pictures = Mapping[str, Mapping[str, Sequence[bytes]]]
"""Small JPEGs by split and class."""


def write_page(path: Path, place: str, splits: Sequence[SplitFacts], pictures: Pictures) -> None:
    """Write the page. Raises DataError if the file cannot be written."""
    charts = {one.name: _charts(one) for one in splits}
    page = render_page(
        "karat_scale.commands.look", "data.html.j2", place=place, splits=splits, pictures=pictures, charts=charts
    )
    try:
        write_atomically(path, page)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}; choose another --out") from error


def _charts(facts: SplitFacts) -> bytes:
    """Return histograms of the sampled sizes and of the classes' sizes, as a PNG."""
    figure = new_figure(12, 2.6)
    left, middle, right = figure.subplots(1, 3)
    if len(facts.sizes):
        left.scatter(facts.sizes[:, 0], facts.sizes[:, 1], s=4, alpha=0.4)
        middle.hist(facts.sizes[:, 0] / facts.sizes[:, 1], bins=40)
    left.set(xlabel="width", ylabel="height", title="pixels")
    middle.set(xlabel="width / height", ylabel="images", title="aspect ratio")
    right.plot(sorted(facts.per_class.values(), reverse=True))
    right.set(xlabel="class, largest first", ylabel="images", title="images of a class", ylim=(0, None))
    return rendered(figure, dpi=110)


_MOST_CLASSES = 10**9
_FOLDERS = ("train", "val", "test", "valid", "validation")


def look_at_data(path: str, sampled: int, classes_shown: int, out: str | None, json_file: str | None) -> int:
    """Print what a data set holds and write an HTML page; returns the exit code.

    Args:
        sampled: images of each split whose sizes are read.
        classes_shown: classes of which the page has pictures.

    Raises:
        DataError: there is no data set at the path, or it is damaged.
    """
    directory = dataset_directory(path)
    facts, pictures = [], {}
    for name, open_split in open_splits(directory).items():
        split = open_split()
        try:
            ids = np.linspace(0, len(split) - 1, min(sampled, len(split))).round().astype(int)
            facts.append(examine(name, split, ids))
            pictures[name] = _pictures(split, classes_shown)
        finally:
            split.close()
    write_json(json_file, {one.name: one.numbers() for one in facts})
    for one in facts:
        _print_split(one)
    page = Path(out) if out else Path("" if isinstance(directory, str) else directory) / "data.html"
    write_page(page, str(directory), facts, pictures)
    print(f"\n{page}")
    return 0


def open_splits(directory: Path | str) -> dict[str, Callable[[], Split]]:
    """Return what opens each split of shards, betons or an image folder. Raises DataError."""
    if isinstance(directory, str) or (directory / DATASET_FILE).is_file():
        record = read_dataset_record(directory)
        names = [name for name, split in record.splits.items() if split.samples]
        return {name: partial(ShardSplit, directory, name, _MOST_CLASSES) for name in names}
    if betons := sorted(path.stem for path in directory.glob("*.beton")):
        return {name: partial(BetonSplit, directory, name, _MOST_CLASSES) for name in betons}
    folders = [name for name in _FOLDERS if (directory / name).is_dir()]
    if not folders:
        raise DataError(f"{directory} is no data set: no {DATASET_FILE}, no *.beton, no folder {' or '.join(_FOLDERS)}")
    return {name: partial(FolderSplit, directory, name, _MOST_CLASSES) for name in folders}


def _pictures(split: Split, classes_shown: int, each: int = 6) -> dict[str, list[bytes]]:
    """Return some images of the first classes, as small JPEGs."""
    pictures: dict[str, list[bytes]] = {}
    ids = [np.flatnonzero(split.labels == label)[:each].tolist() for label in range(len(split.classes[:classes_shown]))]
    if isinstance(split, PreparesSamples):
        split.prepare(itertools.chain(*ids))
    for numbers, name in zip(ids, split.classes, strict=False):
        shown: list[bytes] = []
        for number in numbers:
            try:
                small = decode_rgb(split.read(number), at_least=(96, 96))
            except UndecodableImageError:
                continue  # among the odd ones, if it was sampled
            small.thumbnail((96, 96))
            content = io.BytesIO()
            small.save(content, "JPEG", quality=80)
            shown.append(content.getvalue())
        pictures[printable(name)] = shown
    return pictures


def _print_split(facts: SplitFacts) -> None:
    numbers = facts.numbers()
    empty: object = numbers["empty_classes"]
    assert isinstance(empty, list)
    counts = (
        f"\n{facts.name}: {facts.images:,} images of {numbers['classes']} classes, {numbers['smallest_class']} to "
        f"{numbers['largest_class']} each"
    )
    print(printable(counts + (f"; without images: {', '.join(empty[:5])}" if empty else "")))
    names = ("width", "height", "aspect_ratio", "bytes")
    rows = [
        [name.replace("_", " "), *(f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in _as_dict(numbers[name]).values())]
        for name in names
    ]
    rows = [row for row in rows if len(row) > 1]
    print_table(f"of {numbers['sampled']} sampled images", ["", "smallest", "5 %", "median", "95 %", "largest"], rows)
    print("  " + ", ".join(f"{count} {kind}" for kind, count in facts.kinds.most_common()))
    for key, what in facts.odd[:10]:
        print(printable(f"  odd: {key}: {what}"))
    if len(facts.odd) > 10:
        print(f"  and {len(facts.odd) - 10} more odd images; the page lists them")


def _as_dict(value: object) -> dict[str, float]:
    assert isinstance(value, dict)
    return value
