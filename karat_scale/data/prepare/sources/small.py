"""The official files of small data sets as sources: CIFAR, Flowers-102, IDX files such as MNIST's, STL-10 and SVHN.

Images that a file holds as raw pixels are encoded when they are read.

CIFAR-10 and CIFAR-100, their Python version, packed or unpacked:

cifar-10-python.tar.gz     cifar-10-batches-py/data_batch_1, ..., data_batch_5, test_batch, batches.meta
cifar-100-python.tar.gz    cifar-100-python/train, test, meta; the classes are the 100 fine ones

Oxford Flowers-102:

102flowers.tgz     jpg/image_00001.jpg, ...
imagelabels.mat    the class of each image, from 1
setid.mat          which images train, validate and test

As in the transfer experiments of DeiT and others, the split train has the 2,040 official training and validation
images. The split test has 6,149 images, and recipes call it val.

IDX files, the format of MNIST and Fashion-MNIST, hold grey images.

STL-10, its binary version, packed or unpacked, without the unlabelled images:

stl10_binary.tar.gz    stl10_binary/train_X.bin, train_y.bin, test_X.bin, test_y.bin, class_names.txt

SVHN's cropped digits are in train_32x32.mat, test_32x32.mat and, as a separate split, extra_32x32.mat. The files give
the digit 0 the label 10; here the class of every digit is its number.
"""

import gzip
import hashlib
import io
import pickle
import re
import sys
import tarfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.io import loadmat

from karat_scale.data.prepare.sources.base import Encoding, ListedSource, Openers, Source, SourceOptions, lines_of
from karat_scale.foundation.console import progress
from karat_scale.foundation.errors import DataError

_MB = 1_000_000
# One of these is in a directory that has official files which torchvision knows. Its import takes seconds.
KNOWN_TO_TORCHVISION = (
    *("cifar-10-python.tar.gz", "cifar-10-batches-py", "batches.meta"),
    *("cifar-100-python.tar.gz", "cifar-100-python", "meta"),
    *("train_32x32.mat", "test_32x32.mat", "extra_32x32.mat"),
    *("stl10_binary.tar.gz", "stl10_binary", "train_X.bin"),
    *("flowers-102", "102flowers.tgz", "imagelabels.mat", "setid.mat"),
)


