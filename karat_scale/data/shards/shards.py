"""The samples of one split by their id, in shards or in folders, and the place of a data set: a directory or a URL.

A split of shards is checked against dataset.json and the indexes. Both places answer the same questions.
"""

import copy
import itertools
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from karat_scale.data.plan import epoch_order
from karat_scale.data.shards import shard_format
from karat_scale.data.shards.remote import RemotePlace, RemoteShardFiles, RemoteUse
from karat_scale.data.shards.shard_files import (
    NO_BLOCKS,
    Blocks,
    ChangedSampleError,
    ImageSource,
    LocalShardFiles,
    SamplePlaces,
)
from karat_scale.data.shards.tars import BLOCK
from karat_scale.foundation.console import plural
from karat_scale.foundation.errors import DataError
from karat_scale.foundation.files import read_image, walk
from karat_scale.foundation.stores import is_url
from karat_scale.foundation.tables import Files
from karat_scale.recipe import DataConfig


class LocalPlace:
    """The files of a data set in a directory. All methods raise DataError. fix: what to do if a file has changed."""

    def __init__(self, directory: Path, wording: shard_format.Wording = shard_format.SHARD_WORDING) -> None:
        self._directory, self._wording, self.fix = directory, wording, wording.fix

    def where(self, name: str) -> str:
        """Return the path or the URL of a file."""
        return str(self._directory / name)

    def check(self, shards: Sequence[shard_format.ShardRecord], by_hash: bool) -> None:
        """Compare shards with their records: by their sizes, or also by their hashes."""
        for shard in shards:
            shard_format.check_file(self._directory / shard.name, shard, by_hash, self._wording)

    def read_checked(self, record: shard_format.FileRecord) -> bytes:
        """Return a small file after comparing it with its record."""
        return shard_format.read_checked(self._directory / record.name, record, self._wording)

    def read_all_checked(self, records: Sequence[shard_format.FileRecord]) -> Iterator[bytes]:
        """Yield small files, in order, after comparing each with its record."""
        return map(self.read_checked, records)

    def files(self, places: SamplePlaces, readahead: Blocks) -> LocalShardFiles:
        """Return the reader of samples. readahead: the blocks that a file system reads ahead."""
        return LocalShardFiles(self._directory, places, readahead)


Place = LocalPlace | RemotePlace


def open_place(directory: Path | str, remote: RemoteUse) -> Place:
    """Return the files of a data set in a directory or at a URL. Raises DataError."""
    return RemotePlace(directory, remote) if isinstance(directory, str) else LocalPlace(directory)


