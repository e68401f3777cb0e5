"""`karat index`: makes tars that others wrote readable like our shards, from their headers, without copying them.

It finds tars and their splits, numbers the classes, and writes an index for each tar and dataset.json. A tar is on a
file system or at a URL. A key is a member's path up to the first dot of its last part, as in WebDataset. Members with
one key are a sample, even if others stand between them. The class is written in `.cls`, in a field of `.json`, in
`.txt`, or in the path of the image.
"""

import hashlib
import json
import multiprocessing
import os
import re
import shlex
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from karat_scale.data.shards import shard_format
from karat_scale.data.shards.shards import is_hidden_folder, refuse_broken_link
from karat_scale.data.shards.tars import Member, scan_members
from karat_scale.foundation.console import plural, printable, progress, write_json
from karat_scale.foundation.errors import DataError
from karat_scale.foundation.files import open_to_read, read_text, walk, write_atomically
from karat_scale.foundation.machine import usable_cores
from karat_scale.foundation.stores import Store

T = TypeVar("T")
Label = int | str
"""A class's number or name."""
# Fields of .json that are taken for the class without being asked for.
_USUAL_FIELDS = ("label", "cls", "class", "class_id")
# Python refuses to read numbers of thousands of digits.
_MOST_DIGITS = 20
RULES = "cls, json:FIELD, txt, path"


class NoLabelError(Exception):
    """A sample has no usable image or label; the message is the reason."""


@dataclass(frozen=True)
class LabelRule:
    """Reads the label of a sample.

    Attributes:
        kind: the suffix of the member that has the label, or "path".
        field: the field of a JSON object, with dots for objects inside; "" for other kinds.
    """

    kind: str
    field: str = ""

    def __str__(self) -> str:
        return f"{self.kind}:{self.field}" if self.field else self.kind

    @staticmethod
    def parse(text: str) -> "LabelRule":
        """Return the rule that `--label` names. Raises DataError."""
        kind, colon, field = text.partition(":")
        if kind not in ("cls", "json", "txt", "path") or bool(colon) != (kind == "json") or (colon and not field):
            raise DataError(f"--label {text}: should be one of auto, {RULES}")
        return LabelRule(kind, field)

    def split_name(self, name: str) -> tuple[str, str]:
        """Return the key and the suffix, in lower case, of a member; the key is empty if it is in no sample."""
        folder, slash, file = name.removeprefix("./").rpartition("/")
        stem, dot, suffix = file.rpartition(".") if self.kind == "path" else file.partition(".")
        is_hidden = not stem or not dot
        if self.kind == "path":  # whose stems may have dots, as those that macOS packs beside each file
            is_hidden = is_hidden or file[0] == "." or any(is_hidden_folder(part) for part in folder.split("/"))
        return ("", "") if is_hidden else (f"{folder}{slash}{stem}", suffix.lower())

    def source(self, members: Mapping[str, T]) -> T | None:
        """Return the member that has the label; None if the path has it. Raises NoLabelError."""
        if self.kind == "path":
            return None
        if self.kind not in members:
            raise NoLabelError(f"no label: .{self.kind} is missing")
        return members[self.kind]

    def label(self, path: str, content: bytes) -> Label:
        """Return the label of the image at `path`, given the content of its source. Raises NoLabelError."""
        if self.kind == "path":
            folder = path.removeprefix("./").rpartition("/")[0].rpartition("/")[2]
            return _named(folder, "the image is in no class folder")
        try:
            text = content.decode().strip()
        except UnicodeDecodeError:
            raise NoLabelError(f"no label: .{self.kind} is not UTF-8") from None
        value = self._field_of(text) if self.kind == "json" else text
        if isinstance(value, str) and value.removeprefix("-").isdecimal():
            if len(value) > _MOST_DIGITS:
                raise NoLabelError(f"no label: {self} is a number of {len(value)} digits")
            return int(value)
        if isinstance(value, str):
            return _named(value, f".{self.kind} is empty")
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        raise NoLabelError(f"no label: {self} is {json.dumps(value)}, neither a number nor a name")

    def _field_of(self, text: str) -> Any:
        try:
            value: Any = json.loads(text)
            for name in self.field.split("."):
                value = value[name]
        except (ValueError, RecursionError):
            raise NoLabelError("no label: .json is damaged") from None
        except (KeyError, TypeError, IndexError):
            raise NoLabelError(f"no label: .json has no field {self.field}") from None
        return value


