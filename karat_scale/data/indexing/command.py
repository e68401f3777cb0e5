"""The command `karat index`: finds tars and their splits, numbers the classes, and writes the indexes.

It reads the headers of all tars, and writes an index for each tar and dataset.json.
"""

import hashlib
import multiprocessing
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np

from karat_scale.data.indexing.samples import (
    Label,
    LabelRule,
    TarSamples,
    guess_label_rule,
    number_of,
    open_tar,
    read_samples,
)
from karat_scale.data.shards import shard_format
from karat_scale.data.shards.shards import is_hidden_folder, refuse_broken_link
from karat_scale.foundation.console import plural, printable, progress, write_json
from karat_scale.foundation.errors import DataError
from karat_scale.foundation.files import read_text, walk, write_atomically
from karat_scale.foundation.machine import usable_cores
from karat_scale.foundation.stores import Store

_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_PACKED = re.compile(r"\.(tar\.(gz|bz2|xz|zst)|tgz)$")
_NAME_IN_RECORD = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)*")


def find_tars(source: Path | Store) -> list[str]:
    """Return the tars in a directory or at a URL and below it, as sorted paths relative to it. Raises DataError.

    A line names compressed ones, which are left out.
    """
    if isinstance(source, Store):
        where, files = source.url, list(source.files())
    elif source.is_dir():
        where, files = str(source), _files_under(source)
    else:
        raise DataError(f"{source} is not a directory; name the one that holds the tars")
    names = sorted(name for name in files if name.endswith(".tar"))
    packed = sorted(name for name in files if _PACKED.search(name))
    if not names:
        found = f"only such as {packed[0]}; unpack their compression first" if packed else "and nothing to index"
        raise DataError(f"{where} has no *.tar, {found}")
    if packed:
        print(printable(f"note: {plural(len(packed), 'compressed tar')} left out, such as {packed[0]}"))
    for name in names:
        if not _NAME_IN_RECORD.fullmatch(name):
            raise DataError(
                f"{where}/{name}: the name has other characters than letters, digits, _, . and -; rename it"
            )
    return names


def _files_under(source: Path) -> list[str]:
    """Return the files below a directory, also in linked ones, as paths relative to it; hidden ones are passed over.

    Raises DataError for a broken link to a tar, OSError for a folder that cannot be listed.
    """
    paths: list[Path] = []
    for directory, below, files in walk(source):
        below[:] = [name for name in below if not is_hidden_folder(name)]
        paths += [Path(directory, name) for name in files if name[0] != "."]
    for path in paths:
        if path.suffix == ".tar":
            refuse_broken_link(path)
    return [str(path.relative_to(source)) for path in paths]


def into_splits(names: Sequence[str], rules: Sequence[str]) -> dict[str, list[str]]:
    """Return the tars of each split.

    Args:
        names: paths of tars.
        rules: `SPLIT=PATTERN` each, such as `train=shard-0*.tar`; without any, the word train, val, validation or
            test in a path decides, and tars without such a word are for training.

    Raises:
        DataError: a rule fits no tar, or a tar fits none.
    """
    if not rules:
        return _by_word(names)
    splits: dict[str, list[str]] = {}
    left = list(names)
    for rule in rules:
        split, equals, pattern = rule.partition("=")
        if not equals or not re.fullmatch(r"\w+", split):
            raise DataError(f"--split {rule}: should be SPLIT=PATTERN, such as train=train-*.tar")
        fitting = [name for name in left if fnmatchcase(name, pattern)]
        if not fitting:
            raise DataError(f"--split {rule}: no tar that is left has such a path; the first is {names[0]}")
        splits.setdefault(split, []).extend(fitting)
        left = [name for name in left if name not in set(fitting)]
    if left:
        raise DataError(f"{left[0]} and {len(left) - 1} more tars are in no split; add --split SPLIT=PATTERN for them")
    return splits


