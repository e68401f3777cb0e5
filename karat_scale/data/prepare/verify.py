"""Check shards from end to end: files and hashes, labels, counts, and that every image decodes.

    python data_prep/verify.py --src DIR [--imagenet]        # DIR is a directory, or a URL

It prints every problem. If there is one, the exit code is 2, and one line on stderr has the first problem and their
number.
"""

import multiprocessing
import os
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from karat_scale.data.decoders.decode import UndecodableImageError, decode_rgb
from karat_scale.data.indexing.command import is_indexed
from karat_scale.data.indexing.samples import LabelRule, number_of, open_tar, read_samples
from karat_scale.data.prepare.job import add_shard_options, make_parser
from karat_scale.data.prepare.stage import copy_checked
from karat_scale.data.shards.shard_format import (
    INDEX_FIELDS,
    KEY,
    DatasetRecord,
    ShardRecord,
    SplitRecord,
    chosen_splits,
    read_column,
    read_columns,
    read_dataset_record,
)
from karat_scale.data.shards.shards import check_file
from karat_scale.foundation.console import progress
from karat_scale.foundation.errors import DataError, run_script

# ImageNet-1K as published: images, and the smallest and largest class.
IMAGENET_CLASSES = 1000
IMAGENET = {"train": (1_281_167, 732, 1300), "val": (50_000, 50, 50)}


def verify_shard(
    directory: Path | str, record: DatasetRecord, rule: LabelRule | None, shard: ShardRecord
) -> tuple[list[str], list[int]]:
    """Return the problems of one shard, and its number of samples of each class. One at a URL is fetched first.

    rule: where the labels are in a tar that `karat index` has indexed; None for our own shards.
    """
    tars = record.tars_of(directory)
    if isinstance(directory, Path) and isinstance(tars, Path):
        return _verify_files(directory, tars, record, rule, shard)
    with tempfile.TemporaryDirectory(prefix="karat-verify-") as scratch:
        local = Path(scratch)
        try:
            for place, file in ((directory, shard.index), (tars, shard)):
                (local / file.name).parent.mkdir(parents=True, exist_ok=True)
                copy_checked(place, local, file, lambda _: None)
        except DataError as error:
            return [str(error)], []
        problems, per_class = _verify_files(local, local, record, rule, shard)
    return [problem.replace(scratch, str(tars)) for problem in problems], per_class


def _verify_files(
    directory: Path, tars: Path, record: DatasetRecord, rule: LabelRule | None, shard: ShardRecord
) -> tuple[list[str], list[int]]:
    path, classes = tars / shard.name, len(record.classes)
    problems = []
    for place, file in ((directory, shard.index), (tars, shard)):
        try:
            check_file(place, file, by_hash=bool(file.sha256))
        except DataError as error:
            problems.append(str(error).split("; ")[0])
    if problems:
        return problems, []
    data = (directory / shard.index.name).read_bytes()
    try:
        columns = read_columns(data, INDEX_FIELDS, shard.samples, shard.bytes)
    except ValueError as error:
        return [f"{path}: its index does not fit it: {error}"], []
    keys = [key.decode(errors="backslashreplace") for key in read_column(data, KEY)]
    labels = columns["label"]
    for number in np.flatnonzero((labels < 0) | (labels >= classes)):
        problems.append(f"{path}: sample {keys[number]} has label {labels[number]} of {classes} classes")
    expected = list(zip(keys, *(columns[name].tolist() for name in INDEX_FIELDS), strict=True))
    found = (
        _sample_problems(path, expected) if rule is None else _indexed_problems(path, expected, rule, record.classes)
    )
    problems += [f"{path}: {problem}" for problem in found]
    inside = labels[(labels >= 0) & (labels < classes)]
    return problems, np.bincount(inside, minlength=classes).tolist()


def _sample_problems(path: Path, expected: list[tuple[str, int, int, int, int]]) -> Iterator[str]:
    """Compare a tar's members with its index, and decode the images."""
    with tarfile.open(path, "r:") as tar:
        members = [member for member in tar if member.isfile()]
        if len(members) != 2 * len(expected):
            yield f"the tar has {len(members)} members for {len(expected)} samples"
            return
        for (key, offset, size, label, crc), cls, image in zip(expected, members[::2], members[1::2], strict=True):
            text, content = tar.extractfile(cls), tar.extractfile(image)
            assert text is not None
            assert content is not None
            if cls.name != f"{key}.cls" or image.name.rpartition(".")[0] != key:
                yield f"sample {key} is {image.name} in the tar"
            if text.read().strip() != str(label).encode():
                yield f"sample {key} has another label in the tar than in the index"
            data = content.read()
            if (image.offset_data, image.size, zlib.crc32(data)) != (offset, size, crc):
                yield f"sample {key} differs from the index in place or content"
            try:
                decode_rgb(data)
            except UndecodableImageError as error:
                yield f"sample {key} cannot be decoded: {error}"