def _named(name: str, otherwise: str) -> str:
    if not name:
        raise NoLabelError(f"no label: {otherwise}")
    if not _is_utf8(name):
        raise NoLabelError("no label: the name of the class is not UTF-8")
    return name


def _is_utf8(name: str) -> bool:
    return name.encode(errors="replace").decode() == name


def number_of(label: Label, numbers: dict[str, int]) -> int:
    """Return the number of a class, given the numbers of the names."""
    return numbers[label] if isinstance(label, str) else label


# What is fetched at once. At 20 ms for a request and 100 MB/s, skipping an image of less than 2 MB would gain nothing.
_WINDOW = 8 << 20


@dataclass(frozen=True)
class Tar:
    """A tar to read.

    Attributes:
        name: the tar's path or URL.
        size: the tar's bytes.
        read: a function of (offset, size) that returns `size` bytes from `offset`; fewer only at the end.
        etag: the server's tag of the tar's content; empty on a file system.
    """

    name: str
    size: int
    read: Callable[[int, int], bytes]
    etag: str = ""


@contextmanager
def open_tar(place: Path | Store, name: str) -> Iterator[Tar]:
    """Open a tar in a directory or at a URL. Raises DataError."""
    if isinstance(place, Store):
        with _remote_tar(place, name) as tar:
            yield tar
        return
    path = place / name
    try:
        with open_to_read(path, 0) as file:
            handle = file.fileno()
            yield Tar(str(path), os.fstat(handle).st_size, lambda at, size: os.pread(handle, size, at))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


