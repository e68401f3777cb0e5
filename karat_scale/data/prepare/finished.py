"""Scripts for finished shards: copy them to a local disk, verify them, join them, and index them for DALI.

    python data_prep/stage.py --src DIR --out LOCAL_DIR      # DIR is a directory, or a URL
    python data_prep/verify.py --src DIR [--imagenet]        # DIR is a directory, or a URL
    python data_prep/join_splits.py --src DIR --out DIR
    python data_prep/make_dali_index.py --src DIR --out DIR

Run `stage` once per node before training, then train from LOCAL_DIR. dataset.json is written last, so an unfinished
copy is not a data set. A run that was stopped resumes: existing files with the right hash are kept. Splits may be
staged one after another with --split: complete ones stay in dataset.json.

`verify` prints every problem of files and hashes, labels, counts, and images that do not decode. If there is one, the
exit code is 2, and one line on stderr has the first problem and their number.

`join` joins splits such as those of a job array's tasks into one data set. It moves the shards of --src into --out, on
the same file system, and adds its splits to dataset.json there. A run that was stopped resumes. Several runs may join
into one --out: one works and the others wait.

`make_dali_index` writes the index files that DALI's webdataset reader needs (`index_paths`), for your own pipelines.
Each shard gets one text file, such as train-000000.idx, in the same folder below --out as the shard's own below --src.
Its format is v1.2 of DALI's wds2idx: a line `v1.2 <samples>`, then a line per sample with
`<suffix> <offset> <bytes> <name>` of each of its members.
"""

import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np

from karat_scale.data.decoders.decode import UndecodableImageError, decode_rgb
from karat_scale.data.indexing import MADE_BY, LabelRule, open_tar, read_samples
from karat_scale.data.prepare.making import (
    alone_in,
    make_parser,
    output_directory,
    run_in_processes,
    shard_parser,
    user_path,
)
from karat_scale.data.shards import shard_format
from karat_scale.data.shards.tars import scan_members
from karat_scale.foundation.console import plural, progress
from karat_scale.foundation.errors import DataError
from karat_scale.foundation.files import (
    FingerprintedFile,
    commit_file,
    flush_to_disk,
    open_to_read,
    temporary_file,
    write_atomically,
)
from karat_scale.foundation.stores import Store

BLOCK = 1 << 22
# Space to leave free on the local disk for other programs.
SPARE_BYTES = 64 << 20

Splits = dict[str, shard_format.SplitRecord]


def is_staged(out: Path, record: shard_format.FileRecord) -> bool:
    """True if a file is complete and correct: by its hash, or, without one, by its size and its index."""
    try:
        shard_format.check_file(out / record.name, record, by_hash=bool(record.sha256))
    except (DataError, OSError):
        return False
    return bool(record.sha256) or not isinstance(record, shard_format.ShardRecord) or is_staged(out, record.index)


def copy_checked(src: Path | str, out: Path, record: shard_format.FileRecord, advance: Callable[[int], None]) -> None:
    """Copy a file; it gets its name once its size, and its SHA-256 if that is known, are right. Raises DataError."""
    (out / record.name).parent.mkdir(parents=True, exist_ok=True)
    with temporary_file(out / record.name) as temporary:
        with temporary.open("wb") as target:
            copy = FingerprintedFile(target, advance)
            if isinstance(src, str):
                etag = (record.etag or "") if isinstance(record, shard_format.ShardRecord) else ""
                for piece in Store(src).pieces(record.name, record.bytes, etag):
                    copy.write(piece)
            else:
                with open_to_read(src / record.name) as source:
                    shutil.copyfileobj(source, copy, BLOCK)
        found = copy.fingerprint()
        if found.bytes != record.bytes or record.sha256 not in ("", found.sha256):
            what = f"{src}/{record.name} has changed since it was written: its size or its SHA-256 differs"
            raise DataError(f"{what}; restore it, make the shards again, or index them again")
        commit_file(temporary, out / record.name)


def files_of(splits: Splits) -> list[shard_format.FileRecord]:
    """Return shards and indexes."""
    return [file for split in splits.values() for shard in split.shards for file in (shard, shard.index)]


