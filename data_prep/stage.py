"""Copy shards to a disk of this node, checking every byte on the way.

    python data_prep/stage.py --src DIR --out LOCAL_DIR

Run it once per node before training, then train from LOCAL_DIR. dataset.json is written last, so an unfinished copy
is no data set. A run that was stopped goes on: files that are there with the right hash are kept.
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
    FileRecord,
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
            f"{out} needs {needed / 1e9:.2f} GB and has {free / 1e9:.2f} GB free; train from data.path={src} instead, "
            f"or stage one split with --split"
        )


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser("Copy shards to a local disk, checking every byte.")
    add_shard_options(parser)
    options = parser.parse_args(arguments)
    src, out = options.src, options.out
    if src.resolve() == out.resolve():
        raise DataError(f"--out {out} is --src; give a directory on the local disk")
    record = read_dataset_record(src)
    record.splits = chosen_splits(src, record, options.split)
    files = [file for split in record.splits.values() for shard in split.shards for file in (shard, shard.index)]
    if options.dry_run:
        print(f"would copy {len(files)} files, {sum(file.bytes for file in files) / 1e6:,.1f} MB, to {out}")
        return
    out.mkdir(parents=True, exist_ok=True)
    with (
        progress("checking what is there", len(files), "files") as advance,
        ThreadPoolExecutor(options.workers) as pool,
    ):
        missing = []
        for file, there in zip(files, pool.map(lambda file: is_staged(out, file), files), strict=True):
            missing += [] if there else [file]
            advance(1)
    for leftover in (path for file in missing for path in out.glob(f".{file.name}.*")):
        leftover.unlink(missing_ok=True)
    if missing:  # until all are here, nobody is to take this directory for a whole copy
        (out / DATASET_FILE).unlink(missing_ok=True)
    needed = sum(file.bytes for file in missing)
    check_space(src, out, needed)
    with progress("copying", needed, "bytes") as advance, ThreadPoolExecutor(options.workers) as pool:
        list(pool.map(lambda file: copy_checked(src, out, file, advance), missing))
    write_dataset_record(out, record)
    print(f"{len(files)} files are in {out} and right; {len(missing)} were copied. Train with data.path={out}")


if __name__ == "__main__":
    run(main)