@contextmanager
def _remote_tar(store: Store, name: str) -> Iterator[Tar]:
    """Open a tar at a URL. Each part that is read is fetched once, in large pieces, to a file without a name."""
    where, facts = store.where(name), store.facts(name)
    if facts.bytes < 0:
        raise DataError(f"{where}: the server does not say its size; use one that does")
    try:
        with tempfile.TemporaryFile() as file:
            handle, fetched = file.fileno(), set[int]()

            def read(at: int, size: int) -> bytes:
                for window in range(at // _WINDOW, -(-min(at + size, facts.bytes) // _WINDOW)):
                    if window not in fetched:
                        start = window * _WINDOW
                        data = store.read(name, start, min(start + _WINDOW, facts.bytes), facts.etag)
                        os.pwrite(handle, data, start)
                        fetched.add(window)
                return os.pread(handle, size, at)

            yield Tar(where, facts.bytes, read, facts.etag)
    except OSError as error:
        place = tempfile.gettempdir()
        raise DataError(f"{where}: no copy can be kept in {place}: {error.strerror}; set TMPDIR") from error


APART = "samples whose members do not follow each other"
IMAGES = ("jpg", "jpeg", "png", "webp")
_LARGEST_LABEL = 1 << 20


@dataclass
class TarSamples:
    """The samples of one tar. The lists are parallel; `crcs` is empty unless the images were read."""

    keys: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    crcs: list[int] = field(default_factory=list)
    names: dict[Label, str] = field(default_factory=dict)
    """The names of numbered classes, where .json has them as timm's tars do; else an empty text."""
    tar_bytes: int = 0
    sha256: str = ""
    etag: str = ""
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """Members and samples that are not used, with the reason."""
    notes: Counter[str] = field(default_factory=Counter)
    """The number of samples that are used though they are unusual, for each reason."""

    def index(self, labels: list[int]) -> bytes:
        """Return the index file of the tar, given the class numbers of its samples."""
        rows = zip(self.offsets, self.sizes, labels, self.crcs or [0] * len(labels), strict=True)
        return shard_format.index_bytes(list(rows), self.keys)


def read_samples(tar: Tar, rule: LabelRule, with_crc: bool = False, any_image: bool = False) -> TarSamples:
    """Return the samples of a tar.

    Args:
        with_crc: also read each image, for its CRC-32.
        any_image: take every member but the label for an image, as in our own shards.

    Raises:
        DataError: the tar cannot be read, or is damaged.
    """
    found = TarSamples(tar_bytes=tar.size, etag=tar.etag)
    for key, members in _group(scan_members(tar.read, tar.size, tar.name), rule, found):
        images = [
            member for suffix, member in members.items() if suffix in IMAGES or (any_image and suffix != rule.kind)
        ]
        try:
            if not images:
                raise NoLabelError(f"no image ({', '.join(IMAGES)}), only {', '.join(members)}")
            if not images[0].size:
                raise NoLabelError("the image is empty")
            source = rule.source(members)
            label = rule.label(images[0].name, b"" if source is None else _small(tar, source))
        except NoLabelError as error:
            found.skipped.append((key, str(error)))
            continue
        if isinstance(label, int) and label not in found.names:
            # What timm's tars say there.
            name = _json_object(_small(tar, members["json"])).get("class_name") if "json" in members else ""
            found.names[label] = name.strip() if isinstance(name, str) and _is_utf8(name) else ""
        found.notes["samples with several images, of which the first is used"] += len(images) > 1
        found.keys.append(key)
        found.offsets.append(images[0].offset)
        found.sizes.append(images[0].size)
        found.labels.append(label)
        if with_crc:
            found.crcs.append(zlib.crc32(tar.read(images[0].offset, images[0].size)))
    return found


def _group(members: Iterator[Member], rule: LabelRule, found: TarSamples) -> list[tuple[str, dict[str, Member]]]:
    """Return each sample's key and members by suffix, in the order of first members; note others as skipped."""
    apart = set[int]()
    samples: list[tuple[str, dict[str, Member]]] = []
    latest: dict[str, dict[str, Member]] = {}
    for member in members:
        key, suffix = rule.split_name(member.name)
        if member.kind == "directory":
            continue
        if member.kind != "file":
            found.skipped.append((member.name, f"a {member.kind} member, not a regular file"))
        elif not key:
            found.skipped.append((member.name, "a hidden file, or one without a suffix"))
        elif suffix == "tar":
            found.skipped.append((member.name, "a tar inside the tar; index it by itself"))
        else:
            sample = latest.get(key)
            if sample is None or suffix in sample:
                found.notes["keys that repeat"] += sample is not None
                sample = latest[key] = {}
                samples.append((key, sample))
            elif sample is not samples[-1][1]:
                apart.add(id(sample))
            sample[suffix] = member
    found.notes[APART] = len(apart)
    return samples


def _small(tar: Tar, member: Member) -> bytes:
    return tar.read(member.offset, min(member.size, _LARGEST_LABEL))


def guess_label_rule(source: Path | Store, names: Sequence[str]) -> LabelRule:
    """Return the rule for the class of samples, judged by the first of these tars that has members.

    Raises:
        DataError: nothing in the tar is certain to be a class.
    """
    for name in names:
        with open_tar(source, name) as tar:
            if rule := _rule_of(tar):
                return rule
    return LabelRule("path")


def _rule_of(tar: Tar) -> LabelRule | None:
    content: bytes | None = None
    suffixes: set[str] = set()
    for member in scan_members(tar.read, tar.size, tar.name):
        if member.kind == "directory":
            continue
        suffix = LabelRule("cls").split_name(member.name)[1]
        suffixes.add(suffix)
        if suffix == "json" and content is None:
            content = _small(tar, member)
    if "cls" in suffixes:
        return LabelRule("cls")
    if content is not None:
        fields = [key for key, value in _json_object(content).items() if isinstance(value, int | str)]
        for field in _USUAL_FIELDS:
            if field in fields:
                return LabelRule("json", field)
        raise DataError(f"{tar.name}: choose the class by --label json:FIELD; .json has the fields {', '.join(fields)}")
    if not suffixes:
        return None
    return LabelRule("txt") if "txt" in suffixes else LabelRule("path")


def _json_object(content: bytes) -> dict[str, Any]:
    """Return the object in a .json; an empty one if it is damaged or no object."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_PACKED = re.compile(r"\.(tar\.(gz|bz2|xz|zst)|tgz)$")
_NAME_IN_RECORD = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)*")


def find_tars(source: Path | Store) -> list[str]:
    """Return the tars in a directory or at a URL and below it, as sorted paths relative to it. Raises DataError.

    It leaves out compressed and misnamed tars, and prints a line about them.
    """
    if isinstance(source, Store):
        where, files = source.url, list(source.files())
    elif source.is_dir():
        where, files = str(source), _files_under(source)
    else:
        raise DataError(f"{source} is not a directory; name the one that holds the tars")
    names = sorted(name for name in files if name.endswith(".tar"))
    packed = sorted(name for name in files if _PACKED.search(name))
    renamed = sorted(name for name in files if name.lower().endswith(".tar") and not name.endswith(".tar"))
    if not names:
        found = "and nothing to index; name the directory that holds the tars"
        if renamed:
            found = f"only files such as {renamed[0]}; rename them to .tar"
        elif packed:
            found = f"only compressed ones such as {packed[0]}; decompress them first"
        raise DataError(f"{where} has no *.tar, {found}")
    for left_out, what in ((packed, "compressed tar"), (renamed, "misnamed tar")):
        if left_out:
            print(printable(f"note: {plural(len(left_out), what)} left out, such as {left_out[0]}"))
    for name in names:
        if not _NAME_IN_RECORD.fullmatch(name):
            raise DataError(
                f"{where}/{name}: the name has other characters than letters, digits, _, . and -; rename it"
            )
    return names


def _files_under(source: Path) -> list[str]:
    """Return the files below a directory and in linked ones, as paths relative to it; hidden ones are skipped.

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
        rules: `NAME=GLOB` each, such as `train=shard-0*.tar`; without any, the word train, val, validation or
            test in a path decides, and tars without such a word are for training.

    Raises:
        DataError: a rule fits no tar, or a tar fits none.
    """
    splits: dict[str, list[str]] = {}
    if not rules:
        for name in names:
            splits.setdefault(split_named_in(name, _NAMES) or "train", []).append(name)
        return splits
    left = list(names)
    for rule in rules:
        split, equals, pattern = rule.partition("=")
        if not equals or not re.fullmatch(r"\w+", split):
            raise DataError(f"--split {rule}: should be NAME=GLOB, such as train=train-*.tar")
        fitting = [name for name in left if fnmatchcase(name, pattern)]
        if not fitting:
            why = "an earlier --split has all tars; put this one first"
            if left:
                why = f"no tar that is left has such a path; the first of these is {left[0]}"
            raise DataError(f"--split {rule}: {why}")
        splits.setdefault(split, []).extend(fitting)
        left = [name for name in left if name not in set(fitting)]
    if left:
        raise DataError(f"{plural(len(left), 'tar')} in no split, such as {left[0]}; add --split NAME=GLOB")
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
    """A request to index tars.

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
    place = request.source
    source = Store(place, tell=shard_format.tell_of_store) if isinstance(place, str) else place.expanduser().resolve()
    if isinstance(source, Store) and request.out is None:
        raise DataError(f"add --out DIR, a directory for the indexes of {source.url}")
    known = _lines(request.classes, "--classes {} cannot be read: {}") if request.classes else None
    if known is not None and (not known or len(set(known)) < len(known) or not all(known)):
        raise DataError(f"--classes {request.classes}: should have one name on each line, and no name twice")
    names = find_tars(source)
    out = _output(source, request.out)
    splits = into_splits(names, request.splits)
    is_guessed = request.label == "auto"
    rule = guess_label_rule(source, splits.get("train", names)) if is_guessed else LabelRule.parse(request.label)
    tars = _read_all(source, names, rule, request.with_hashes)
    usual: list[str] = []
    if not request.classes and isinstance(source, Path) and (source / "classnames.txt").exists():
        usual = _lines(source / "classnames.txt", "{} cannot be read: {}; give the names by --classes FILE")
    classes = _classes(tars, rule, request.classes, known, usual)
    numbers = {name: number for number, name in enumerate(classes)}
    root = source.url if isinstance(source, Store) else "" if out == source else str(source)
    record = shard_format.DatasetRecord(classes=classes, root=root)
    if out == source:
        (out / shard_format.OTHERS_FILE).touch()
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
    """Return the output directory, after a check that it can be written. Raises DataError."""
    if out is None:
        assert isinstance(source, Path)
        out = source
    out = out.expanduser().resolve()
    if (out / shard_format.DATASET_FILE).is_file() and not is_indexed(shard_format.read_dataset_record(out)):
        raise DataError(f"{out} has a {shard_format.DATASET_FILE} of karat prepare webdataset; it needs no index")
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / ".karat-index", "")
        (out / ".karat-index").unlink(missing_ok=True)  # another run may have done it
    except OSError as error:
        fix = "add --out DIR, where the indexes go instead" if out == source else "choose another --out"
        raise DataError(f"{out} cannot be written: {error.strerror}; {fix}") from error
    return out