def missing_files(out: Path, splits: Splits, workers: int) -> list[shard_format.FileRecord]:
    """Return the files of these splits that are missing or damaged in `out`."""
    files, missing = files_of(splits), []
    with (
        progress(f"checking the existing files of {', '.join(splits)}", len(files), "files") as advance,
        ThreadPoolExecutor(workers) as pool,
    ):
        for file, there in zip(files, pool.map(partial(is_staged, out), files), strict=True):
            missing += [] if there else [file]
            advance(1)
    return missing


def staged_before(out: Path, source: shard_format.DatasetRecord, wanted: Splits) -> Splits:
    """Return the other splits in dataset.json of `out` that do not contradict the source's."""
    try:
        found = shard_format.read_dataset_record(out)
    except DataError:
        return {}
    return {
        name: split
        for name, split in found.splits.items()
        if name not in wanted
        and found.classes == source.classes
        and split.shards == source.splits.get(name, split).shards
    }


def list_splits(out: Path, source: shard_format.DatasetRecord, splits: Splits) -> None:
    """Write dataset.json with only these splits; without any, remove it."""
    if splits:
        shard_format.write_dataset_record(out, source.model_copy(update={"splits": splits, "root": ""}))
    else:
        for name in (shard_format.DATASET_FILE, shard_format.TIMM_FILE):
            (out / name).unlink(missing_ok=True)


def _has_others(out: Path, source: shard_format.DatasetRecord) -> bool:
    """Return whether `out` has shards that are not the source's."""
    try:
        found = shard_format.read_dataset_record(out)
    except DataError:
        return False
    own = {name: split.shards for name, split in source.splits.items()}
    return any(own.get(name) != split.shards for name, split in found.splits.items())


_STAGED = ".staged"  # in a directory with copies, which may go


def stage(arguments: list[str] | None = None) -> None:
    options = shard_parser("Copy shards to a local disk, and verify every byte.").parse_args(arguments)
    src, out = options.src, options.out
    if isinstance(src, Path) and src.resolve() == out.resolve():
        raise DataError(f"--out {out} is --src; use a directory on the local disk")
    record = shard_format.read_dataset_record(src, what="--src")
    wanted = shard_format.chosen_splits(src, record, options.split)
    files, tars = files_of(wanted), record.tars_of(src)
    if isinstance(tars, Path) and tars.resolve() == out.resolve():
        raise DataError(f"--out {out} has the tars of --src itself; use a directory on the local disk")
    is_ours = (out / _STAGED).exists() or ((out / shard_format.DATASET_FILE).exists() and not _has_others(out, record))
    if not is_ours and any((out / file.name).exists() for file in files):  # which may be the only ones
        raise DataError(f"--out {out} has files of these names that are not copies; use another directory")
    if options.dry_run:
        print(f"would copy {len(files)} files, {sum(file.bytes for file in files) / 1e6:,.1f} MB, to {out}")
        return
    out.mkdir(parents=True, exist_ok=True)
    (out / _STAGED).touch()
    with alone_in(out):
        copied, absent = _stage(src, out, record, wanted, options.workers)
    then = f"Stage {absent} too before you train from it" if absent else f"Train with {shlex.quote(f'data.path={out}')}"
    print(f"{len(files)} files in {out} are complete and correct; {copied} were copied. {then}")


def _stage(
    src: Path | str, out: Path, record: shard_format.DatasetRecord, wanted: Splits, workers: int
) -> tuple[int, str]:
    """Copy what is missing; returns the number of files, and the splits that are not in `out`."""
    before = staged_before(out, record, wanted)
    kept = {name: split for name, split in before.items() if not missing_files(out, {name: split}, workers)}
    missing = missing_files(out, wanted, workers)
    if missing:  # until all are copied, the directory must not look complete
        list_splits(out, record, kept)
        for file in missing:  # an old tar must not stay beside its new index
            (out / file.name).unlink(missing_ok=True)
        needed, free = sum(file.bytes for file in missing), shutil.disk_usage(out).free
        if needed + SPARE_BYTES > free:
            sizes = f"needs {needed / 1e9:.2f} GB and has {free / 1e9:.2f} GB free"
            raise DataError(f"{out} {sizes}; train from data.path={src} instead")
        with progress("copying", needed, "bytes") as advance, ThreadPoolExecutor(workers) as pool:

            def copy(file: shard_format.FileRecord) -> None:
                place = record.tars_of(src) if isinstance(file, shard_format.ShardRecord) else src
                copy_checked(place, out, file, advance)

            list(pool.map(copy, missing))
    list_splits(out, record, kept | wanted)
    return len(missing), ", ".join(name for name in record.splits if name not in kept | wanted)


