"""The samples of one tar: its bytes, which member is the image, and where the class is written.

The tar is on a file system or at a URL. A key is a member's path up to the first dot of its last part, as in
WebDataset. Members with one key are a sample, even if others stand between them. The class is written in `.cls`, in a
field of `.json`, in `.txt`, or in the path of the image.
"""

import json
import os
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from karat_scale.data.shards.shard_format import index_bytes
from karat_scale.data.shards.shards import is_hidden_folder
from karat_scale.data.shards.tars import Member, scan_members
from karat_scale.foundation.errors import DataError
from karat_scale.foundation.files import open_to_read
from karat_scale.foundation.stores import Store

Label = int | str
"""A class's number or name."""
# Fields of .json that are taken for the class without being asked for.
_USUAL_FIELDS = ("label", "cls", "class", "class_id")
# Python refuses to read numbers of thousands of digits.
_MOST_DIGITS = 20
RULES = "cls, json:FIELD, txt, path"


class NoLabelError(Exception):
    """A sample has no usable label; the message is the reason."""


@dataclass(frozen=True)
class LabelRule:
    """Reads the label of a sample.

    Attributes:
        kind: the suffix of the member that has it, or "path".
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
        """Return the key and the suffix, in small letters, of a member; an empty key for one that is in no sample."""
        folder, slash, file = name.removeprefix("./").rpartition("/")
        stem, dot, suffix = file.rpartition(".") if self.kind == "path" else file.partition(".")
        is_hidden = not stem or not dot
        if self.kind == "path":  # whose stems may have dots, as those that macOS packs beside each file
            is_hidden = is_hidden or file[0] == "." or any(is_hidden_folder(part) for part in folder.split("/"))
        return ("", "") if is_hidden else (f"{folder}{slash}{stem}", suffix.lower())

    def source(self, members: Mapping[str, Member]) -> Member | None:
        """Return the member to read; None if the path says the class. Raises NoLabelError."""
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
            raise NoLabelError(f"no label: .{self.kind} is no UTF-8") from None
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
        raise NoLabelError("no label: the name of the class is no UTF-8")
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
        name: its path or URL.
        size: in bytes.
        read: returns `size` bytes from `offset`; fewer only at the end.
        etag: what its server says of its content; empty on a file system.
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
    """Open a tar at a URL. What is read of it is fetched once, in large pieces, to a file that has no name."""
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


IMAGES = ("jpg", "jpeg", "png", "webp")
_LARGEST_LABEL = 1 << 20


@dataclass
class TarSamples:
    """What one tar holds. The lists go in step; `crcs` is empty unless the images were read."""

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
    """How many samples are unusual in a way, and used."""

    def index(self, labels: list[int]) -> bytes:
        """Return the index file of the tar, with the classes' numbers of its samples."""
        rows = zip(self.offsets, self.sizes, labels, self.crcs or [0] * len(labels), strict=True)
        return index_bytes(list(rows), self.keys)


def read_samples(tar: Tar, rule: LabelRule, with_crc: bool = False, any_image: bool = False) -> TarSamples:
    """Return the samples of a tar.

    Args:
        with_crc: also read each image, for its CRC-32.
        any_image: as in shards of ours, every member but the label is an image.

    Raises:
        DataError: the tar cannot be read, or is damaged.
    """
    found = TarSamples(tar_bytes=tar.size, etag=tar.etag)
    for key, members in _group(scan_members(tar.read, tar.size, tar.name), rule, found):
        images = [
            member for suffix, member in members.items() if suffix in IMAGES or (any_image and suffix != rule.kind)
        ]
        if not images:
            found.skipped.append((key, f"no image ({', '.join(IMAGES)}), only {', '.join(members)}"))
        elif not images[0].size:
            found.skipped.append((key, "the image is empty"))
        else:
            _add(key, members, images, tar, rule, with_crc, found)
    return found


def _group(members: Iterator[Member], rule: LabelRule, found: TarSamples) -> list[tuple[str, dict[str, Member]]]:
    """Return keys and members by suffix of the samples, in the order of their first members; others are skipped."""
    samples: list[tuple[str, dict[str, Member]]] = []
    latest: dict[str, dict[str, Member]] = {}
    for member in members:
        key, suffix = rule.split_name(member.name)
        if member.kind == "directory":
            continue
        if member.kind != "file":
            found.skipped.append((member.name, f"it is no plain file but a {member.kind} member"))
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
            sample[suffix] = member
    return samples


def _add(
    key: str,
    members: dict[str, Member],
    images: list[Member],
    tar: Tar,
    rule: LabelRule,
    with_crc: bool,
    found: TarSamples,
) -> None:
    """Add a sample by its first image, or note why it has no label."""
    image = images[0]
    try:
        source = rule.source(members)
        label = rule.label(image.name, b"" if source is None else _small(tar, source))
    except NoLabelError as error:
        found.skipped.append((key, str(error)))
        return
    if isinstance(label, int) and label not in found.names:
        # What timm's tars say there.
        name = _json_object(_small(tar, members["json"])).get("class_name") if "json" in members else ""
        found.names[label] = name.strip() if isinstance(name, str) and _is_utf8(name) else ""
    found.notes["samples with several images, of which the first is used"] += len(images) > 1
    found.keys.append(key)
    found.offsets.append(image.offset)
    found.sizes.append(image.size)
    found.labels.append(label)
    if with_crc:
        found.crcs.append(zlib.crc32(tar.read(image.offset, image.size)))


def _small(tar: Tar, member: Member) -> bytes:
    return tar.read(member.offset, min(member.size, _LARGEST_LABEL))


def guess_label_rule(tar: Tar) -> LabelRule:
    """Return where the samples of a tar have their class, judged by its members.

    Raises:
        DataError: nothing in it is a class for certain.
    """
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
    return LabelRule("txt") if "txt" in suffixes else LabelRule("path")


def _json_object(content: bytes) -> dict[str, Any]:
    """Return what a .json holds; nothing if it is damaged or no object."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