class IndexedSplit(ImageSource):
    """The samples of files that have an index each, by their ids 0 .. len - 1, file after file. See ImageSource.

    Opening checks every file's size, or with verify="hash" its SHA-256. Raises DataError, one line, if anything is
    missing, cut short, changed or out of range.

    shards: the files. indexes, tars: the places of the indexes and of the files. kinds: the dtypes of an index's
    columns. listed_in: the file that lists the classes, for messages. readahead: the blocks that the system reads ahead
    when one of their samples is read.
    """

    kinds: Mapping[str, Any] = shard_format.INDEX_FIELDS
    listed_in = shard_format.DATASET_FILE

    def __init__(
        self,
        classes: Sequence[str],
        shards: Sequence[shard_format.ShardRecord],
        indexes: Place,
        tars: Place,
        verify: Literal["size", "hash"],
        readahead: Blocks,
    ) -> None:
        self.classes, self._shards, self._indexes, self._tars = tuple(classes), shards, indexes, tars
        tars.check(shards, by_hash=verify == "hash")
        parts: dict[str, list[npt.NDArray[Any]]] = {name: [np.empty(0, kind)] for name, kind in self.kinds.items()}
        found = indexes.read_all_checked([shard.index for shard in shards])
        for shard, data in zip(shards, found, strict=True):
            for name, values in self._read_columns(shard, data).items():
                parts[name].append(values)
        columns = {name: np.concatenate(values) for name, values in parts.items()}
        self.labels = columns["label"]
        starts = np.cumsum([0, *(shard.samples for shard in shards)])
        self.places = SamplePlaces(shards, starts, columns["offset"], columns["size"], columns["crc32"])
        self._columns, self._files = columns, tars.files(self.places, readahead)

    def _read_columns(self, shard: shard_format.ShardRecord, data: bytes) -> dict[str, npt.NDArray[Any]]:
        try:
            columns = shard_format.read_columns(data, self.kinds, shard.samples, shard.bytes)
            self._check_columns(columns)
        except ValueError as error:
            path = self._indexes.where(shard.index.name)
            raise DataError(f"{path} does not fit {shard.name}: {error}; {self._indexes.fix}") from None
        wrong = np.flatnonzero((columns["label"] < 0) | (columns["label"] >= len(self.classes)))
        if len(wrong):
            sample, label = shard_format.key_of(data, wrong[0]), columns["label"][wrong[0]]
            raise DataError(
                f"{self._indexes.where(shard.name)}: sample {sample} has label {label}, but {self.listed_in} lists "
                f"{len(self.classes)} classes; correct them and make both again"
            )
        return columns

    def _check_columns(self, columns: dict[str, npt.NDArray[Any]]) -> None:
        """Raise ValueError if the columns of an index cannot be true."""

    @property
    def identity(self) -> list[tuple[int, str]]:
        """The size of each file and the hash of its index; equal for copies."""
        return [(shard.bytes, shard.index.sha256) for shard in self._shards]

    def read(self, sample_id: int) -> bytes:
        with self._errors_named(sample_id):
            return self._files.read(sample_id)

    @contextmanager
    def _errors_named(self, sample_id: int) -> Iterator[None]:
        """Make a DataError that names the file of a sample of what its files raise."""
        try:
            yield
        except OSError as error:
            raise DataError(f"{self.file_of(sample_id)} cannot be read: {error.strerror}; {self._tars.fix}") from error
        except ChangedSampleError as error:
            key, _ = self.locate(sample_id)
            where = self.file_of(sample_id)
            raise DataError(f"{where} {error}: sample {key} differs; {self._tars.fix}") from None

    def locate(self, sample_id: int) -> tuple[str, str]:
        place = self.places.shard_of(sample_id)
        shard, number = self._shards[place], sample_id - int(self.places.starts[place])
        try:
            return shard_format.key_of(self._indexes.read_checked(shard.index), number), shard.name
        except (DataError, ValueError, IndexError):  # the index has changed: the place is all that is known
            return f"number {number}", shard.name

    def keys(self) -> list[str]:
        """Return the key of each sample. Raises DataError if an index has changed."""
        return [key for place in range(len(self._shards)) for key in self.keys_of(place)]

    def keys_of(self, place: int) -> list[str]:
        """Return the keys of the samples in one file, by its number. Raises DataError if its index has changed."""
        return shard_format.keys_of(self._indexes.read_checked(self._shards[place].index))

    def file_of(self, sample_id: int) -> str:
        return self._tars.where(self._shards[self.places.shard_of(sample_id)].name)

    def close(self) -> None:
        self._files.close()

    def __getstate__(self) -> dict[str, Any]:
        # A copy has its own open files.
        return {**self.__dict__, "_files": copy.copy(self._files)}