def _by_word(names: Sequence[str]) -> dict[str, list[str]]:
    splits: dict[str, list[str]] = {}
    for name in names:
        splits.setdefault(split_named_in(name, _NAMES) or "train", []).append(name)
    return splits


def split_named_in(path: str, splits: Mapping[str, str]) -> str:
    """Return the split that the last of these words in a path stands for; "" without one."""
    words = re.findall(rf"(?<![a-z])({'|'.join(splits)})(?![a-z])", path, re.IGNORECASE)
    return splits[words[-1].lower()] if words else ""


MADE_BY = "karat index"
_BLOCK = 1 << 20
# Tars at a URL that are read at a time.
_REQUESTS = 32


@dataclass(frozen=True)
class IndexRequest:
    """What to index and how.

    Attributes:
        source: the directory of the tars, or its URL.
        out: where indexes and dataset.json go; the source itself if None.
        label: a rule for `LabelRule.parse`, or "auto".
        splits: rules for `into_splits`.
        classes: a file with the name of each class in the order of the labels, one on a line.
        with_hashes: also read the tars, for the SHA-256 of each and the CRC-32 of each image.
    """

    source: Path | str
    out: Path | None = None
    label: str = "auto"
    splits: tuple[str, ...] = ()
    classes: Path | None = None
    with_hashes: bool = False
    json_file: str | None = None


def index_tars(request: IndexRequest) -> int:
    """Index the tars of a directory, and print what was found; returns the exit code.

    Raises:
        DataError: there are no tars, one is damaged, a label is not of a class, or the output cannot be written.
    """
    source = Store(request.source) if isinstance(request.source, str) else request.source.expanduser().resolve()
    out = _output(source, request.out)
    names = find_tars(source)
    splits = into_splits(names, request.splits)
    if request.label == "auto":
        with open_tar(source, names[0]) as tar:
            rule = guess_label_rule(tar)
    else:
        rule = LabelRule.parse(request.label)
    tars = _read_all(source, names, rule, request.with_hashes)
    usual: list[str] = []
    if not request.classes and isinstance(source, Path) and (source / "classnames.txt").exists():
        usual = _lines(source / "classnames.txt", "{} cannot be read: {}; give the names by --classes FILE")
    classes = _classes(tars, rule, request.classes, usual)
    numbers = {name: number for number, name in enumerate(classes)}
    root = source.url if isinstance(source, Store) else "" if out == source else str(source)
    record = shard_format.DatasetRecord(classes=classes, root=root)
    for split, members in splits.items():
        record.splits[split] = _write_split(out, members, tars, numbers, {"by": MADE_BY, "label": str(rule)})
    shard_format.write_dataset_record(out, record)
    counts = {
        name: {
            "tars": len(split.shards),
            "samples": split.samples,
            "classes": len(classes),
            "classes_without_samples": len(split.empty_classes),
            "skipped": len(split.skipped),
        }
        for name, split in record.splits.items()
    }
    write_json(request.json_file, counts)
    _print_result(record, out, rule, sum((tar.notes for tar in tars.values()), Counter()))
    return 0


def _output(source: Path | Store, out: Path | None) -> Path:
    """Return where to write, once that is known to work. Raises DataError."""
    if isinstance(source, Store) and out is None:
        raise DataError(f"add --out DIR, a directory for the indexes of {source.url}")
    if out is None:
        assert isinstance(source, Path)
        out = source
    out = out.expanduser().resolve()
    if (out / shard_format.DATASET_FILE).is_file() and not is_indexed(shard_format.read_dataset_record(out)):
        raise DataError(f"{out} has a {shard_format.DATASET_FILE} of karat prepare webdataset; it needs no index")
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / ".karat-index", "")
        (out / ".karat-index").unlink()
    except OSError as error:
        fix = "add --out DIR, for tars that nobody may change" if out == source else "choose another --out"
        raise DataError(f"{out} cannot be written: {error.strerror}; {fix}") from error
    return out