def is_indexed(record: shard_format.DatasetRecord) -> bool:
    """Return whether a data set was made by `karat index`, from tars that others wrote."""
    return any(split.made.get("by") == MADE_BY for split in record.splits.values())


def _read_all(source: Path | Store, names: Sequence[str], rule: LabelRule, with_hashes: bool) -> dict[str, TarSamples]:
    """Read tars on a file system in processes, and tars at a URL in threads, which mostly wait.

    No process is forked while connections are open: a lock that another thread held would stay locked in the child.
    """
    read, tars = partial(_read_one, source, rule, with_hashes), {}
    pool: ThreadPool | ProcessPoolExecutor
    if isinstance(source, Store):
        where, pool = source.url, ThreadPool(min(_REQUESTS, len(names)))
    else:
        forks = multiprocessing.get_context("fork")
        where, pool = str(source), ProcessPoolExecutor(min(usable_cores(), len(names)), forks)
    with progress(f"indexing {where}", len(names), "tars") as advance, pool:
        try:
            found = pool.imap(read, names) if isinstance(pool, ThreadPool) else pool.map(read, names)
            for name, tar in zip(names, found, strict=True):
                tars[name] = tar
                advance(1)
        except BrokenProcessPool as error:
            fix = "use fewer cores, as by taskset -c 0, if memory is short"
            raise DataError(f"a worker process died; {fix}") from error
    return tars


