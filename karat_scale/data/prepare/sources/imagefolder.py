"""An ImageFolder as a source: one folder per class. The original bytes are kept."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from karat_scale.data.decoders.jpeg_header import WNID
from karat_scale.data.prepare.sources.base import ListedSource, UnreadableSampleError, cannot_read, lines_of
from karat_scale.data.shards.shard_format import SPLIT_FOLDERS
from karat_scale.data.shards.shards import folders_in, images_under, is_hidden_folder, is_image_name, refuse_broken_link
from karat_scale.foundation.console import progress
from karat_scale.foundation.errors import DataError
from karat_scale.foundation.files import read_image

LIKE_SPLITS = {**{name: name for name in SPLIT_FOLDERS}, "training": "train", "testing": "test"}
NO_IMAGE_NAME = "the name has no image suffix"
# Threads that ask for the sizes of files, which a network file system answers slowly; and files for each turn.
_ASKING, _FILES = 16, 1000


def split_folders(src: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Return the folders of `src` with a split's name that have class folders, and those that have only images."""
    splits, flat = {}, {}
    for folder in (src / name for name in SPLIT_FOLDERS):
        refuse_broken_link(folder)
        if not folder.is_dir():
            continue
        if any(entry.is_dir() and not is_hidden_folder(entry.name) for entry in folder.iterdir()):
            splits[folder.name] = folder
        elif any(is_image_name(entry.name) for entry in folder.iterdir()):
            flat[folder.name] = folder
    return splits, flat


def refuse_like_splits(src: Path, names: Iterable[str], has_folders: Callable[[str], bool]) -> None:
    """Raise DataError for a folder of folders that has nearly a split's name, such as Training: it is no class."""
    for name in sorted(names):
        split = LIKE_SPLITS.get(name.lower(), name)
        if split != name and has_folders(name):
            raise DataError(
                f"{src}: the folder {name} looks like a split, and not like a class or a folder to leave out; rename "
                f"it to {split}, or give it alone as --src with --split {'val' if split == 'test' else split}"
            )


def class_folders(folder: Path) -> list[str]:
    """Return the class names, sorted. Raises DataError if there is none."""
    names = folders_in(folder)
    if not names:
        tars = "; for tars that others made, use karat index" if any(folder.glob("*.tar")) else ""
        raise DataError(f"{folder} has no class folders; expected {folder.name}/<class>/<image>{tars}")
    return names


class ImageFolderSource(ListedSource):
    """`folder`/<class>/.../<image>, sorted by class and the path's bytes; `classes` lists all of them. See Source."""

    def __init__(self, folder: Path, classes: list[str]) -> None:
        self.folder = folder
        loose = sorted(path.name for path in folder.iterdir() if is_image_name(path.name) and not path.is_dir())
        skipped = [(name, "it is in no class folder") for name in loose]
        paths: list[str] = []
        labels: list[int] = []
        numbers = {name: label for label, name in enumerate(classes)}
        for name in class_folders(folder):
            try:
                found, others = images_under(folder, name)
            except OSError as error:
                raise cannot_read(Path(error.filename), error) from error
            skipped += [(path, NO_IMAGE_NAME) for path in others]
            paths += found
            labels += [numbers[name]] * len(found)
        if not paths:
            parquet = next((path for path, _ in skipped if path.endswith(".parquet")), "")
            given = f"it has Parquet files: give {folder / parquet.partition('/')[0]} as --src"
            fix = given if parquet else "put them there, or correct --src"
            raise DataError(f"{folder} has no images in its class folders; {fix}")
        if len(set(labels)) == 1 and all(path.count("/") > 1 for path in paths):  # as in a tar
            told = f"by paths such as {paths[0]}, all images would be of one class, {classes[labels[0]]!r}"
            raise DataError(f"{folder}: {told}; give the folder of the classes, or of the splits, as --src")
        super().__init__(classes, paths, labels, _sizes(folder, paths))
        self.skipped = skipped

    def read(self, index: int) -> bytes:
        path = self.folder / self._paths[index]
        try:
            return read_image(path)
        except OSError as error:
            raise cannot_read(path, error, whole=False) from error


def _sizes(folder: Path, paths: list[str]) -> list[int]:
    """Return the bytes of each file. Raises DataError."""
    parts = [paths[start : start + _FILES] for start in range(0, len(paths), _FILES)]
    sizes: list[int] = []
    with progress(f"{folder.name}: listing", len(paths), "files") as advance, ThreadPoolExecutor(_ASKING) as pool:
        for found in pool.map(lambda part: [_size(folder / path) for path in part], parts):
            sizes += found
            advance(len(found))
    return sizes


def _size(path: Path) -> int:
    """Return the bytes of a file; 0 if it cannot be read, which `read` reports later. Raises DataError."""
    try:
        return path.stat().st_size
    except OSError as error:
        if isinstance(problem := cannot_read(path, error, whole=False), UnreadableSampleError):
            return 0
        raise problem from error


NAME_FILES = ("LOC_synset_mapping.txt", "synset_words.txt")


def read_synset_names(path: Path) -> dict[str, str]:
    """Return readable names by wnid from lines `n01440764 tench, Tinca tinca`. Raises DataError."""
    names = {}
    for number, line in enumerate(lines_of(path), 1):
        wnid, _, name = line.partition("\t" if "\t" in line else " ")
        if not WNID.fullmatch(wnid) or not name.strip():
            raise DataError(f"{path}: line {number} is not `wnid name`: {line[:60]!r}")
        names[wnid] = name.strip()
    return names
