"""An ImageFolder as a source: one folder per class, original bytes kept."""

import hashlib
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torchvision.datasets.folder import IMG_EXTENSIONS

from karat_scale.data.shard_writer import EncodedSample
from karat_scale.errors import DataError
from sources.base import UnreadableSampleError, image_extension

SPLIT_FOLDERS = ("train", "val", "valid", "validation", "test")
MAX_KEY_BYTES = 90  # a tar name holds 100


def split_folders(src: Path) -> dict[str, Path]:
    """The folders of `src` that are splits with class folders in them; empty if `src` holds the classes itself."""
    return {
        name: src / name
        for name in SPLIT_FOLDERS
        if (src / name).is_dir() and any(entry.is_dir() for entry in (src / name).iterdir())
    }


def class_folders(folder: Path) -> list[str]:
    """Class names, sorted. Raises DataError where two would be one on another system, or none is there."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != ".")
    if not names:
        raise DataError(f"{folder} has no class folders; expected {folder.name}/<class>/<image>")
    return names


class ImageFolderSource:
    """`folder`/<class>/.../<image>, sorted by class and path. See Source.

    Raises DataError for a class that `classes` does not list.
    """

    def __init__(self, folder: Path, classes: list[str]) -> None:
        self.classes = classes
        self.skipped: list[tuple[str, str]] = []
        self._folder = folder
        self._paths: list[str] = []
        labels: list[int] = []
        numbers = {name: label for label, name in enumerate(classes)}
        for name in class_folders(folder):
            if name not in numbers:
                raise DataError(
                    f"{folder / name} is a class the shards do not have; their classes are "
                    f"{classes[0]} ... {classes[-1]} ({len(classes)}); use another --out"
                )
            found = self._images_under(name)
            self._paths += found
            labels += [numbers[name]] * len(found)
        if not self._paths:
            raise DataError(f"{folder} has no images in its class folders")
        self._labels = np.array(labels, dtype=np.int32)
        self._keys = _unique_keys(self._paths)
        self._sizes: npt.NDArray[np.int64] | None = None

    def _images_under(self, name: str) -> list[str]:
        found = []
        for directory, folders, files in os.walk(self._folder / name, followlinks=True):
            folders.sort()
            for file in sorted(files):
                path = os.path.relpath(os.path.join(directory, file), self._folder)  # noqa: PTH118
                if file.lower().endswith(IMG_EXTENSIONS) and file[0] != ".":
                    found.append(path)
                else:
                    self.skipped.append((path, "the name has no image ending"))
        return sorted(found)

    def __len__(self) -> int:
        return len(self._paths)

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        if self._sizes is None:
            sizes = [(self._folder / path).stat().st_size for path in self._paths]
            self._sizes = np.array(sizes, dtype=np.int64)
        return self._sizes

    def name(self, index: int) -> str:
        return self._paths[index]

    def read(self, index: int) -> EncodedSample:
        try:
            data = (self._folder / self._paths[index]).read_bytes()
        except OSError as error:
            raise UnreadableSampleError(error.strerror or str(error)) from error
        if not data:
            raise UnreadableSampleError("the file is empty")
        return EncodedSample(self._keys[index], image_extension(data), data, int(self._labels[index]))

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for path, size, label in zip(self._paths, self.sizes, self._labels, strict=True):
            digest.update(os.fsencode(path) + f"\0{size}\0{label}\n".encode())
        return digest.hexdigest()


def _unique_keys(paths: list[str]) -> list[str]:
    """A key per path: the path with no dot in its last part, short enough for a tar, never the same twice."""
    keys: list[str] = []
    taken: set[str] = set()
    for path in paths:
        text = os.fsencode(path).decode(errors="replace")
        folder, _, file = text.rpartition("/")
        stem = file.rpartition(".")[0].replace(".", "_")
        key = f"{folder}/{stem}" if folder else stem
        if key in taken or len(key.encode()) > MAX_KEY_BYTES:
            key = hashlib.sha256(os.fsencode(path)).hexdigest()[:32]
        taken.add(key)
        keys.append(key)
    return keys
