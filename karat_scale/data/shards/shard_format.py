"""The files in a directory of shards besides the tars: records and indexes, and the checks of both.

    dataset.json              classes in order; per split: shards, settings, the skipped images with reasons
    train-000000.tar          WebDataset tar: <key>.cls, <key>.jpg, <key>.cls, ...
    train-000000.index.npz    per sample of that tar: offset, size, label, crc32, key
    ...
    val-000000.tar, ...

A sample's id is its position in the split: shard after shard, in the order of dataset.json. The launch wrapper may have
made a copy of the shards on a local disk of this node.

An index has columns of numbers and the samples' keys, for shards and for betons. Another program may have written it,
so even an index with the right hash may be wrong. Its columns are checked once, when a split is opened.

The checks of files against their records, and of classes against the model, serve shards, betons and folders.
"""

import hashlib
import io
import json
import os
import shlex
import stat
import sys
import threading
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from karat_scale.foundation.console import printable
from karat_scale.foundation.errors import DataError, nearest
from karat_scale.foundation.files import read_text, write_atomically
from karat_scale.foundation.stores import Store, is_url
from karat_scale.foundation.tables import Files
from karat_scale.recipe import DataConfig
from karat_scale.recipe.base import first_mistake

_FIX = "make it with karat prepare webdataset"
DATASET_FILE, TIMM_FILE = "dataset.json", "info.json"
OTHERS_FILE = ".indexed"  # beside tars that others made, from the first index that karat index writes there
# A record lists each file of a source that is skipped or odd: of ImageNet-21k, that may be millions.
LARGEST_RECORD = 2**30
# The most numbered classes. Larger numbers are probably those of images.
MOST_CLASSES = 1_000_000
# A name in dataset.json must not point outside of its directory.
FileName = Field(pattern=r"^[\w-][\w.-]*(/[\w-][\w.-]*)*$")
# A file name may be any bytes; in a report, bytes that are not UTF-8 become \xNN.
ReportedPath = Annotated[str, BeforeValidator(lambda path: os.fsencode(path).decode(errors="backslashreplace"))]


M = TypeVar("M", bound=BaseModel)


class FileRecord(BaseModel):
    """A file's name, size and hash when it was written."""

    model_config = ConfigDict(extra="forbid")

    name: str = FileName
    bytes: int
    sha256: str