def is_indexed(record: shard_format.DatasetRecord) -> bool:
    """Return whether a data set was made by `karat index`, of tars that others wrote."""
    return any(split.made.get("by") == MADE_BY for split in record.splits.values())


def _read_all(source: Path | Store, names: Sequence[str], rule: LabelRule, with_hashes: bool) -> dict[str, TarSamples]:
    read = partial(_read_one, source, rule, with_hashes)
    where = source.url if isinstance(source, Store) else str(source)
    with progress(f"indexing {where}", len(names), "tars") as advance, _in_parallel(source, len(names)) as each:
        tars = {}
        for name, tar in zip(names, each(read, names), strict=True):
            tars[name] = tar
            advance(1)
        return tars


@contextmanager
def _in_parallel(source: Path | Store, tars: int) -> Iterator[Callable[..., Iterable[TarSamples]]]:
    """Yield a `map` by processes for tars on a file system, and by threads for those at a URL, which mostly wait.

    No process is forked while connections are open: a lock that another thread held then would stay locked in it.
    """
    if isinstance(source, Store):
        with ThreadPool(min(_REQUESTS, tars)) as threads:
            yield threads.imap
    else:
        with ProcessPoolExecutor(min(usable_cores(), tars), multiprocessing.get_context("fork")) as processes:
            try:
                yield processes.map
            except BrokenProcessPool as error:
                fix = "use fewer cores, as by taskset -c 0, if memory is short"
                raise DataError(f"a worker process died; {fix}") from error


def _read_one(source: Path | Store, rule: LabelRule, with_hashes: bool, name: str) -> TarSamples:
    with open_tar(source, name) as tar:
        samples, digest = read_samples(tar, rule, with_crc=with_hashes), hashlib.sha256()
        for start in range(0, tar.size if with_hashes else 0, _BLOCK):
            digest.update(tar.read(start, _BLOCK))
        samples.sha256 = digest.hexdigest() if with_hashes else ""
        return samples


def _classes(tars: dict[str, TarSamples], rule: LabelRule, file: Path | None, usual: list[str]) -> list[str]:
    """Return the names of the classes, in order.

    Args:
        file: given by the user, with the names.
        usual: the names in the file that open_clip's data sets have beside their tars; empty if there is none.

    Raises:
        DataError: labels are of both kinds, or not of classes.
    """
    labels = {label for tar in tars.values() for label in tar.labels}
    if not labels:
        reasons = Counter(reason for tar in tars.values() for _, reason in tar.skipped)
        most = reasons.most_common(1)[0][0] if reasons else "the tars are empty"
        raise DataError(f"no sample has an image and a label: {most}")
    names = sorted(label for label in labels if isinstance(label, str))
    numbers = sorted(label for label in labels if not isinstance(label, str))
    if names and numbers:
        raise DataError(f"labels are names, such as {names[0]!r}, and numbers, such as {numbers[0]}; choose --label")
    known = _lines(file, "--classes {} cannot be read: {}") if file else None
    if known is not None and (not known or len(set(known)) < len(known) or not all(known)):
        raise DataError(f"--classes {file}: should have one name on each line, and no name twice")
    if rule.kind == "txt" and known is None and len(names) > sum(len(tar.labels) for tar in tars.values()) / 2:
        raise DataError(f".txt has {len(names)} different texts, such as {names[0][:60]!r}, no classes; choose --label")
    if names:
        if known is not None and (unknown := sorted(set(names) - set(known))):
            raise DataError(f"--classes {file} does not list {unknown[0]!r}")
        return known or names
    classes = _checked_numbers(numbers, known, tars, file)
    if known:
        return classes
    written: dict[Label, str] = {}
    for tar in tars.values():
        written |= {label: name for label, name in tar.names.items() if name}
    for called in (usual, [written.get(number, "") for number in range(len(classes))]):
        if len(set(called)) == len(called) >= len(classes) and all(called):  # else two have one name, or one has none
            return called
    return classes