class PublishedFiles:
    """Some files of one data set in `src`: members of `folder` in `archive`, or plain files in `folder` or `src`.

    md5: the published hash by file name, None if there is none. fetched_by: the data set's name for fetch.py.
    place: the archive or the folder; None if they are not in `src`.
    """

    def __init__(
        self, src: Path, fetched_by: str, md5: dict[str, str | None], archive: str = "", folder: str = "."
    ) -> None:
        self._md5, self._inside = md5, folder
        self.facts: dict[str, Any] = {}
        self._fix = f"fetch it again: karat prepare fetch {fetched_by} --out {src}"
        self.place = src / archive if archive and (src / archive).is_file() else None
        for place in (src / folder, src) if self.place is None else ():
            missing = [name for name in md5 if not (place / name).is_file()]
            if not missing:
                self.place = place
                return
            # In `src` itself, names such as train and meta may belong to anything.
            if len(missing) < len(md5) and (place != src or not archive):
                raise DataError(f"{place} has no {missing[0]}; {self._fix}")

    def read(self, any_hash: bool) -> dict[str, bytes]:
        """Return each file's bytes, by name; `facts` lists those that are not as published, for dataset.json.

        Raises DataError if one is missing, the archive is damaged or, unless `any_hash` is set, a hash differs.
        """
        assert self.place is not None
        if self.place.is_file():
            contents = self._unpacked(self.place)
        else:
            contents = {name: (self.place / name).read_bytes() for name in self._md5}
        found = {name: hashlib.md5(data, usedforsecurity=False).hexdigest() for name, data in contents.items()}
        others = {name: found[name] for name, md5 in self._md5.items() if md5 and found[name] != md5}
        if others and not any_hash:
            name = next(iter(others))
            raise DataError(
                f"{self.place}: {name} has the MD5 {others[name]}, and the published one is {self._md5[name]}; "
                f"{self._fix}, or accept it with --any-hash"
            )
        if others:
            print(f"warning: {self.place}: not as published: {', '.join(others)} (--any-hash)", file=sys.stderr)
        self.facts = {"not_as_published": list(others)}
        return contents

    def _unpacked(self, archive: Path) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        wanted = {f"{self._inside}/{name}": name for name in self._md5}
        size = archive.stat().st_size
        try:
            with archive.open("rb") as file, progress(f"reading {archive.name}", -(-size // _MB), "MB") as advance:
                packed: Any = _CountedReads(file, advance)
                with tarfile.open(fileobj=packed, mode="r|gz") as tar:
                    for member in tar:
                        name = wanted.get(str(PurePosixPath(member.name)))
                        if name and member.isreg() and (data := tar.extractfile(member)):
                            found[name] = data.read()
                        if len(found) == len(wanted):
                            break
                advance(-(-size // _MB) - file.tell() // _MB)
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            raise DataError(f"{archive} is damaged or cut short ({error}); {self._fix}") from error
        if missing := [name for name in self._md5 if name not in found]:
            raise DataError(f"{archive} has no {self._inside}/{missing[0]}; {self._fix}")
        return found


class _CountedReads:
    """A file that reports how many MB were read."""

    def __init__(self, file: IO[bytes], advance: Callable[[int], None]) -> None:
        self._file, self._advance = file, advance

    def read(self, size: int) -> bytes:
        before = self._file.tell() // _MB
        data = self._file.read(size)
        self._advance(self._file.tell() // _MB - before)
        return data


def mat_array(name: str, data: bytes, variable: str) -> npt.NDArray[Any]:
    """Return one array of integers from a .mat file. Raises DataError if it is damaged or has no such array."""
    try:
        found = loadmat(io.BytesIO(data), variable_names=[variable]).get(variable)
    except Exception as error:  # a damaged file makes scipy raise nearly any error
        raise DataError(f"{name} is not a complete MATLAB file ({error}); fetch it again") from error
    if not isinstance(found, np.ndarray) or not np.issubdtype(found.dtype, np.integer):
        raise DataError(f"{name} has no array of integers {variable!r}; fetch it again")
    return found


JPEG_QUALITY = 95
_CHUNK = 4096


class PixelSource(Source):
    """Images uint8 [n, H, W] or [n, H, W, 3] with their class numbers. See Source.

    file: their file, for reports. own: the source's classes, which the labels number. classes: the shards' classes,
    maybe in another order. facts: additional facts for dataset.json. Raises DataError if images and labels do not fit.
    """

    def __init__(
        self,
        file: str,
        images: npt.NDArray[np.uint8],
        labels: npt.NDArray[Any],
        own: list[str],
        classes: list[str],
        encoding: Encoding,
        facts: dict[str, Any] | None = None,
    ) -> None:
        if images.ndim not in (3, 4) or labels.ndim != 1 or len(images) != len(labels):
            raise DataError(f"{file} holds {images.shape} values, its labels {labels.shape}; fetch both again")
        if len(images) == 0:
            raise DataError(f"{file} holds no images; fetch it again")
        # Sizes are unknown before encoding; the pixels are about the upper limit.
        sizes = np.full(len(images), images[0].size)
        super().__init__(classes, renumbered(file, labels, own, classes), sizes)
        self.facts = {**(facts or {}), "encoding": encoding}
        self._file, self._images, self._encoding = file, images, encoding

    def name(self, index: int) -> str:
        return f"{self._file}[{index}]"

    def key(self, index: int) -> str:
        return f"{index:06d}"

    def read(self, index: int) -> bytes:
        buffer = io.BytesIO()
        image = Image.fromarray(np.ascontiguousarray(self._images[index]))
        image.save(buffer, self._encoding, quality=JPEG_QUALITY)  # PNG ignores the quality
        return buffer.getvalue()

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for start in range(0, len(self), _CHUNK):
            digest.update(self._images[start : start + _CHUNK].tobytes())
        digest.update(self.labels.astype(np.uint8).tobytes())
        return digest.hexdigest()


def renumbered(file: str, labels: npt.NDArray[Any], own: list[str], classes: list[str]) -> npt.NDArray[np.int32]:
    """Convert labels that number `own` to labels that number `classes`. Raises DataError for an unknown one."""
    wrong = np.flatnonzero((labels < 0) | (labels >= len(own)))
    if len(wrong):
        raise DataError(
            f"{file}: sample {wrong[0]} has label {labels[wrong[0]]}, but there are {len(own)} classes; "
            "correct the classes or the labels"
        )
    numbers = {name: number for number, name in enumerate(classes)}
    renamed: npt.NDArray[np.int32] = np.array([numbers[name] for name in own], dtype=np.int32)[labels]
    return renamed


CIFAR_SIDE = 32
# All names that NumPy's arrays in a pickle need, in its versions 1 and 2.
_HARMLESS = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("_codecs", "encode"),
}


def cifar_splits(name: str, src: Path, options: SourceOptions) -> tuple[Openers, list[str]]:
    """Return the splits of the CIFAR of this name in `src`, and its classes; both empty if it is not there.

    Raises DataError.
    """
    from torchvision.datasets import CIFAR10, CIFAR100

    data_set = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    lists = {"train": data_set.train_list, "test": data_set.test_list}
    md5 = {data_set.meta["filename"]: data_set.meta["md5"]}
    md5 |= {file: md5 for files in lists.values() for file, md5 in files}
    files = PublishedFiles(src, name, md5, data_set.filename, data_set.base_folder)
    if files.place is None:
        return {}, []
    contents, folder, encoding = files.read(options.any_hash), data_set.base_folder, options.encoding or "png"
    own = _read(data_set.meta["filename"], contents)[data_set.meta["key"]]

    def open_split(batches: list[str], classes: list[str]) -> PixelSource:
        read = (_batch(f"{folder}/{name}", _read(name, contents)) for name in batches)
        images, labels = map(np.concatenate, zip(*read, strict=True))
        where = f"{folder}/{batches[0]}" + (f" to {batches[-1]}" if len(batches) > 1 else "")
        return PixelSource(where, images, labels, own, classes, encoding, files.facts)

    return {split: partial(open_split, [file for file, _ in listed]) for split, listed in lists.items()}, own


def _batch(name: str, batch: dict[str, Any]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    data, labels = batch.get("data"), batch.get("labels", batch.get("fine_labels"))
    whole = isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.shape[1:] == (3 * CIFAR_SIDE * CIFAR_SIDE,)
    if data is None or not whole or not isinstance(labels, list):
        raise DataError(f"{name} does not have the images and labels of CIFAR's Python version; fetch it again")
    return data.reshape(-1, 3, CIFAR_SIDE, CIFAR_SIDE).transpose(0, 2, 3, 1), np.array(labels, dtype=np.int64)


def _read(name: str, contents: dict[str, bytes]) -> dict[str, Any]:
    try:
        # Python 2 wrote the files; their texts are bytes of latin1.
        found = _PlainUnpickler(io.BytesIO(contents[name]), encoding="latin1").load()
    except Exception as error:  # a damaged pickle raises nearly any error
        raise DataError(f"{name} is not a file of CIFAR's Python version ({error}); fetch it again") from error
    if not isinstance(found, dict):
        raise DataError(f"{name} is not a file of CIFAR's Python version; fetch it again")
    return {key.decode("latin1") if isinstance(key, bytes) else str(key): value for key, value in found.items()}


class _PlainUnpickler(pickle.Unpickler):
    """Reads plain data and NumPy's arrays. A pickle that needs anything else is refused, so none runs code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _HARMLESS:
            raise pickle.UnpicklingError(f"it needs {module}.{name}, which images do not use")
        return super().find_class(module, name)


IMAGES, LABELS, SETS = "102flowers.tgz", "imagelabels.mat", "setid.mat"
FOLDER = "flowers-102"  # torchvision's folder
_SPLITS = {"train": ("trnid", "valid"), "test": ("tstid",)}


def flowers_splits(src: Path, options: SourceOptions) -> tuple[Openers, list[str]]:
    """Return the splits of the Flowers-102 in `src`, and its classes; both empty if there is none. Raises DataError."""
    from torchvision.datasets import Flowers102

    files = PublishedFiles(src, "flowers102", dict(Flowers102._file_dict.values()), folder=FOLDER)
    if files.place is None:
        return {}, []
    # Older torchvision does not have the readable names of the classes.
    own = getattr(Flowers102, "classes", None) or [str(number) for number in range(1, 103)]
    contents = files.read(options.any_hash)
    try:
        with tarfile.open(fileobj=io.BytesIO(contents[IMAGES]), mode="r:gz") as tar:
            images = {member.name: tar.extractfile(member).read() for member in tar if member.isreg()}  # type: ignore[union-attr]
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{IMAGES} is damaged or cut short ({error}); fetch it again") from error
    labels = mat_array(LABELS, contents[LABELS], "labels").reshape(-1)
    found: Openers = {}
    for split, parts in _SPLITS.items():
        ids = np.concatenate([mat_array(SETS, contents[SETS], part).reshape(-1) for part in parts])
        found[split] = partial(FlowersSource, images, labels, ids, own, files.facts)
    return found, own


class FlowersSource(ListedSource):
    """The images with these numbers, which count from 1. See Source. Raises DataError if one is missing."""

    def __init__(
        self,
        images: dict[str, bytes],
        labels: npt.NDArray[Any],
        ids: npt.NDArray[Any],
        own: list[str],
        facts: dict[str, Any],
        classes: list[str],
    ) -> None:
        paths = [f"jpg/image_{number:05d}.jpg" for number in ids]
        missing = next((path for path in paths if path not in images), None)
        if missing is not None or ids.max(initial=0) > len(labels):
            raise DataError(f"{SETS} names {missing or paths[-1]}, which has no image or label; fetch all again")
        numbers = renumbered(LABELS, labels[ids.astype(np.int64) - 1].astype(np.int64) - 1, own, classes)
        super().__init__(classes, paths, numbers, [len(images[path]) for path in paths])
        self._images, self.facts = images, facts

    def read(self, index: int) -> bytes:
        return self._images[self._paths[index]]


CLASSES_FILE = "classes.txt"
_IMAGES = re.compile(r"(?P<split>\w+)-images[-.]idx3-ubyte(\.gz)?")


def idx_splits(src: Path, options: SourceOptions) -> tuple[Openers, list[str]]:
    """Return the splits whose image files are in `src`, such as train and t10k, and their classes. Raises DataError."""
    found: dict[str, Path] = {}
    for path in sorted(src.iterdir()):
        match = _IMAGES.fullmatch(path.name)
        if match:
            found.setdefault(match["split"], path)
    if not found:
        return {}, []
    if (src / CLASSES_FILE).is_file():
        own = lines_of(src / CLASSES_FILE)
    else:  # the numbers up to the largest label
        largest = max(int(read_idx(_labels_of(path)).max(initial=0)) for path in found.values())
        own = [str(label) for label in range(largest + 1)]

    def open_split(images: Path, classes: list[str]) -> PixelSource:
        labels = read_idx(_labels_of(images))
        # The demo's figures were measured with JPEG; at this quality it is smaller than PNG and off by a level or two.
        return PixelSource(str(images), read_idx(images), labels, own, classes, options.encoding or "jpeg")

    return {name: partial(open_split, path) for name, path in found.items()}, own


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """Return the array of an IDX file of bytes, plain or gzipped. Raises DataError if it is damaged."""
    fix = "fetch it again"
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}; {fix}") from error
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise DataError(f"{path} is not an IDX file of bytes; {fix}")
    dimensions = data[3]
    shape = np.frombuffer(data[4 : 4 + 4 * dimensions].ljust(4 * dimensions, b"\0"), dtype=">u4").astype(int)
    expected = 4 + 4 * dimensions + int(shape.prod())
    if len(data) != expected:
        raise DataError(f"{path} has {len(data)} bytes, but its header says {expected}; {fix}")
    return np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _labels_of(images: Path) -> Path:
    for separator in "-.":
        for ending in (".gz", ""):
            name = f"{images.name.split('-images')[0]}-labels{separator}idx1-ubyte{ending}"
            if (images.parent / name).is_file():
                return images.parent / name
    raise DataError(f"{images} has no labels file beside it; expected {images.name.replace('images', 'labels')}")


STL10_SIDE = 96


def stl10_splits(src: Path, options: SourceOptions) -> tuple[Openers, list[str]]:
    """Return the splits of the STL-10 in `src`, and its classes; both empty if there is none. Raises DataError."""
    from torchvision.datasets import STL10

    md5: dict[str, str | None] = {STL10.class_names_file: None}
    md5 |= {file: md5 for file, md5 in (*STL10.train_list, *STL10.test_list) if not file.startswith("unlabeled")}
    files = PublishedFiles(src, "stl10", md5, STL10.filename, STL10.base_folder)
    if files.place is None:
        return {}, []
    contents = files.read(options.any_hash)
    own = contents[STL10.class_names_file].decode("utf-8", "replace").split()

    def open_split(split: str, classes: list[str]) -> PixelSource:
        name = f"{split}_X.bin"
        pixels = np.frombuffer(contents[name], dtype=np.uint8)
        if pixels.size % (3 * STL10_SIDE * STL10_SIDE):
            raise DataError(f"{name} has {pixels.size} bytes, not a whole number of images; fetch it again")
        # Each image is three planes, each column by column.
        images = pixels.reshape(-1, 3, STL10_SIDE, STL10_SIDE).transpose(0, 3, 2, 1)
        labels = np.frombuffer(contents[f"{split}_y.bin"], dtype=np.uint8).astype(np.int64) - 1
        return PixelSource(name, images, labels, own, classes, options.encoding or "png", files.facts)

    return {split: partial(open_split, split) for split in ("train", "test")}, own


DIGITS = [str(digit) for digit in range(10)]
_LABEL_OF_ZERO = 10


def svhn_splits(src: Path, options: SourceOptions) -> tuple[Openers, list[str]]:
    """Return the splits whose files are in `src`, and the classes; both empty if there is none."""
    from torchvision.datasets import SVHN

    found: Openers = {}
    for split, (_, file, md5) in SVHN.split_list.items():
        files = PublishedFiles(src, "svhn_extra" if split == "extra" else "svhn", {file: md5})
        if files.place is not None:
            found[split] = partial(_open_svhn, file, files, options)
    return found, DIGITS if found else []


def _open_svhn(file: str, files: PublishedFiles, options: SourceOptions, classes: list[str]) -> PixelSource:
    data = files.read(options.any_hash)[file]
    images, labels = mat_array(file, data, "X"), mat_array(file, data, "y").reshape(-1).astype(np.int64)
    if images.ndim != 4 or images.shape[2] != 3 or images.dtype != np.uint8:
        raise DataError(f"{file}: X is {images.dtype} {images.shape}, not uint8 [H, W, 3, n]; fetch it again")
    digits = np.where(labels == _LABEL_OF_ZERO, 0, np.where(labels == 0, -1, labels))
    encoding = options.encoding or "png"
    return PixelSource(file, np.moveaxis(images, -1, 0), digits, DIGITS, classes, encoding, files.facts)