class ShardSplit(IndexedSplit):
    """The samples of one split of shards. See IndexedSplit.

    directory: the directory or the URL of dataset.json. remote: how the samples of shards at a URL are used.
    """

    def __init__(
        self,
        directory: Path | str,
        split: str,
        num_classes: int,
        verify: Literal["size", "hash"] = "size",
        readahead: Blocks = NO_BLOCKS,
        remote: RemoteUse | None = None,
    ) -> None:
        self.directory = shard_format.dataset_directory(directory)
        self._remote = remote or RemoteUse()
        record = shard_format.read_dataset_record(self.directory, self._remote.timeout)
        found = shard_format.split_of(self.directory, record, split, num_classes)
        if found.samples != sum(shard.samples for shard in found.shards):
            place, fix = f"{self.directory}/{shard_format.DATASET_FILE}", shard_format.SHARD_WORDING.fix
            raise DataError(f"{place}: {split} has not as many samples as its shards; {fix}")
        self.made = found.made
        indexes = open_place(self.directory, self._remote)
        tars = open_place(record.tars_of(self.directory), self._remote) if record.root else indexes
        super().__init__(record.classes, found.shards, indexes, tars, verify, readahead)
        self.ahead = self._remote.ahead if isinstance(self._files, RemoteShardFiles) else 0

    def around(self, sample_id: int) -> tuple[int, bytes]:
        """Return where the bytes between the samples before and after this one begin, and the bytes.

        They end with the header of the sample after. There are none if samples are not stored in the order of their
        numbers. Raises DataError, also if the sample's own bytes have changed.
        """
        places, number = self.places, self.places.shard_of(sample_id)
        begin, end = 0, self._shards[number].bytes
        if sample_id > places.starts[number]:
            begin = -(-int(places.offsets[sample_id - 1] + places.sizes[sample_id - 1]) // BLOCK) * BLOCK
        if sample_id + 1 < places.starts[number + 1]:
            end = int(places.offsets[sample_id + 1])
        first, size = int(places.offsets[sample_id]) - begin, int(places.sizes[sample_id])
        with self._errors_named(sample_id):
            part = self._files.span(sample_id, begin, max(begin, end))
            if 0 <= first <= end - begin - size:
                places.check(sample_id, memoryview(part)[first : first + size])
        return begin, part

    def prepare(self, sample_ids: Iterable[int]) -> None:
        self._files.prepare(sample_ids)

    def hint(self, sample_ids: Iterable[int]) -> None:
        self._files.hint(sample_ids)


def is_hashed(data: DataConfig) -> bool:
    """True if `hash_files` does what `data.verify` asks for."""
    return data.verify == "hash" and data.row.files in (Files.SHARDS, Files.BETONS)


def hash_files(data: DataConfig, part: int, parts: int) -> Iterator[None]:
    """Compare every `parts`-th file of a data set that is open, from `part` on, with its SHA-256.

    So several processes that read the same files each hash a part of them. Yields after each piece that is read. Raises
    DataError if a file differs, or if it is at a URL.
    """
    directory = shard_format.dataset_directory(shard_format.staged_copy(data.path) or data.path)
    splits = dict.fromkeys([data.val_split] if data.is_stream else [data.train_split, data.val_split])
    if data.row.files == Files.BETONS:
        betons = [shard_format.beton_path(Path(directory), split) for split in splits]
        hashes = [
            shard_format.hash_file(path, shard_format.read_record(path), shard_format.BETON_WORDING) for path in betons
        ]
    else:
        record = shard_format.read_dataset_record(directory, data.timeout)
        tars = record.tars_of(directory)
        shards = [shard for split in splits for shard in record.splits[split].shards]
        if isinstance(tars, str):
            open_place(tars, RemoteUse.of(data, training=False)).check(shards, by_hash=True)
        hashes = [
            shard_format.hash_file(Path(tars) / shard.name, shard, shard_format.SHARD_WORDING) for shard in shards
        ]
    return itertools.chain.from_iterable(hashes[part::parts])


# As torchvision's ImageFolder has them.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
FOLDER_FIX = "correct the path, or put images there, into a folder for each class"


class FolderSplit(ImageSource):
    """`root`/`split`/<class>/.../<image> as sample ids 0 .. len - 1.

    Ids are those that karat prepare webdataset gives the same images with its default seed, so training on a folder
    and on its shards is equal. `classes`: the labels' names, if another split has set them. Raises DataError for a
    missing or empty folder, more than `num_classes` classes, and a class that `classes` does not list.
    """

    def __init__(self, root: Path | str, split: str, num_classes: int, classes: tuple[str, ...] | None = None) -> None:
        self._folder = Path(root).expanduser() / split
        found = class_folders(self._folder)
        refuse_two_spellings(self._folder, found)
        self.classes = classes or tuple(found)
        shard_format.check_class_count(self._folder, len(self.classes), num_classes)
        if unknown := sorted(set(found) - set(self.classes)):
            folder, name = self._folder / unknown[0], unknown[0]
            for known in self.classes:
                if composed(known) == composed(name):
                    raise DataError(f"{folder}: training spells {known!a}, not {name!a}; rename one like the other")
            raise DataError(f"{folder} is a class that the training split does not have; remove it, or add it there")
        numbers = {name: label for label, name in enumerate(self.classes) if name in found}
        visible: list[tuple[int, bytes]] = []
        left_out: list[str] = []
        for name, label in numbers.items():
            try:
                images, others = images_under(self._folder, name)
            except OSError as error:
                raise DataError(f"{error.filename} cannot be listed: {error.strerror}; make it readable") from error
            visible += [(label, os.fsencode(path)) for path in images]
            left_out += [path for path in others if "/." not in path]
        loose = sorted(file.name for file in self._folder.iterdir() if is_image_name(file.name) and file.is_file())
        reasons = {f"no suffix of {', '.join(IMAGE_SUFFIXES)}": left_out, "in no class folder": loose}
        self._notice = "; ".join(
            f"{plural(len(files), 'file')} left out, {self._folder / files[0]}{' and others' * (len(files) > 1)}: {why}"
            for why, files in reasons.items()
            if files
        )
        if not visible:
            raise DataError(f"{self._folder} has no images in its class folders; {self._notice or FOLDER_FIX}")
        order = epoch_order(0, 0, len(visible))
        self.labels = np.array([label for label, _ in visible], dtype=np.int32)[order]
        # One array of bytes: every worker that touches a list of a million strings would copy it.
        self._paths = np.array([path for _, path in visible])[order]

    @property
    def notice(self) -> str:
        return self._notice

    @property
    def identity(self) -> str:
        """A hash of the images' paths and labels; equal for copies."""
        return sha256(self._paths.tobytes() + self.labels.tobytes()).hexdigest()

    def read(self, sample_id: int) -> bytes:
        path = self.file_of(sample_id)
        try:
            return read_image(Path(path))
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}; make it readable, or remove it") from error

    def locate(self, sample_id: int) -> tuple[str, str]:
        return os.fsdecode(bytes(self._paths[sample_id])), str(self._folder)

    def keys(self) -> list[str]:
        """Return the path of each sample below its folder."""
        return [os.fsdecode(bytes(path)) for path in self._paths]

    def file_of(self, sample_id: int) -> str:
        return str(self._folder / self.locate(sample_id)[0])