def _lines(path: Path, otherwise: str) -> list[str]:
    try:
        return read_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(otherwise.format(path, error)) from error


def _checked_numbers(
    numbers: list[int], known: list[str] | None, tars: dict[str, TarSamples], file: Path | None
) -> list[str]:
    most = len(known) if known else shard_format.MOST_CLASSES
    wrong = numbers[0] if numbers[0] < 0 else numbers[-1]
    if not 0 <= wrong < most:
        which = f"--classes {file} lists {most} classes" if known else f"classes are numbered from 0 to {most - 1}"
        name, tar = next((name, tar) for name, tar in tars.items() if wrong in tar.labels)
        key = tar.keys[tar.labels.index(wrong)]
        raise DataError(f"{name}: sample {key} has label {wrong}, but {which}")
    return known or [str(number) for number in range(numbers[-1] + 1)]


def _write_split(
    out: Path, names: Sequence[str], tars: dict[str, TarSamples], numbers: dict[str, int], made: dict[str, str]
) -> shard_format.SplitRecord:
    """Write the indexes of a split's tars; returns its record."""
    split = shard_format.SplitRecord(samples=0, bytes=0, shards=[], made=dict(made))
    per_class = np.zeros(len(numbers), np.int64)
    for name in names:
        tar = tars[name]
        labels = [number_of(label, numbers) for label in tar.labels]
        content = tar.index(labels)
        index = shard_format.FileRecord(
            name=f"{name.removesuffix('.tar')}.index.npz",
            bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
        )
        (out / index.name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out / index.name, content)
        split.shards.append(
            shard_format.ShardRecord(
                name=name,
                bytes=tar.tar_bytes,
                sha256=tar.sha256,
                etag=tar.etag or None,
                samples=len(labels),
                index=index,
            )
        )
        split.samples += len(labels)
        split.bytes += sum(tar.sizes)
        per_class += np.bincount(np.array(labels, np.int64), minlength=len(numbers))
        split.skipped += [shard_format.SkippedRecord(path=f"{name}: {key}", reason=why) for key, why in tar.skipped]
    split.per_class = per_class.tolist()
    split.empty_classes = [name for name, count in zip(numbers, split.per_class, strict=True) if not count]
    return split


def _print_result(record: shard_format.DatasetRecord, out: Path, rule: LabelRule, notes: Counter[str]) -> None:
    for name, split in record.splits.items():
        empty = len(split.empty_classes)
        counts = (
            f"{name}: {split.samples:,} samples of {len(record.classes)} classes in "
            f"{plural(len(split.shards), 'tar')}; {len(split.skipped)} skipped"
        )
        print(printable(counts + (f"; {empty} classes have no sample" if empty else "")))
        for reason, count in Counter(skipped.reason for skipped in split.skipped).most_common():
            first = next(skipped.path for skipped in split.skipped if skipped.reason == reason)
            print(printable(f"  skipped {count}: {reason} (first: {first})"))
    for what, count in notes.items():
        if count:
            print(f"  {what}: {count}")
    print(printable(f"labels from {rule}; {out / shard_format.DATASET_FILE} lists all. {_what_next(record, out)}"))


def _what_next(record: shard_format.DatasetRecord, out: Path) -> str:
    there = [name for name, split in record.splits.items() if split.samples]
    if "train" not in there:
        return f"It has nothing to train on; evaluate a run on it with `karat eval RUN --on {shlex.quote(str(out))}`"
    place = shlex.quote(f"data.path={out}")
    validation = [name for name in ("val", "test", *there) if name in there and name != "train"]
    if not validation:
        return f"Train with {place}, once it has a validation split: add --split val=PATTERN"
    which = "" if validation[0] == "val" else f" data.val_split={validation[0]}"
    return f"Train with {place}{which}"