# ImageNet-1K as published: images, and the smallest and largest class.
IMAGENET_CLASSES = 1000
IMAGENET = {"train": (1_281_167, 732, 1300), "val": (50_000, 50, 50)}


def verify_shard(
    directory: Path | str, record: shard_format.DatasetRecord, rule: LabelRule | None, shard: shard_format.ShardRecord
) -> tuple[list[str], list[int]]:
    """Return a shard's problems, and its number of samples of each class. A shard at a URL is fetched first.

    rule: the rule for the labels in a tar that `karat index` has indexed; None for our own shards.
    """
    tars = record.tars_of(directory)
    if not isinstance(directory, Path) or not isinstance(tars, Path):
        with tempfile.TemporaryDirectory(prefix="karat-verify-") as scratch:
            try:
                for source, file in ((directory, shard.index), (tars, shard)):
                    copy_checked(source, Path(scratch), file, lambda _: None)
            except DataError as error:
                return [str(error)], []
            fetched = record.model_copy(update={"root": ""})
            problems, per_class = verify_shard(Path(scratch), fetched, rule, shard)
        return [problem.replace(scratch, str(tars)) for problem in problems], per_class
    path, classes = tars / shard.name, len(record.classes)
    problems = []
    for place, file in ((directory, shard.index), (tars, shard)):
        try:
            shard_format.check_file(place / file.name, file, by_hash=bool(file.sha256))
        except DataError as error:
            problems.append(str(error).split("; ")[0])
    if problems:
        return problems, []
    data = (directory / shard.index.name).read_bytes()
    try:
        columns = shard_format.read_columns(data, shard_format.INDEX_FIELDS, shard.samples, shard.bytes)
    except ValueError as error:
        return [f"{path}: its index does not fit it: {error}"], []
    keys = shard_format.keys_of(data)
    labels = columns["label"]
    for number in np.flatnonzero((labels < 0) | (labels >= classes)):
        problems.append(f"{path}: sample {keys[number]} has label {labels[number]} of {classes} classes")
    expected = list(zip(keys, *(columns[name].tolist() for name in shard_format.INDEX_FIELDS), strict=True))
    try:
        problems += [f"{path}: {problem}" for problem in _sample_problems(path, expected, rule, record.classes)]
    except DataError as error:  # a tar that was indexed without its hash
        problems.append(str(error))
    inside = labels[(labels >= 0) & (labels < classes)]
    return problems, np.bincount(inside, minlength=classes).tolist()


def _sample_problems(
    path: Path, expected: list[tuple[str, int, int, int, int]], rule: LabelRule | None, classes: list[str]
) -> Iterator[str]:
    """Compare the samples of a tar with its index, and decode the images."""
    numbers = {name: number for number, name in enumerate(classes)}
    with open_tar(path.parent, path.name) as tar:
        with_crc = any(crc for *_, crc in expected)
        found = read_samples(tar, rule or LabelRule("cls"), with_crc, any_image=rule is None)
        if len(found.keys) != len(expected):
            why = f": {found.skipped[0][0]}: {found.skipped[0][1]}" if found.skipped else ""
            yield f"the tar has {len(found.keys)} samples, its index {len(expected)}{why}"
            return
        rows = zip(found.keys, found.labels, found.offsets, found.sizes, found.crcs or [0] * len(expected), strict=True)
        for (key, offset, size, label, crc), (in_tar, label_in_tar, *place) in zip(expected, rows, strict=True):
            if os.fsencode(in_tar).decode(errors="backslashreplace") != key:
                yield f"sample {key} is {in_tar} in the tar"
            if (numbers.get(label_in_tar) if isinstance(label_in_tar, str) else label_in_tar) != label:
                yield f"sample {key} has another label in the tar than in the index"
            if place != [offset, size, crc]:
                yield f"sample {key} differs from the index in place or content"
            try:
                decode_rgb(tar.read(offset, size))
            except UndecodableImageError as error:
                yield f"sample {key} cannot be decoded: {error}"


