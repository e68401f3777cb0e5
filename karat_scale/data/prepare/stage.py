"""Copy shards to a local disk of this node, and verify every byte.

    python data_prep/stage.py --src DIR --out LOCAL_DIR      # DIR is a directory, or a URL

Run it once per node before training, then train from LOCAL_DIR. dataset.json is written last, so an unfinished copy
is not a data set. A run that was stopped resumes: existing files with the right hash are kept. Splits may be staged
one after another with --split: complete ones stay in dataset.json.
"""

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from karat_scale.data.prepare.job import add_shard_options, make_parser
from karat_scale.data.shards.shard_format import (
    DATASET_FILE,
    TIMM_FILE,
    DatasetRecord,
    FileRecord,
    ShardRecord,
    SplitRecord,
    chosen_splits,
    read_dataset_record,
    write_dataset_record,
)
from karat_scale.data.shards.shards import check_file
from karat_scale.foundation.console import progress
from karat_scale.foundation.errors import DataError, run_script
from karat_scale.foundation.files import FingerprintedFile, commit_file, open_to_read, temporary_file
from karat_scale.foundation.stores import Store

BLOCK = 1 << 22
# Space to leave free on the local disk for other programs.
SPARE_BYTES = 64 << 20

Splits = dict[str, SplitRecord]


def is_staged(out: Path, record: FileRecord) -> bool:
    """True if a file exists, byte for byte; by its size alone if `karat index` left out its hash."""
    try:
        check_file(out, record, by_hash=bool(record.sha256))
    except (DataError, OSError):
        return False
    return True


def copy_checked(src: Path | str, out: Path, record: FileRecord, advance: Callable[[int], None]) -> None:
    """Copy a file; it gets its name once its size, and its SHA-256 if that is known, are right. Raises DataError."""
    (out / record.name).parent.mkdir(parents=True, exist_ok=True)
    with temporary_file(out / record.name) as temporary:
        with temporary.open("wb") as target:
            copy = FingerprintedFile(target, advance)
            if isinstance(src, str):
                etag = (record.etag or "") if isinstance(record, ShardRecord) else ""
                for piece in Store(src).pieces(record.name, record.bytes, etag):
                    copy.write(piece)
            else:
                with open_to_read(src / record.name) as source:
                    shutil.copyfileobj(source, copy, BLOCK)
        found = copy.fingerprint()
        if found.bytes != record.bytes or record.sha256 not in ("", found.sha256):
            raise DataError(f"{src}/{record.name} has changed since it was written: its size or its SHA-256 differs")
        commit_file(temporary, out / record.name)


def check_space(src: Path | str, out: Path, needed: int) -> None:
    """Raise DataError if the disk of `out` does not have that many bytes free."""
    free = shutil.disk_usage(out).free
    if needed + SPARE_BYTES > free:
        raise DataError(
            f"{out} needs {needed / 1e9:.2f} GB and has {free / 1e9:.2f} GB free; train from data.path={src} instead"
        )


def files_of(splits: Splits) -> list[FileRecord]:
    """Return shards and indexes."""
    return [file for split in splits.values() for shard in split.shards for file in (shard, shard.index)]


def missing_files(out: Path, splits: Splits, workers: int) -> list[FileRecord]:
    """Return the files of these splits that are missing or damaged in `out`."""
    files, missing = files_of(splits), []
    with (
        progress(f"checking the existing files of {', '.join(splits)}", len(files), "files") as advance,
        ThreadPoolExecutor(workers) as pool,
    ):
        for file, there in zip(files, pool.map(lambda file: is_staged(out, file), files), strict=True):
            missing += [] if there else [file]
            advance(1)
    return missing


def staged_before(out: Path, source: DatasetRecord, wanted: Splits) -> Splits:
    """Return the other splits in dataset.json of `out` that do not contradict the source's."""
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
    """Write dataset.json with only these splits; without any, remove it."""
    if splits:
        write_dataset_record(out, source.model_copy(update={"splits": splits, "root": ""}))
    else:
        for name in (DATASET_FILE, TIMM_FILE):
            (out / name).unlink(missing_ok=True)


def copy_all(src: Path | str, tars: Path | str, out: Path, missing: list[FileRecord], workers: int) -> None:
    """Copy these files if there is space for them. Raises DataError."""
    for leftover in (path for file in missing for path in out.glob(f".{file.name}.*")):
        leftover.unlink(missing_ok=True)
    needed = sum(file.bytes for file in missing)
    check_space(src, out, needed)
    with progress("copying", needed, "bytes") as advance, ThreadPoolExecutor(workers) as pool:

        def copy(file: FileRecord) -> None:
            copy_checked(tars if isinstance(file, ShardRecord) else src, out, file, advance)

        list(pool.map(copy, missing))


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser("Copy shards to a local disk, and verify every byte.")
    add_shard_options(parser)
    options = parser.parse_args(arguments)
    src, out = options.src, options.out
    if isinstance(src, Path) and src.resolve() == out.resolve():
        raise DataError(f"--out {out} is --src; use a directory on the local disk")
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
    if missing:  # until all are copied, the directory must not look complete
        list_splits(out, record, kept)
        copy_all(src, record.tars_of(src), out, missing, options.workers)
    list_splits(out, record, kept | wanted)
    absent = ", ".join(name for name in record.splits if name not in kept | wanted)
    then = f"Stage {absent} too before you train from it" if absent else f"Train with data.path={out}"
    print(f"{len(files)} files in {out} are complete and correct; {len(missing)} were copied. {then}")


if __name__ == "__main__":
    run_script(main)
