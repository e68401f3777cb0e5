"""The folder of the scripts, and files in MNIST's format."""

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.data.prepare.images import write_folders

SCRIPTS = ROOT / "data_prep"


def idx_bytes(array: np.ndarray) -> bytes:
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write a small ImageNet in folders; return their directory."""
    write_folders(tmp_path / "src")
    return tmp_path / "src"


@pytest.fixture
def write_idx() -> Callable[..., None]:
    """Return a function that writes an images and a labels file in MNIST's format, and returns the images."""

    def write(folder: Path, split: str, count: int, classes: int = 10, packed: bool = True) -> np.ndarray:
        rng = np.random.default_rng(count)
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % classes).astype(np.uint8)
        for name, array in ((f"{split}-images-idx3-ubyte", images), (f"{split}-labels-idx1-ubyte", labels)):
            if packed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(array)))
            else:
                (folder / name).write_bytes(idx_bytes(array))
        return images

    return write
