"""IDX files, the format of MNIST and Fashion-MNIST, as a source: grey images, encoded as JPEG."""

import gzip
import hashlib
import io
import re
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from karat_scale.errors import DataError

JPEG_QUALITY = 95
CLASSES_FILE = "classes.txt"
_IMAGES = re.compile(r"(?P<split>\w+)-images[-.]idx3-ubyte(\.gz)?")
_LABELS = "labels{}idx1-ubyte"


def idx_splits(src: Path) -> dict[str, Path]:
    """The image files of `src` by split name, such as train and t10k."""
    found: dict[str, Path] = {}
    for path in sorted(src.iterdir()):
        match = _IMAGES.fullmatch(path.name)
        if match:
            found.setdefault(match["split"], path)
    return found


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """The array of an IDX file of bytes, plain or gzipped. Raises DataError where it is damaged."""
    mend = "fetch it again"
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}; {mend}") from error
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise DataError(f"{path} is not an IDX file of bytes; {mend}")
    dimensions = data[3]
    shape = np.frombuffer(data[4 : 4 + 4 * dimensions].ljust(4 * dimensions, b"\0"), dtype=">u4").astype(int)
    expected = 4 + 4 * dimensions + int(shape.prod())
    if len(data) != expected:
        raise DataError(f"{path} has {len(data)} bytes, but its header says {expected}; {mend}")
    return np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def idx_classes(src: Path) -> list[str]:
    """Class names from classes.txt beside the files, one a line; else the numbers up to the largest label."""
    listed = src / CLASSES_FILE
    if listed.is_file():
        return [line.strip() for line in listed.read_text().splitlines() if line.strip()]
    largest = max(int(read_idx(_labels_of(path)).max(initial=0)) for path in idx_splits(src).values())
    return [str(label) for label in range(largest + 1)]


def _labels_of(images: Path) -> Path:
    for separator in "-.":
        for ending in (".gz", ""):
            name = images.name.split("-images")[0] + "-" + _LABELS.format(separator) + ending
            if (images.parent / name).is_file():
                return images.parent / name
    raise DataError(f"{images} has no labels file beside it; expected {images.name.replace('images', 'labels')}")


class IdxSource:
    """The images of one IDX file with their labels. See Source. Raises DataError where the two do not fit."""

    def __init__(self, images: Path, classes: list[str]) -> None:
        self.classes = classes
        self.skipped: list[tuple[str, str]] = []
        self._images = read_idx(images)
        self.labels: npt.NDArray[np.int32] = read_idx(_labels_of(images)).astype(np.int32)
        self._file = images.name
        if self._images.ndim != 3 or self.labels.ndim != 1 or len(self._images) != len(self.labels):
            raise DataError(
                f"{images} holds {self._images.shape} values, its labels {self.labels.shape}; fetch both again"
            )
        if len(self._images) == 0:
            raise DataError(f"{images} holds no images")
        wrong = np.flatnonzero(self.labels >= len(classes))
        if len(wrong):
            raise DataError(
                f"{_labels_of(images)}: sample {wrong[0]} has label {self.labels[wrong[0]]}, but there are "
                f"{len(classes)} classes; correct {CLASSES_FILE} or the labels"
            )

    def __len__(self) -> int:
        return len(self._images)

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        # Unknown before encoding; at this quality a small grey image takes about as many bytes as pixels.
        return np.full(len(self), self._images[0].size, dtype=np.int64)

    def name(self, index: int) -> str:
        return f"{self._file}[{index}]"

    def key(self, index: int) -> str:
        return f"{index:06d}"

    def read(self, index: int) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(self._images[index]).save(buffer, "JPEG", quality=JPEG_QUALITY)
        return buffer.getvalue()

    def fingerprint(self) -> str:
        return hashlib.sha256(self._images.tobytes() + self.labels.astype(np.uint8).tobytes()).hexdigest()
