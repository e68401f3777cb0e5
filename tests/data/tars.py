"""Tars of small images, as others write them."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

Members = Iterable[tuple[str, bytes]]


def image(number: int, kind: str = "JPEG") -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(data, kind)
    return data.getvalue()


def tar_bytes(members: Members | dict[str, bytes], mode: str = "w", **options: object) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, **options) as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def write_tar(path: Path, members: Members) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(members))


def tar_files(path: Path) -> dict[str, bytes]:
    """Return the contents of a tar's files by name."""
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}


def tar_of(folder: Path, name: str = ".") -> Path:
    """Write a tar beside a folder, which is called `name` in the tar; return its path."""
    path = folder.with_name(f"{folder.name}.tar")
    with tarfile.open(path, "w") as tar:
        tar.add(folder, name)
    return path


def sample(number: int, label: object = 0) -> list[tuple[str, bytes]]:
    """Return the members of a sample with its class in .cls."""
    return [(f"s{number}.jpg", image(number)), (f"s{number}.cls", str(label).encode())]


def write_stream(directory: Path, sizes: Iterable[int], classes: int = 3) -> Path:
    """Write tars 0.tar, 1.tar, ... with these numbers of samples; return their directory."""
    number = 0
    for shard, size in enumerate(sizes):
        members: list[tuple[str, bytes]] = []
        for _ in range(size):
            members += sample(number, number % classes)
            number += 1
        write_tar(directory / f"{shard}.tar", members)
    return directory