def _read_one(source: Path | Store, rule: LabelRule, with_hashes: bool, name: str) -> TarSamples:
    with open_tar(source, name) as tar:
        samples, digest = read_samples(tar, rule, with_crc=with_hashes), hashlib.sha256()
        for start in range(0, tar.size if with_hashes else 0, _BLOCK):
            digest.update(tar.read(start, _BLOCK))
        samples.sha256 = digest.hexdigest() if with_hashes else ""
        return samples


def _classes(
    tars: dict[str, TarSamples], rule: LabelRule, file: Path | None, known: list[str] | None, usual: list[str]
) -> list[str]:
    """Return the names of the classes, in order.

    Args:
        file: the user's file of names.
        known: the names in this file; None without one.
        usual: the names in the file that open_clip's data sets have beside their tars; empty if there is none.

    Raises:
        DataError: some labels are names and others numbers, or labels are not classes.
    """
    labels = {label for tar in tars.values() for label in tar.labels}
    if not labels:
        reasons = Counter(reason for tar in tars.values() for _, reason in tar.skipped)
        most = reasons.most_common(1)[0][0] if reasons else "the tars are empty"
        fix = "choose another --label, or correct the tars"
        raise DataError(f"no sample has an image and a label, by --label {rule}: {most}; {fix}")
    names = sorted(label for label in labels if isinstance(label, str))
    numbers = sorted(label for label in labels if not isinstance(label, str))
    if names and numbers:
        kinds = f"labels are names, such as {names[0]!r}, and numbers, such as {numbers[0]}"
        raise DataError(f"{kinds}; choose --label from {RULES}, so that all are of one kind")
    if rule.kind == "txt" and known is None and len(names) > sum(len(tar.labels) for tar in tars.values()) / 2:
        fix = "give --classes FILE or choose another --label"
        texts = f"{len(names)} different texts, such as {names[0][:60]!r}"
        raise DataError(f".txt has {texts}, so it holds captions and no classes; {fix}")
    if names:
        if known is not None and (unknown := sorted(set(names) - set(known))):
            raise DataError(f"--classes {file} does not list {unknown[0]!r}; add it")
        return known or names
    limit = len(known) if known else shard_format.MOST_CLASSES
    wrong = numbers[0] if numbers[0] < 0 else numbers[-1]
    if not 0 <= wrong < limit:
        which = f"--classes {file} lists {limit} classes" if known else f"classes are numbered from 0 to {limit - 1}"
        name, tar = next((name, tar) for name, tar in tars.items() if wrong in tar.labels)
        key = tar.keys[tar.labels.index(wrong)]
        raise DataError(f"{name}: sample {key} has label {wrong}, but {which}; correct it, or choose another --label")
    if known:
        return known
    classes = [str(number) for number in range(numbers[-1] + 1)]
    written: dict[Label, str] = {}
    for tar in tars.values():
        written |= {label: name for label, name in tar.names.items() if name}
    for called in (usual, [written.get(number, "") for number in range(len(classes))]):
        if len(set(called)) == len(called) >= len(classes) and all(called):  # else two have one name, or one has none
            return called
    return classes


