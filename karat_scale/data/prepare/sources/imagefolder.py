"""An ImageFolder as a source: one folder per class, original bytes kept."""

import os
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from karat_scale.data.prepare.sources.base import ListedSource, UnreadableSampleError, cannot_read, is_of_the_file
from karat_scale.data.prepare.threads import run_in_threads
from karat_scale.foundation.console import progress
from karat_scale.foundation.errors import DataError
from karat_scale.foundation.files import read_image

SPLIT_FOLDERS = ("train", "val", "valid", "validation", "test")
NO_IMAGE_NAME = "the name has no image suffix"
# Threads that ask for the sizes of files, which a network file system answers slowly; and files for each turn.
_ASKING, _FILES = 16, 1000


def is_image_name(file: str) -> bool:
    """True if a file's name is that of an image, by ImageFolder's rules; hidden files are not."""
    return file.lower().endswith(IMG_EXTENSIONS) and not file.startswith(".")


def split_folders(src: Path) -> dict[str, Path]:
    """Return the folders of `src` that are splits with class folders; empty if `src` holds the classes itself."""
    return {name: src / name for name in SPLIT_FOLDERS if (src / name).is_dir() and _has_folders(src / name)}


def flat_folders(src: Path) -> dict[str, Path]:
    """Return the folders of `src` with a split's name that hold images and no class folders."""
    return {
        name: src / name
        for name in SPLIT_FOLDERS
        if (src / name).is_dir()
        and not _has_folders(src / name)
        and any(is_image_name(entry.name) for entry in (src / name).iterdir())
    }


def _has_folders(folder: Path) -> bool:
    return any(entry.is_dir() and entry.name[0] != "." for entry in folder.iterdir())


def class_folders(folder: Path) -> list[str]:
    """Return the class names, sorted. Raises DataError if there is none, or if one is not UTF-8."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != ".")
    if not names:
        raise DataError(f"{folder} has no class folders; expected {folder.name}/<class>/<image>")
    require_utf8(names, folder)
    return names


def require_utf8(classes: list[str], where: Path) -> None:
    """Raise DataError for a class whose name cannot be written as text."""
    for name in classes:
        shown = os.fsencode(name).decode(errors="backslashreplace")
        if shown != name:
            raise DataError(f"{where}: the name of class {shown} is not UTF-8; rename it")


class ImageFolderSource(ListedSource):
    """`folder`/<class>/.../<image>, sorted by class and the path's bytes. See Source.

    Raises DataError for a class that `classes` does not list.
    """

    def __init__(self, folder: Path, classes: list[str]) -> None:
        self._folder = folder
        skipped: list[tuple[str, str]] = []
        paths: list[str] = []
        labels: list[int] = []
        numbers = {name: label for label, name in enumerate(classes)}
        for name in class_folders(folder):
            if name not in numbers:
                raise DataError(
                    f"{folder / name} is a class that the shards do not have; their classes are "
                    f"{classes[0]} ... {classes[-1]} ({len(classes)}); use another --out"
                )
            found = _images_under(folder, name, skipped)
            paths += found
            labels += [numbers[name]] * len(found)
        if not paths:
            raise DataError(f"{folder} has no images in its class folders")
        super().__init__(classes, paths, labels, _sizes(folder, paths))
        self.skipped = skipped

    def read(self, index: int) -> bytes:
        path = self._folder / self._paths[index]
        try:
            return read_image(path)
        except OSError as error:
            if is_of_the_file(error):
                raise UnreadableSampleError(error.strerror or str(error)) from error
            raise cannot_read(path, error) from error


def _sizes(folder: Path, paths: list[str]) -> list[int]:
    """Return the bytes of each file. Raises DataError."""
    parts = [paths[start : start + _FILES] for start in range(0, len(paths), _FILES)]
    sizes: list[int] = []
    with progress(f"{folder.name}: listing", len(paths), "files") as advance:
        for found in run_in_threads(lambda part: [_size(folder / path) for path in part], parts, _ASKING):
            sizes += found
            advance(len(found))
    return sizes


def _size(path: Path) -> int:
    """Return the bytes of a file; 0 if it cannot be read, which its reading reports. Raises DataError."""
    try:
        return path.stat().st_size
    except OSError as error:
        if is_of_the_file(error):
            return 0
        raise cannot_read(path, error) from error


def _not_listed(error: OSError) -> None:
    raise cannot_read(Path(error.filename), error) from error


def _images_under(folder: Path, name: str, skipped: list[tuple[str, str]]) -> list[str]:
    """Return the paths of a class's images from `folder`; adds the other files to `skipped`. Raises DataError."""
    found = []
    for directory, folders, files in os.walk(folder / name, onerror=_not_listed, followlinks=True):
        folders.sort()
        for file in sorted(files):
            path = os.path.relpath(os.path.join(directory, file), folder)  # noqa: PTH118
            if is_image_name(file):
                found.append(path)
            else:
                skipped.append((path, NO_IMAGE_NAME))
    # Like FolderSplit: as text, names that are not UTF-8 would be sorted differently.
    return sorted(found, key=os.fsencode)