def count_problems(name: str, split: shard_format.SplitRecord, per_class: list[int], imagenet: bool) -> list[str]:
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


def verify(arguments: list[str] | None = None) -> None:
    parser = shard_parser("Check shards: hashes, labels, counts, and that every image decodes.", writes=False)
    parser.add_argument("--imagenet", action="store_true", help="expect ImageNet-1K's classes and counts")
    options = parser.parse_args(arguments)
    record = shard_format.read_dataset_record(options.src, what="--src")
    splits = shard_format.chosen_splits(options.src, record, options.split)
    problems = []
    if options.imagenet and len(record.classes) != IMAGENET_CLASSES:
        problems.append(f"dataset.json lists {len(record.classes)} classes, ImageNet has {IMAGENET_CLASSES}")
    for name, split in splits.items():
        found, per_class = [], np.zeros(len(record.classes), dtype=np.int64)
        rule = LabelRule.parse(split.made["label"]) if split.made.get("by") == MADE_BY else None
        check = partial(verify_shard, options.src, record, rule)
        with (
            progress(f"{name}: verifying", split.samples, "images") as advance,
            closing(run_in_processes(check, split.shards, options.workers)) as checked,
        ):
            for shard, (of_shard, counts) in zip(split.shards, checked, strict=True):
                found += of_shard
                per_class += counts or 0
                advance(shard.samples)
        problems += found
        # Counts of shards that could not be read would be reported twice.
        problems += [] if found else count_problems(name, split, per_class.tolist(), options.imagenet)
    for problem in problems:
        print(f"problem: {problem}")
    if problems:
        raise DataError(f"{problems[0]} ({plural(len(problems), 'problem')} in total)")
    for name, split in splits.items():
        print(
            f"{name}: right: {plural(split.samples, 'sample')} of {plural(len(record.classes), 'class')} in "
            f"{plural(len(split.shards), 'shard')}"
        )


TURN = ".joining"
"""In --out: a link to the --src that is being joined."""
_POLL_SECONDS = 1.0


@contextmanager
def _turn(src: Path, out: Path) -> Iterator[None]:
    """Let no other run join into `out` inside the block, since each writes dataset.json there.

    A link and not a lock: some shared file systems have no locks, or only between processes of one node. A run that was
    killed leaves its link behind, so the link names its source, and the next run of that source takes it over.
    """
    link, mine, waited = out / TURN, src.resolve(), False
    while True:
        other: Path | None = None
        try:
            link.symlink_to(mine)
            break
        except FileExistsError:
            with suppress(FileNotFoundError):  # it has just been removed
                other = link.readlink()
        if other == mine:
            break
        if other is not None and not waited:
            print(f"waiting until {other} is joined; if no run does that any more, remove {link}", flush=True)
            waited = True
        time.sleep(_POLL_SECONDS)
    try:
        yield
    finally:
        link.unlink(missing_ok=True)


def join(src: Path, out: Path) -> list[str]:
    """Move the splits of `src` into `out`; returns their names. Raises DataError if the two do not fit together."""
    shard_format.read_dataset_record(src, what="--src")  # else there may be no directory
    out.mkdir(parents=True, exist_ok=True)
    with alone_in(src), _turn(src, out), alone_in(out):  # another run may make a split in `out`
        record = shard_format.read_dataset_record(src, what="--src")  # another run may have joined it meanwhile
        _join(src, record, out)
    return list(record.splits)


