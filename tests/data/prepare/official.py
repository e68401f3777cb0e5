"""Small imitations of the official files of the small data sets.

They have few images. Except in Flowers-102, the brightness of an image shows its class.
"""

import gzip
import io
import pickle
from pathlib import Path

import numpy as np
from scipy.io import savemat
from torchvision.datasets import Flowers102

from tests.data.prepare.images import jpeg
from tests.data.tars import tar_bytes

Split = tuple[np.ndarray, np.ndarray]
CIFAR10_FILES = [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]


def pixels(count: int, classes: int, side: int, seed: int = 0) -> Split:
    """Return images [n, side, side, 3] and labels from 0."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    noise = rng.integers(0, 40, (count, side, side, 3))
    return (noise + (labels * 200 // classes)[:, None, None, None]).astype(np.uint8), labels


class Python2Pickler(pickle._Pickler):
    """Writes texts and bytes like Python 2, which made CIFAR's files."""

    def save_string(self, text: str | bytes) -> None:
        data = text.encode("latin1") if isinstance(text, str) else text
        self.write(pickle.BINSTRING + len(data).to_bytes(4, "little") + data)
        self.memoize(text)

    dispatch = {**pickle._Pickler.dispatch, str: save_string, bytes: save_string}  # noqa: RUF012


def pickled(value: object, by_python2: bool) -> bytes:
    buffer = io.BytesIO()
    (Python2Pickler if by_python2 else pickle.Pickler)(buffer, 2 if by_python2 else 4).dump(value)
    return buffer.getvalue()


def write_cifar(src: Path, fine: bool, each: int = 8, packed: bool = True, by_python2: bool = True) -> dict[str, Split]:
    """Write CIFAR-10, or CIFAR-100 if `fine`; return images and labels by split."""
    folder, key = ("cifar-100-python", "fine_labels") if fine else ("cifar-10-batches-py", "labels")
    classes = 100 if fine else 10
    listed = [f"class {n}" for n in range(classes)]
    meta = {"fine_label_names": listed, "coarse_label_names": []} if fine else {"label_names": listed}
    files = {"meta" if fine else "batches.meta": pickled(meta, by_python2)}
    made: dict[str, list[Split]] = {"train": [], "test": []}
    for number, name in enumerate(["train", "test"] if fine else CIFAR10_FILES):
        images, labels = pixels(each, classes, 32, number)
        made["test" if name.startswith("test") else "train"].append((images, labels))
        rows = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(each, -1)
        files[name] = pickled({"data": rows, key: labels.tolist()}, by_python2)
    write_files(src, f"cifar-{classes}-python.tar.gz" if packed else None, folder, files)
    return {split: tuple(map(np.concatenate, zip(*parts, strict=True))) for split, parts in made.items()}


def write_svhn(src: Path, each: int = 12, splits: tuple[str, ...] = ("train", "test")) -> dict[str, Split]:
    """Write SVHN's cropped digits, where the digit 0 has the label 10; return images and digits by split."""
    src.mkdir(parents=True, exist_ok=True)
    made = {split: pixels(each, 10, 32, number) for number, split in enumerate(splits)}
    for split, (images, digits) in made.items():
        labels = np.where(digits == 0, 10, digits).astype(np.uint8)[:, None]
        variables = {"X": images.transpose(1, 2, 3, 0), "y": labels}
        savemat(src / f"{split}_32x32.mat", variables, do_compression=True)
    return made


def write_stl10(src: Path, each: int = 10, packed: bool = True) -> dict[str, Split]:
    """Write STL-10's binary version: planes, column by column, and labels from 1. Return images and labels from 0."""
    files = {"class_names.txt": b"airplane\nbird\ncar\ncat\ndeer\ndog\nhorse\nmonkey\nship\ntruck\n"}
    made = {split: pixels(each, 10, 96, number) for number, split in enumerate(("train", "test"))}
    for split, (images, labels) in made.items():
        files[f"{split}_X.bin"] = images.transpose(0, 3, 2, 1).tobytes()
        files[f"{split}_y.bin"] = (labels + 1).astype(np.uint8).tobytes()
    files["unlabeled_X.bin"] = b"never read"
    write_files(src, "stl10_binary.tar.gz" if packed else None, "stl10_binary", files)
    return made


def write_flowers(src: Path, count: int = 12) -> dict[int, bytes]:
    """Write Flowers-102, where image n, counted from 1, has class n; return the images by number.

    Of six images, two are for training, one for validation and three for testing.
    """
    src.mkdir(parents=True, exist_ok=True)
    images = {number: jpeg(number, 40, 30) for number in range(1, count + 1)}
    tgz = gzip.compress(tar_bytes({f"jpg/image_{number:05d}.jpg": data for number, data in images.items()}))
    image, label, sets = (Flowers102._file_dict[part][0] for part in ("image", "label", "setid"))
    (src / image).write_bytes(tgz)
    savemat(src / label, {"labels": np.arange(1, count + 1, dtype=np.uint8)[None]})
    ids = np.arange(1, count + 1, dtype=np.uint16)
    parts = {"trnid": ids[ids % 6 < 2], "valid": ids[ids % 6 == 2], "tstid": ids[ids % 6 > 2]}
    savemat(src / sets, {name: numbers[None] for name, numbers in parts.items()})
    return images


def write_files(src: Path, archive: str | None, folder: str, files: dict[str, bytes]) -> None:
    """Write files as members of `folder` in a packed archive, or into that folder."""
    if archive is None:
        (src / folder).mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (src / folder / name).write_bytes(data)
        return
    src.mkdir(parents=True, exist_ok=True)
    members = {f"{folder}/{name}": data for name, data in files.items()}
    (src / archive).write_bytes(tar_bytes(members, "w:gz", compresslevel=1))
