"""Copy shards to a disk of this node, checking every byte on the way.

    python data_prep/stage.py --src DIR --out LOCAL_DIR

Run it once per node before training, then train from LOCAL_DIR. dataset.json is written last, so an unfinished copy
is no data set. A run that was stopped goes on: files that are there with the right hash are kept. Splits may be staged
one after another with --split: those that are there and whole stay in dataset.json.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from console import add_shard_options, make_parser, progress, run

from karat_scale.data.formats.shard_format import (
    DATASET_FILE,
    DatasetRecord,
    FileRecord,
    SplitRecord,
    chosen_splits,
    read_dataset_record,
    write_dataset_record,
)
from karat_scale.data.formats.shards import check_file
from karat_scale.errors import DataError
from karat_scale.files import commit_file

BLOCK = 1 << 22
# Left free on the local disk, for whatever else writes there.
SPARE_BYTES = 64 << 20

Splits = dict[str, SplitRecord]


def is_staged(out: Path, record: FileRecord) -> bool:
    """Whether a file is there, byte for byte."""
    try:
        check_file(out, record, by_hash=True)
    except (DataError, OSError):
        return False
    return True


def copy_checked(src: Path, out: Path, record: FileRecord, advance: Callable[[int], None]) -> None:
    """Copy a file under its name once its SHA-256 is right. Raises DataError."""
    handle, temporary = tempfile.mkstemp(prefix=f".{record.name}.", dir=out)
    digest = hashlib.sha256()
    try:
        with os.fdopen(handle, "wb") as target, (src / record.name).open("rb") as source:
            while block := source.read(BLOCK):
                digest.update(block)
                target.write(block)
                advance(len(block))
        if digest.hexdigest() != record.sha256:
            raise DataError(f"{src / record.name} has changed since it was written: its SHA-256 differs")
        commit_file(Path(temporary), out / record.name)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def check_space(src: Path, out: Path, needed: int) -> None:
    """Raises DataError where the disk of `out` has not that many bytes free."""
    free = shutil.disk_usage(out).free
    if needed + SPARE_BYTES > free:
        raise DataError(
            f"{out} needs {needed / 1e9:.2f} GB and has {free / 1e9:.2f} GB free; train from data.path={src} instead"
        )


def files_of(splits: Splits) -> list[FileRecord]:
    """Shards and indexes."""
    return [file for split in splits.values() for shard in split.shards for file in (shard, shard.index)]


def missing_files(out: Path, splits: Splits, workers: int) -> list[FileRecord]:
    """The files of these splits that `out` lacks or has damaged."""
    files, missing = files_of(splits), []
    with (
        progress(f"checking what is there of {', '.join(splits)}", len(files), "files") as advance,
        ThreadPoolExecutor(workers) as pool,
    ):
        for file, there in zip(files, pool.map(lambda file: is_staged(out, file), files), strict=True):
            missing += [] if there else [file]
            advance(1)
    return missing


def staged_before(out: Path, source: DatasetRecord, wanted: Splits) -> Splits:
    """The splits that dataset.json in `out` lists beside the wanted ones and that do not contradict the source's."""
    try:
        found = read_dataset_record(out)
    except DataError:
        return {}
    return {
        name: split
        for name, split in found.splits.items()
        if name not in wanted
        and found.classes == source.classes
        and split.shards == source.splits.get(name, split).shards
    }


def list_splits(out: Path, source: DatasetRecord, splits: Splits) -> None:
    """Let dataset.json list these splits and no others; without any there is none."""
    if splits:
        write_dataset_record(out, source.model_copy(update={"splits": splits}))
    else:
        (out / DATASET_FILE).unlink(missing_ok=True)


def copy_all(src: Path, out: Path, missing: list[FileRecord], workers: int) -> None:
    """Copy these files, where there is room for them. Raises DataError."""
    for leftover in (path for file in missing for path in out.glob(f".{file.name}.*")):
        leftover.unlink(missing_ok=True)
    needed = sum(file.bytes for file in missing)
    check_space(src, out, needed)
    with progress("copying", needed, "bytes") as advance, ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda file: copy_checked(src, out, file, advance), missing))


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser("Copy shards to a local disk, checking every byte.")
    add_shard_options(parser)
    options = parser.parse_args(arguments)
    src, out = options.src, options.out
    if src.resolve() == out.resolve():
        raise DataError(f"--out {out} is --src; give a directory on the local disk")
    record = read_dataset_record(src)
    wanted = chosen_splits(src, record, options.split)
    files = files_of(wanted)
    if options.dry_run:
        print(f"would copy {len(files)} files, {sum(file.bytes for file in files) / 1e6:,.1f} MB, to {out}")
        return
    out.mkdir(parents=True, exist_ok=True)
    before = staged_before(out, record, wanted)
    kept = {name: split for name, split in before.items() if not missing_files(out, {name: split}, options.workers)}
    missing = missing_files(out, wanted, options.workers)
    if missing:  # until all are here, nobody is to take this directory for a whole copy
        list_splits(out, record, kept)
        copy_all(src, out, missing, options.workers)
    list_splits(out, record, kept | wanted)
    absent = ", ".join(name for name in record.splits if name not in kept | wanted)
    then = f"Stage {absent} too before you train from it" if absent else f"Train with data.path={out}"
    print(f"{len(files)} files are in {out} and right; {len(missing)} were copied. {then}")


if __name__ == "__main__":
    run(main)
