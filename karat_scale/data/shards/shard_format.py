"""The files in a directory of shards, besides the tars.

    dataset.json              classes in order; per split: shards, settings, the skipped images with reasons
    train-000000.tar          WebDataset tar: <key>.cls, <key>.jpg, <key>.cls, ...
    train-000000.index.npz    per sample of that tar: offset, size, label, crc32, key
    ...
    val-000000.tar, ...

A sample's id is its position in the split: shard after shard, in the order of dataset.json.

The launch wrapper may have made a copy of the shards on a local disk of this node.
"""

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from karat_scale.foundation.errors import DataError
from karat_scale.foundation.files import read_text, write_atomically
from karat_scale.foundation.stores import DEFAULT_TIMEOUT, Store, is_url

_FIX = "make it with data_prep/make_webdataset.py"
DATASET_FILE, TIMM_FILE = "dataset.json", "info.json"
# A record lists each file of a source that is skipped or odd: of ImageNet-21k, that may be millions.
LARGEST_RECORD = 2**30
# A name in dataset.json must not point outside of its directory.
FileName = Field(pattern=r"^[\w-][\w.-]*(/[\w-][\w.-]*)*$")
# A file name may be any bytes; in a report, bytes that are not UTF-8 become \xNN.
ReportedPath = Annotated[str, BeforeValidator(lambda path: os.fsencode(path).decode(errors="backslashreplace"))]


class FileRecord(BaseModel):
    """A file's name, size and hash when it was written."""

    model_config = ConfigDict(extra="forbid")

    name: str = FileName
    bytes: int
    sha256: str


class ShardRecord(FileRecord):
    """A tar shard and its index.

    `karat index` reads headers alone, unless it is asked for hashes: then `sha256` is empty, and the index has 0 for
    each crc32. Of a tar at a URL, `etag` is what its server said of its content.
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

    `empty_classes`: the names of those without a sample.
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

    def local_tars_of(self, directory: Path | str) -> Path:
        """Return the directory of the tars, given that of dataset.json. Raises DataError if they are at a URL."""
        tars = self.tars_of(directory)
        if isinstance(tars, str):
            raise DataError(f"the tars are at {tars}; this needs them on a file system")
        return tars


def dataset_directory(path: Path | str) -> Path | str:
    """Return a data set's directory, or its URL as it is."""
    return path if isinstance(path, str) and is_url(path) else Path(path).expanduser()


def absolute_path(path: str) -> str:
    """Return `data.path` as it means the same from every directory."""
    directory = dataset_directory(path)
    return directory if isinstance(directory, str) else str(directory.absolute())


def read_dataset_record(directory: Path | str, timeout: float = DEFAULT_TIMEOUT) -> DatasetRecord:
    """Read dataset.json of a directory or at a URL.

    Args:
        timeout: data.timeout, for a URL.

    Raises:
        DataError: the directory or the file is missing, empty or damaged.
    """
    path = f"{directory}/{DATASET_FILE}"
    try:
        return DatasetRecord.model_validate_json(_record_text(directory, timeout))
    except UnicodeDecodeError:
        raise DataError(f"{path} is damaged: it is not UTF-8; {_FIX}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "JSON"
        raise DataError(f"{path} is damaged or of another version ({where}: {first['msg']}); {_FIX}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _record_text(directory: Path | str, timeout: float) -> str:
    if isinstance(directory, str):
        return Store(directory, timeout).read_small(DATASET_FILE, LARGEST_RECORD).decode("utf-8")
    check_has_record(directory)
    return read_record_text(directory / DATASET_FILE)


def check_has_record(directory: Path) -> None:
    """Raise DataError unless a directory exists and has a dataset.json."""
    if not directory.is_dir():
        raise DataError(f"data.path = {directory} is not a directory; {_FIX} or correct the path")
    if (directory / DATASET_FILE).is_file():
        return
    inside = list(directory.iterdir())
    if any(path.is_dir() for path in inside):
        raise DataError(
            f"data.path = {directory} has no {DATASET_FILE}; {_FIX}, set data.backend=folder for a folder of images, "
            "or correct the path"
        )
    found = f"has no {DATASET_FILE}" if inside else "is empty"
    raise DataError(f"data.path = {directory} {found}; {_FIX} or correct the path")


def read_record_text(path: Path) -> str:
    """Return the text of a data set's record, as `read_text`. Memory is asked for by its size, not by the limit."""
    return read_text(path, min(path.stat().st_size, LARGEST_RECORD))


def chosen_splits(directory: Path | str, record: DatasetRecord, split: str | None) -> dict[str, SplitRecord]:
    """Return one split of a data set by name, or all. Raises DataError if there is none."""
    chosen = {name: found for name, found in record.splits.items() if split in (None, name)}
    if not chosen:
        there = ", ".join(record.splits) or "none"
        raise DataError(f"{directory} has no split {split!r}; the splits there: {there}")
    return chosen


def write_dataset_record(directory: Path, record: DatasetRecord) -> None:
    """Write dataset.json atomically; before it, for shards of ours, info.json, which timm's own reader needs."""
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
