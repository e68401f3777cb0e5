"""Small real images, and ImageNet's layouts made of them."""

import os
from pathlib import Path

import pytest
from PIL import Image

from tests.data.conftest import encode, photo
from tests.data.tars import tar_bytes

WNIDS = ("n01440764", "n01443537", "n02119789")


def jpeg(
    seed: int, width: int = 24, height: int = 20, kind: str = "JPEG", mode: str = "RGB", **options: object
) -> bytes:
    """Return a smooth image, different for each seed."""
    return encode(Image.fromarray(photo(seed, width, height)).convert(mode), kind, **options)


def train_files(per_class: int = 6) -> dict[str, dict[str, bytes]]:
    """Return training images by class and file name."""
    return {
        wnid: {f"{wnid}_{number}.JPEG": jpeg(100 * label + number) for number in range(per_class)}
        for label, wnid in enumerate(WNIDS)
    }


def val_files(count: int = 9) -> dict[str, tuple[str, bytes]]:
    """Return the class and the bytes of validation images by file name."""
    return {f"ILSVRC2012_val_{n:08d}.JPEG": (WNIDS[(n * 2) % 3], jpeg(1000 + n)) for n in range(1, count + 1)}


def write_official(src: Path, per_class: int = 6) -> None:
    """Write small versions of ImageNet's tars, with Kaggle's labels."""
    src.mkdir(parents=True, exist_ok=True)
    inner = {f"{wnid}.tar": tar_bytes(files) for wnid, files in train_files(per_class).items()}
    (src / "ILSVRC2012_img_train.tar").write_bytes(tar_bytes(inner))
    val = val_files()
    (src / "ILSVRC2012_img_val.tar").write_bytes(tar_bytes({name: data for name, (_, data) in val.items()}))
    rows = [f"{name.removesuffix('.JPEG')},{wnid} 1 2 3 4 {wnid} 5 6 7 8" for name, (wnid, _) in val.items()]
    (src / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *reversed(rows)]) + "\n")


def write_folders(src: Path, per_class: int = 6) -> None:
    """Write the same images as an ImageFolder."""
    for wnid, files in train_files(per_class).items():
        for name, data in files.items():
            write(src / "train" / wnid / name, data)
    for name, (wnid, data) in val_files().items():
        write(src / "val" / wnid / name, data)


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def contents(directory: Path, pattern: str = "*") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.glob(pattern)) if path.is_file()}


def sample_file(name: str) -> Path:
    """Return a file of real images, or skip the test if there is none."""
    path = Path(os.environ.get("KARAT_SAMPLE_DATA", "../shared/data")) / name
    if not path.is_file():
        pytest.skip(f"{path} is not there; set KARAT_SAMPLE_DATA")
    return path
