"""One split of an ImageFolder: image files in one folder per class."""

import os
from hashlib import sha256
from pathlib import Path

import numpy as np
import numpy.typing as npt

from karat_scale.data.order import epoch_order
from karat_scale.data.shards.shard_format import check_class_count, split_fix
from karat_scale.foundation.errors import DataError
from karat_scale.foundation.files import read_image

FIX = "correct data.path, or make shards with data_prep/make_webdataset.py and use data.backend=webdataset"


class FolderSplit:
    """`root`/`split`/<class>/.../<image> as sample ids 0 .. len - 1.

    Ids are those that data_prep/make_webdataset.py gives the same images with its default seed, so training on a folder
    and on its shards is equal. `classes`: the labels' names, if another split has set them. Raises DataError for a
    missing or empty folder, more than `num_classes` classes, and a class that `classes` does not list.
    """

    def __init__(self, root: Path | str, split: str, num_classes: int, classes: tuple[str, ...] | None = None) -> None:
        from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset  # takes seconds

        self._folder = Path(root).expanduser() / split
        found = _class_folders(self._folder)
        self.classes = classes or tuple(found)
        check_class_count(self._folder, len(self.classes), num_classes)
        if unknown := sorted(set(found) - set(self.classes)):
            raise DataError(f"{self._folder / unknown[0]} is a class that the training split does not have; {FIX}")
        numbers = {name: label for label, name in enumerate(self.classes) if name in found}
        for name in numbers:  # torchvision takes a folder that cannot be read for an empty one
            _must_list(self._folder / name)
        listed = make_dataset(self._folder, numbers, extensions=IMG_EXTENSIONS, allow_empty=True)
        visible = sorted(
            (label, os.fsencode(os.path.relpath(path, self._folder)))
            for path, label in listed
            if not Path(path).name.startswith(".")
        )
        if not visible:
            raise DataError(f"{self._folder} has no images in its class folders; {FIX}")
        order = epoch_order(0, 0, len(visible))
        self.labels: npt.NDArray[np.int32] = np.array([label for label, _ in visible], dtype=np.int32)[order]
        # One array of bytes: every worker that touches a list of a million strings would copy it.
        self._paths = np.array([path for _, path in visible])[order]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def identity(self) -> str:
        """A hash of the images' paths and labels, in which a copy agrees."""
        return sha256(self._paths.tobytes() + self.labels.tobytes()).hexdigest()

    def read(self, sample_id: int) -> bytes:
        """Return the encoded image. Raises DataError naming the file if it cannot be read."""
        path = self.file_of(sample_id)
        try:
            return read_image(Path(path))
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}; {FIX}") from error

    def locate(self, sample_id: int) -> tuple[str, str]:
        """Return the path of a sample below its folder, and the folder."""
        return os.fsdecode(bytes(self._paths[sample_id])), str(self._folder)

    def keys(self) -> list[str]:
        """Return the path of each sample below its folder."""
        return [os.fsdecode(bytes(path)) for path in self._paths]

    def file_of(self, sample_id: int) -> str:
        """Return the path of the sample's file."""
        return str(self._folder / self.locate(sample_id)[0])

    def close(self) -> None:
        """Do nothing: no file is open."""


def _must_list(folder: Path) -> None:
    try:
        with os.scandir(folder):
            pass
    except OSError as error:
        raise DataError(f"{folder} cannot be listed: {error.strerror}; {FIX}") from error


def _class_folders(folder: Path) -> list[str]:
    try:
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != ".")
    except FileNotFoundError:
        beside = [path.name for path in folder.parent.glob("*/")]
        fix = split_fix(folder.name, beside) or f"; {FIX}"
        raise DataError(f"{folder} does not exist; the folders there: {', '.join(beside) or 'none'}{fix}") from None
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}; {FIX}") from error
    if not names:
        raise DataError(f"{folder} has no class folders; {FIX}")
    return names