def file_record(name: str, content: bytes) -> FileRecord:
    """Return the record of a file with this content."""
    return FileRecord(name=name, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


class ShardRecord(FileRecord):
    """A tar shard and its index.

    Unless `karat index` is asked for hashes, it reads only headers: then `sha256` is empty, and the index has 0 for
    each crc32. For a tar at a URL, `etag` is its server's tag of the content.
    """

    sha256: str = ""
    etag: str | None = None
    samples: int
    index: FileRecord


class SkippedRecord(BaseModel):
    """A source image that is in no shard."""

    path: ReportedPath
    reason: str


class OddRecord(BaseModel):
    """A source image on which decoders or viewers disagree, and what was done with it."""

    path: ReportedPath
    what: str
    done: Literal["kept", "converted", "turned", "skipped"]


class SplitRecord(BaseModel):
    """One split. `made`: the source and the settings. `per_class`: the number of samples of each class.

    `empty_classes`: the names of the classes without a sample.
    """

    model_config = ConfigDict(extra="forbid")

    samples: int
    bytes: int
    shards: list[ShardRecord]
    made: dict[str, Any] = {}
    skipped: list[SkippedRecord] = []
    odd: list[OddRecord] = []
    grey: int = 0
    per_class: list[int] = []
    empty_classes: list[str] = []


class DatasetRecord(BaseModel):
    """The content of dataset.json."""

    model_config = ConfigDict(extra="forbid")

    format: Literal["karat-shards"] = "karat-shards"
    version: Literal[1] = 1
    classes: list[str]
    # The readable names of the classes, in the same order; empty if unknown.
    names: list[str] = []
    splits: dict[str, SplitRecord] = {}
    # The directory or the URL of the tars, if they are not beside this file: `karat index --out`.
    root: str = ""

    def tars_of(self, directory: Path | str) -> Path | str:
        """Return the directory or the URL of the tars, given that of dataset.json."""
        return dataset_directory(self.root) if self.root else directory


def dataset_directory(path: Path | str) -> Path | str:
    """Return a data set's directory, or its URL as it is."""
    return path if isinstance(path, str) and is_url(path) else Path(path).expanduser()


def absolute_path(path: str) -> str:
    """Return `data.path` as it means the same from every directory."""
    directory = dataset_directory(path)
    return directory if isinstance(directory, str) else str(directory.absolute())


def read_dataset_record(directory: Path | str, timeout: float | None = None, what: str = "data.path") -> DatasetRecord:
    """Read dataset.json of a directory or at a URL.

    Args:
        timeout: data.timeout, for a URL; None if no recipe sets it.
        what: the key or the option that names the directory, for messages.

    Raises:
        DataError: the directory or the file is missing, empty or damaged.
    """
    fix = "restore or remove it, or use another --out" if what == "--out" else _FIX
    return _validated(DatasetRecord, f"{directory}/{DATASET_FILE}", lambda: _record_text(directory, timeout, what), fix)


def _validated(kind: type[M], path: object, read: Callable[[], str], fix: str) -> M:
    """Return a record from the JSON that `read` returns. Raises DataError, which names `path`, if that fails."""
    try:
        return kind.model_validate_json(read())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; {fix}") from error
    except UnicodeDecodeError:
        raise DataError(f"{path} is damaged: it is not UTF-8; {fix}") from None
    except ValidationError as error:
        fix = f"remove it and {fix}" if fix == _FIX else fix
        raise DataError(f"{path} is damaged or of another version ({first_mistake(error)}); {fix}") from error


def tell_of_store(text: str) -> None:
    """Print a note of a store that fails for long, on the first rank of a launcher."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        print(printable(f"note: {text}"), file=sys.stderr, flush=True)


def _record_text(directory: Path | str, timeout: float | None, what: str) -> str:
    if isinstance(directory, str):
        store = Store(directory, timeout, tell_of_store)
        return store.read_small(DATASET_FILE, LARGEST_RECORD).decode("utf-8")
    check_has_record(directory, what)
    return read_record_text(directory / DATASET_FILE)


def not_a_directory(path: Path) -> str:
    """Return the message for a path that is no directory; for a relative path, also where it was looked for."""
    return f"{path} is not a directory{'' if path.is_absolute() else f' in {Path.cwd()}'}"


def require_directory(path: Path, files: Files, what: str = "data.path") -> None:
    """Raise DataError unless the path in the key or option `what` is a directory. files: what it should contain."""
    if not path.is_dir():
        raise DataError(f"{what} = {not_a_directory(path)}; set it to {files.value}")


SPLIT_FOLDERS = ("train", "val", "valid", "validation", "test")


def check_has_record(directory: Path, what: str = "data.path") -> None:
    """Raise DataError unless a directory, which the key or option `what` names, exists and has a dataset.json."""
    require_directory(directory, Files.SHARDS, what)
    if (directory / DATASET_FILE).is_file():
        return
    inside = list(directory.iterdir())
    found = f"has no {DATASET_FILE}" if inside else "is empty"
    folders = {path.name for path in inside if path.is_dir() and not path.name.startswith(".")}
    fix = _FIX
    if any(path.name.endswith(".index.npz") for path in inside):
        fix = "finish it with the command that began it"
    elif any(path.suffix == ".tar" for path in inside):
        fix = "index its tars with karat index"
    elif what == "data.path" and folders & {*SPLIT_FOLDERS, "training"}:
        fix = f"{_FIX}, set data.backend=folder for a folder of images,"
    elif what == "data.path" and folders:
        fix = f"{flat_fix(directory)},"
    raise DataError(f"{what} = {directory} {found}; {fix} or correct the path")


def read_record_text(path: Path) -> str:
    """Return the text of a data set's record, like `read_text`. Memory is allocated by its size, not by the limit."""
    return read_text(path, min(path.stat().st_size, LARGEST_RECORD))


def chosen_splits(directory: Path | str, record: DatasetRecord, split: str | None) -> dict[str, SplitRecord]:
    """Return one split of a data set by name, or all. Raises DataError if there is none."""
    chosen = {name: found for name, found in record.splits.items() if split in (None, name)}
    if not chosen:
        there = ", ".join(record.splits) or "none"
        raise DataError(f"{directory} has no split {split!r}; the splits there: {there}")
    return chosen


def write_dataset_record(directory: Path, record: DatasetRecord) -> None:
    """Write dataset.json atomically; before it, for our own shards, write info.json, which timm's reader needs."""
    if not record.root and not any("by" in split.made for split in record.splits.values()):
        splits = {
            name: {
                "name": name,
                "num_samples": split.samples,
                "filenames": [shard.name for shard in split.shards],
                "shard_lengths": [shard.samples for shard in split.shards],
            }
            for name, split in record.splits.items()
        }
        write_atomically(directory / TIMM_FILE, json.dumps({"splits": splits}, indent=1) + "\n")
    text = json.dumps(record.model_dump(exclude_none=True), indent=1, ensure_ascii=False) + "\n"
    write_atomically(directory / DATASET_FILE, text)


class BetonRecord(ShardRecord):
    """The content of a beton's JSON file.

    made: the source and the settings. modes: sample counts by storage mode. odd: images on which decoders
    disagree, and those that no decoder reads.
    """

    format: Literal["karat-beton"] = "karat-beton"
    version: Literal[1] = 1
    split: str
    classes: list[str]
    names: list[str] = Field(default_factory=list)
    made: dict[str, Any] = Field(default_factory=dict)
    modes: dict[str, int] = Field(default_factory=dict)
    skipped: list[SkippedRecord] = Field(default_factory=list)
    odd: list[OddRecord] = Field(default_factory=list)
    grey: int = 0
    per_class: list[int] = Field(default_factory=list)
    empty_classes: list[str] = Field(default_factory=list)


def beton_path(directory: Path, split: str) -> Path:
    """Return the beton of a split."""
    return directory / f"{split}.beton"


def record_path(beton: Path) -> Path:
    """Return the JSON file beside a beton."""
    return beton.with_name(f"{beton.name}.json")


def index_path(beton: Path) -> Path:
    """Return the index beside a beton."""
    return beton.with_name(f"{beton.name}.index.npz")


def read_record(beton: Path) -> BetonRecord:
    """Read the JSON file beside a beton. Raises DataError if it is missing or damaged."""
    path = record_path(beton)
    fix = "make the beton with karat prepare ffcv, or correct data.path"
    return _validated(BetonRecord, path, lambda: read_record_text(path), fix)


INDEX_FIELDS = {"offset": np.int64, "size": np.int64, "label": np.int32, "crc32": np.uint32}


def index_bytes(rows: list[tuple[int, int, int, int]], keys: list[str]) -> bytes:
    """Return the index file of a shard from rows of (offset, size, label, crc32)."""
    columns = np.array(rows, dtype=np.int64).reshape(-1, len(INDEX_FIELDS))
    arrays: dict[str, Any] = {name: columns[:, i].astype(kind) for i, (name, kind) in enumerate(INDEX_FIELDS.items())}
    buffer = io.BytesIO()
    arrays["key"] = np.array([key.encode(errors="surrogateescape") for key in keys], dtype=np.bytes_)
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def staged_copy(path: str, environ: Mapping[str, str] = os.environ) -> str | None:
    """Return this node's copy of the shards at `data.path`; None if there is none, or only an incomplete one.

    `environ` has the source of the copy in KARAT_SHARDS and its target in KARAT_STAGED. The recipe does not, since
    another node or a later evaluation reads the shards at `data.path`.
    """
    copy = environ.get("KARAT_STAGED")
    if not copy or environ.get("KARAT_SHARDS") != path:
        return None
    return copy if (Path(copy) / DATASET_FILE).is_file() else None  # stage.py writes it last


Column = npt.NDArray[Any]
KEY = "key"


def read_columns(data: bytes, kinds: Mapping[str, Any], samples: int, file_bytes: int) -> dict[str, Column]:
    """Return the columns of an index's bytes, as numbers of these kinds.

    Args:
        kinds: the dtype of each column; `offset` and `size` are among them.
        samples: how many samples there must be.
        file_bytes: the size of the file that holds them.

    Raises:
        ValueError: it is no index of such a file; the message says why, in a few words.
    """
    columns = {name: _numbers(read_column(data, name), name, kind) for name, kind in kinds.items()}
    keys = read_column(data, KEY)
    if keys.dtype.kind != "S":
        raise ValueError(f"column {KEY} does not hold names")
    for name, column in (*columns.items(), (KEY, keys)):
        if column.shape != (samples,):
            raise ValueError(f"column {name} has the shape {column.shape}, and there are {samples} samples")
    outside = (columns["size"] < 0) | (columns["offset"] < 0) | (columns["offset"] > file_bytes - columns["size"])
    if outside.any():
        raise ValueError(f"sample {outside.argmax()} lies outside of the file's {file_bytes} bytes")
    return columns


def read_column(data: bytes, name: str) -> Column:
    """Return one column of an index's bytes, as it is.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    try:
        with np.lib.npyio.NpzFile(io.BytesIO(data), allow_pickle=False) as archive:
            return np.asarray(archive[name])
    except KeyError:
        raise ValueError(f"it has no column {name}") from None
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, MemoryError, NotImplementedError, SyntaxError) as error:
        raise ValueError(f"it is not an npz file: {str(error)[:100] or type(error).__name__}") from None


def key_of(data: bytes, sample: int) -> str:
    """Return the key of a sample, for messages. Bytes that are not UTF-8 become \\xNN."""
    key: bytes = read_column(data, KEY)[sample]
    return key.decode(errors="backslashreplace")


def keys_of(data: bytes) -> list[str]:
    """Return the keys of all samples, as `key_of`."""
    return [key.decode(errors="backslashreplace") for key in read_column(data, KEY).tolist()]


def _numbers(column: Column, name: str, kind: Any) -> Column:
    if column.dtype.kind not in "iu":
        raise ValueError(f"column {name} does not hold whole numbers")
    limits = np.iinfo(kind)
    if column.size and (int(column.min()) < limits.min or int(column.max()) > limits.max):
        raise ValueError(f"column {name} has numbers that are out of range")
    return column.astype(kind, copy=False)


_PIECE = 1 << 20


@dataclass(frozen=True)
class Wording:
    """Words for messages about a kind of file: where its record is, how to fix it, and that it is missing."""

    said_by: str
    fix: str
    missing: str = "is missing"


SHARD_WORDING = Wording(
    DATASET_FILE,
    "copy the shards again or make them again with karat prepare webdataset (tars of others: karat index)",
    f"is missing, though {DATASET_FILE} lists it",
)
BETON_WORDING = Wording("its record", "copy it again or make it again with karat prepare ffcv")


def must_answer(path: Path, timeout: float) -> None:
    """Wait until a path can be opened or is found missing. Raises DataError after `timeout` seconds.

    A dead server's file system blocks the caller and lets no signal through, so a thread opens the path.
    """

    def ask() -> None:
        with suppress(OSError):
            os.close(os.open(path, os.O_RDONLY))

    asking = threading.Thread(target=ask, name="karat-ask", daemon=True)
    asking.start()
    asking.join(timeout)
    if asking.is_alive():
        raise DataError(
            f"data.path = {path} did not answer for data.timeout = {timeout:g} s; check its file system, or raise "
            "data.timeout if it is only slow"
        )


def check_data_path(data: DataConfig) -> None:
    """Refuse a `data.path` without data. The check is cheap, so commands make it before they import torch.

    Raises:
        DataError: it does not exist, has no dataset.json though it should, or does not answer.
    """
    if data.row.files is None or is_url(data.path) or staged_copy(data.path):
        return
    try:
        directory = Path(data.path).expanduser()
    except RuntimeError:
        raise DataError(f"data.path = {data.path}: the user after ~ is not known here; write the whole path") from None
    must_answer(directory, data.timeout)
    if data.row.files is Files.SHARDS:
        check_has_record(directory)
    else:
        require_directory(directory, data.row.files)


def split_of(directory: Path | str, record: DatasetRecord, split: str, num_classes: int) -> SplitRecord:
    """Return a split that a model of these classes can use. Raises DataError if there is none."""
    if split not in record.splits or record.splits[split].samples == 0:
        there = [name for name, found in record.splits.items() if found.samples]
        raise DataError(
            f"{directory} has no samples of split {split!r}; the splits there: {', '.join(there) or 'none'}"
            + split_fix(split, there)
        )
    check_class_count(directory, len(record.classes), num_classes)
    return record.splits[split]


def flat_fix(directory: Path) -> str:
    """Return what to do with a folder of classes that has no splits."""
    prepare = f"karat prepare webdataset --src {shlex.quote(str(directory))} --out SHARDS --val-fraction 0.1"
    return f"for a folder of classes, run {prepare}, or move the classes into {directory / 'train'}"


def split_fix(split: str, there: Collection[str]) -> str:
    """Return what to do where a data set lacks a split and has others; an empty text if it has none."""
    if not there:
        return ""
    if split == "train":
        return "; set data.train_split to one of them"
    usual = ("val", "validation", "valid", "test")
    if split not in usual and (close := nearest(split, there)):
        return f"; did you mean data.{'train' if close[0] == 'train' else 'val'}_split={close[0]}?"
    if split not in usual:
        return "; set data.train_split or data.val_split to one of them"
    others = [name for name in usual if name in there]
    if others:
        return f"; set data.val_split={others[0]}"
    one_of_them = "set data.val_split to one of them, or " if {*there} - {"train"} else ""
    return f"; {one_of_them}make one by karat prepare webdataset --val-fraction 0.1"


def check_class_count(place: Path | str, classes: int, num_classes: int) -> None:
    """Refuse data with more classes than the model. Raises DataError."""
    if classes > num_classes:
        raise DataError(
            f"{place} has {classes} classes, but model.num_classes = {num_classes}; use other data, or train with "
            f"model.num_classes={classes}"
        )


def unused_classes(classes: int, num_classes: int) -> str:
    """Return a notice if the data has a single class, or fewer than the model; else an empty text."""
    if classes == 1 < num_classes:
        return "the data has one class, so each answer is right; put the images of each class into a folder of its own"
    if classes >= num_classes:
        return ""
    return (
        f"the data has {classes} classes, but model.num_classes = {num_classes}: the other outputs stay unused; "
        f"unless that is intended, begin a run with model.num_classes={classes}"
    )


def check_file(path: Path, record: FileRecord, by_hash: bool, wording: Wording = SHARD_WORDING) -> None:
    """Compare a file with its record by size or by SHA-256. Raises DataError."""
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path} {wording.missing}; {wording.fix}") from error
    if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
        raise DataError(f"{path} is not a regular file; {wording.fix}")
    size = status.st_size
    if size != record.bytes:
        how = "is cut short" if size < record.bytes else "has changed since it was written"
        raise DataError(f"{path} {how}: {size} bytes, {wording.said_by} says {record.bytes}; {wording.fix}")
    if by_hash:
        for _ in hash_file(path, record, wording):
            pass


def damage_of(directory: Path, record: ShardRecord, wording: Wording = SHARD_WORDING) -> str:
    """Return what is wrong with a file or its index, by their hashes; "" if they are as they were written."""
    try:
        for file in (record, record.index):
            check_file(directory / file.name, file, by_hash=True, wording=wording)
    except DataError as error:
        return str(error).split(";")[0]
    return ""


def hash_file(path: Path, record: FileRecord, wording: Wording) -> Iterator[None]:
    """Compare a file's SHA-256 with its record; yields after each piece that is read. Raises DataError."""
    if not record.sha256:
        raise DataError(f"{path} was indexed without its SHA-256; use data.verify=size, or index it again with --hash")
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
                yield
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; {wording.fix}") from error
    if digest.hexdigest() != record.sha256:
        raise DataError(f"{path} has changed since it was written: its SHA-256 differs; {wording.fix}")


def read_checked(path: Path, record: FileRecord, wording: Wording) -> bytes:
    """Return the bytes of a small file after comparing it with its record. Raises DataError."""
    check_file(path, record, False, wording)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; {wording.fix}") from error
    if hashlib.sha256(data).hexdigest() != record.sha256:
        raise DataError(f"{path} has changed since it was written; {wording.fix}")
    return data