def _lines(path: Path, otherwise: str) -> list[str]:
    try:
        return read_text(path).removeprefix("\ufeff").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(otherwise.format(path, getattr(error, "strerror", None) or error)) from error


def _write_split(
    out: Path, names: Sequence[str], tars: dict[str, TarSamples], numbers: dict[str, int], made: dict[str, str]
) -> shard_format.SplitRecord:
    """Write the indexes of a split's tars; returns its record."""
    apart = sum(tars[name].notes[APART] for name in names)
    split = shard_format.SplitRecord(
        samples=0, bytes=0, shards=[], made={**made, **({"apart": apart} if apart else {})}
    )
    per_class = np.zeros(len(numbers), np.int64)
    for name in names:
        tar = tars[name]
        labels = [number_of(label, numbers) for label in tar.labels]
        content = tar.index(labels)
        index = shard_format.file_record(f"{name.removesuffix('.tar')}.index.npz", content)
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
            f"{name}: {plural(split.samples, 'sample')} of {plural(len(record.classes), 'class')} in "
            f"{plural(len(split.shards), 'tar')}; {len(split.skipped)} skipped"
        )
        print(printable(counts + (f"; {plural(empty, 'class')} without a sample" if empty else "")))
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
        return f"Train with {place}, once it has a validation split: add --split val=GLOB"
    which = "" if validation[0] == "val" else f" data.val_split={validation[0]}"
    return f"Train with {place}{which}"