def _join(src: Path, record: shard_format.DatasetRecord, out: Path) -> None:
    has_some = (out / shard_format.DATASET_FILE).exists()
    joined = (
        shard_format.read_dataset_record(out, what="--out") if has_some else record.model_copy(update={"splits": {}})
    )
    if record.root or joined.root:
        raise DataError(f"{src} and {out}: one lists tars that are elsewhere; run `karat index` on all tars at once")
    if joined.classes != record.classes:
        raise DataError(f"{src} has different classes than {out}; make both splits from the same images")
    for name, split in record.splits.items():
        left = any((src / file.name).exists() for file in files_of({name: split}))
        if name in joined.splits and (left or joined.splits[name] != split):  # else an earlier run joined it
            raise DataError(f"{out} has a split {name} already; use another --out")
    for file in files_of(record.splits):
        if (src / file.name).exists() and (out / file.name).exists():
            raise DataError(
                f"{out / file.name} is there already; use another --out, or rename one and index its tars again"
            )
    for file in files_of(record.splits):
        if (src / file.name).exists():  # else an earlier run moved it
            (out / file.name).parent.mkdir(parents=True, exist_ok=True)
            (src / file.name).rename(out / file.name)
    for folder in {(out / file.name).parent for file in files_of(record.splits)} | {out}:
        flush_to_disk(folder)
    joined.splits.update(record.splits)
    shard_format.write_dataset_record(out, joined)
    (src / shard_format.TIMM_FILE).unlink(missing_ok=True)
    (src / shard_format.DATASET_FILE).unlink()
    with suppress(OSError):  # other files are in it, such as a log
        src.rmdir()


def join_splits(arguments: list[str] | None = None) -> None:
    parser = make_parser("Move splits into another data set; --src is removed if nothing else is in it.", writes=False)
    parser.add_argument(
        "--src", type=user_path, required=True, metavar="DIR", help="the directory whose splits are moved"
    )
    parser.add_argument(
        "--out", type=output_directory, required=True, metavar="DIR", help="the data set that gets them"
    )
    options = parser.parse_args(arguments)
    print(f"moved the splits of {options.src}; {options.out} has {', '.join(join(options.src, options.out))} now")


def dali_index(tar_path: Path) -> str:
    """Return the index of a shard. Raises DataError if a name has a blank, which the format cannot hold."""
    samples: dict[str, list[str]] = {}
    with open_tar(tar_path.parent, tar_path.name) as tar:
        for member in scan_members(tar.read, tar.size, tar.name):
            if member.kind not in ("file", "sparse"):
                continue
            if any(letter.isspace() for letter in member.name):
                raise DataError(f"{tar_path}: the name {member.name!r} has a blank; make the shards again")
            folder, slash, file = member.name.rpartition("/")
            stem, _, ending = file.partition(".")
            if not stem or not ending:  # a hidden file, or one without a suffix, is in no sample
                continue
            part = f"{ending} {member.offset} {member.size} {member.name}"
            samples.setdefault(folder + slash + stem, []).append(part)
    return "\n".join([f"v1.2 {len(samples)}", *(" ".join(parts) for parts in samples.values())]) + "\n"


def _write_dali_index(tars: Path, out: Path, shard: shard_format.ShardRecord) -> None:
    shard_format.check_file(tars / shard.name, shard, by_hash=False)
    path = out / Path(shard.name).with_suffix(".idx")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, dali_index(tars / shard.name))


def make_dali_index(arguments: list[str] | None = None) -> None:
    options = shard_parser("Write index files for DALI's webdataset reader.").parse_args(arguments)
    record = shard_format.read_dataset_record(options.src, what="--src")
    tars, splits = record.tars_of(options.src), shard_format.chosen_splits(options.src, record, options.split)
    if isinstance(tars, str):
        raise DataError(f"the tars are at {tars}; this needs them on a file system")
    shards: list[shard_format.ShardRecord] = [shard for split in splits.values() for shard in split.shards]
    if options.dry_run:
        print(f"would write {len(shards)} index files to {options.out}")
        return
    options.out.mkdir(parents=True, exist_ok=True)
    write = partial(_write_dali_index, tars, options.out)
    with (
        progress("indexing", len(shards), "shards") as advance,
        closing(run_in_processes(write, shards, options.workers)) as written,
    ):
        for _ in written:
            advance(1)
    print(f"{len(shards)} index files are in {options.out}")