def _indexed_problems(
    path: Path, expected: list[tuple[str, int, int, int, int]], rule: LabelRule, classes: list[str]
) -> Iterator[str]:
    """Compare a tar that others made with its index, and decode the images."""
    with_crc = any(crc for *_, crc in expected)
    with open_tar(path.parent, path.name) as tar:
        samples = read_samples(tar, rule, with_crc)
    numbers = {name: number for number, name in enumerate(classes)}
    labels = [number_of(label, numbers) for label in samples.labels]
    keys = [os.fsencode(key).decode(errors="backslashreplace") for key in samples.keys]
    crcs = samples.crcs or [0] * len(keys)
    if list(zip(keys, samples.offsets, samples.sizes, labels, crcs, strict=True)) != expected:
        yield "its samples are not those in its index; run karat index again"
        return
    with path.open("rb") as file:
        for key, offset, size, _, _ in expected:
            try:
                decode_rgb(os.pread(file.fileno(), size, offset))
            except UndecodableImageError as error:
                yield f"sample {key} cannot be decoded: {error}"


def count_problems(name: str, split: SplitRecord, per_class: list[int], imagenet: bool) -> list[str]:
    """Return the problems of a split's counts, against dataset.json and, if requested, against ImageNet's."""
    total = sum(per_class)
    problems = []
    if total != split.samples:
        problems.append(f"split {name} has {total} samples, dataset.json says {split.samples}")
    for label, (found, listed) in enumerate(zip(per_class, split.per_class, strict=False)):
        if found != listed:
            problems.append(f"split {name} has {found} samples of class {label}, dataset.json says {listed}")
    if imagenet and name in IMAGENET:
        samples, fewest, most = IMAGENET[name]
        if total != samples:
            problems.append(f"split {name} has {total} samples, ImageNet has {samples}")
        for label, found in enumerate(per_class):
            if not fewest <= found <= most:
                problems.append(f"split {name} has {found} samples of class {label}, ImageNet {fewest} to {most}")
    return problems


def verify_split(
    directory: Path | str, name: str, split: SplitRecord, record: DatasetRecord, workers: int
) -> tuple[list[str], list[int]]:
    """Return the problems of a split's shards, and its samples per class; shards are read in parallel."""
    problems: list[str] = []
    per_class = np.zeros(len(record.classes), dtype=np.int64)
    rule = LabelRule.parse(split.made["label"]) if is_indexed(record) else None
    check = partial(verify_shard, directory, record, rule)
    with (
        progress(f"{name}: verifying", split.samples, "images") as advance,
        ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool,
    ):
        for shard, (found, counts) in zip(split.shards, pool.map(check, split.shards), strict=True):
            problems += found
            if counts:
                per_class += counts
            advance(shard.samples)
    return problems, per_class.tolist()


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser("Check shards: hashes, labels, counts, and that every image decodes.", writes=False)
    add_shard_options(parser)
    parser.add_argument("--imagenet", action="store_true", help="expect ImageNet-1K's classes and counts")
    options = parser.parse_args(arguments)
    record = read_dataset_record(options.src)
    splits = chosen_splits(options.src, record, options.split)
    problems = []
    if options.imagenet and len(record.classes) != IMAGENET_CLASSES:
        problems.append(f"dataset.json lists {len(record.classes)} classes, ImageNet has {IMAGENET_CLASSES}")
    for name, split in splits.items():
        found, per_class = verify_split(options.src, name, split, record, options.workers)
        problems += found
        # Counts of shards that could not be read would be reported twice.
        problems += [] if found else count_problems(name, split, per_class, options.imagenet)
    for problem in problems:
        print(f"problem: {problem}")
    if problems:
        raise DataError(f"{problems[0]} ({len(problems)} problems in total)")
    for name, split in splits.items():
        print(
            f"{name}: {split.samples} samples of {len(record.classes)} classes in {len(split.shards)} shards are right"
        )


if __name__ == "__main__":
    run_script(main)