def composed(name: str) -> str:
    """Return a name with an accent and its letter as one character, which macOS writes as two."""
    return unicodedata.normalize("NFC", name)


def refuse_two_spellings(place: Path, names: Iterable[str]) -> None:
    """Raise DataError for names that look the same but differ, as those of a Mac and of other systems do."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(composed(name), name)
        if other != name:
            raise DataError(f"{place}: the class {name} is spelled {other!a} and {name!a}; rename one like the other")


def is_image_name(file: str) -> bool:
    """True if a file's name is that of an image, by ImageFolder's rules; hidden files are not."""
    return file.lower().endswith(IMAGE_SUFFIXES) and not file.startswith(".")


def is_hidden_folder(name: str) -> bool:
    """True for a folder that holds no original images: thumbnails, editors' copies, and what macOS adds to archives."""
    return (name.startswith(".") and name not in (".", "..")) or name in ("__MACOSX", "@eaDir")


def refuse_broken_link(path: Path) -> None:
    """Raise DataError for a broken link: its target may be on a disk that is not mounted now."""
    if path.is_symlink() and not path.exists():
        raise DataError(f"{path} is a link to {path.readlink()}, where nothing is; fix the link, or remove it")


def folders_in(folder: Path) -> list[str]:
    """Return the names of the folders in a folder, sorted, without hidden ones. Raises OSError.

    Raises DataError for a broken link, which may be to a class.
    """
    entries = [entry for entry in folder.iterdir() if not is_hidden_folder(entry.name)]
    for entry in entries:
        refuse_broken_link(entry)
    return sorted(entry.name for entry in entries if entry.is_dir())


def images_under(folder: Path, name: str) -> tuple[list[str], list[str]]:
    """Return the paths, below `folder`, of a class's images and of its other files, sorted by bytes. Raises OSError.

    As text, names that are not UTF-8 would be sorted differently.
    """
    images: list[str] = []
    others: list[str] = []
    for directory, below, files in walk(folder / name):
        below[:] = [one for one in below if not is_hidden_folder(one)]
        place = os.path.relpath(directory, folder)
        for file in files:
            (images if is_image_name(file) else others).append(f"{place}/{file}")
    return sorted(images, key=os.fsencode), sorted(others, key=os.fsencode)


_LISTED = 5  # folders beside a split that is missing


def class_folders(folder: Path) -> list[str]:
    """Return the names of the classes of a split, sorted. Raises DataError."""
    try:
        names = folders_in(folder)
    except FileNotFoundError:
        shard_format.require_directory(folder.parent, Files.IMAGES)
        beside = sorted(path.name for path in folder.parent.glob("*/"))
        if folder.parent.name in shard_format.SPLIT_FOLDERS and folder.parent.with_name(folder.name).is_dir():
            raise DataError(f"{folder} does not exist; set data.path={folder.parent.parent}, which has it") from None
        more = len(beside[_LISTED:])
        listed = ", ".join(beside[:_LISTED]) + (f" and {more:,} more" if more else "")
        fix = shard_format.split_fix(folder.name, beside) or f"; {FOLDER_FIX}"
        if more or any(is_image_name(file.name) for file in folder.parent.glob("*/*")):
            fix = f"; {shard_format.flat_fix(folder.parent)}"
        if (folder.parent / shard_format.DATASET_FILE).is_file():
            fix = f"; it has a {shard_format.DATASET_FILE}, so use data.backend=webdataset"
        raise DataError(f"{folder} does not exist; the folders there: {listed or 'none'}{fix}") from None
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}; {FOLDER_FIX}") from error
    if not names:
        each = f"put the images of each class into a folder of their own, such as {folder / 'CLASS'}"
        raise DataError(f"{folder} has no class folders; {each}")
    return names


def check_splits(data: DataConfig, num_classes: int) -> None:
    """Refuse a `data.path` that lacks a split, or has more classes than the model, by dataset.json or the folders.

    The check is cheap, so commands make it after `check_data_path`, before they import torch. It leaves URLs, copies on
    this node and betons to training. Raises DataError.
    """
    if is_url(data.path) or shard_format.staged_copy(data.path):
        return
    directory = Path(data.path).expanduser()
    splits = dict.fromkeys([data.val_split] if data.is_stream else [data.train_split, data.val_split])
    if data.row.files is Files.IMAGES:
        for folder in (directory / split for split in splits):
            shard_format.check_class_count(folder, len(class_folders(folder)), num_classes)
    elif data.row.files is Files.SHARDS:
        record = shard_format.read_dataset_record(directory)
        for split in splits:
            shard_format.split_of(directory, record, split, num_classes)
