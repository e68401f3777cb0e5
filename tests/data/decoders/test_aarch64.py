"""The native decoder, the recoder and the warps, built for aarch64 and run by an emulator, give the same bits as here.

`make test-aarch64` installs what these tests need. CI runs them each time.
"""

import io
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from karat_scale.data.augmentation import augment
from karat_scale.data.decoders import native
from karat_scale.data.decoders.decode import View, centre_view, crop_view, result_size
from karat_scale.data.decoders.libraries import RESAMPLE
from karat_scale.foundation.native_build import FLAGS
from tests.conftest import output_of
from tests.data.conftest import encode, photo

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
SOURCES = (Path(__file__).parent / "portable.cpp", native.DECODER, native.RECODER, augment.SOURCE)
FILL = (124, 116, 104)

pytestmark = [
    pytest.mark.slow(together=True),
    pytest.mark.skipif(
        not (shutil.which(COMPILER) and shutil.which(EMULATOR)), reason="make test-aarch64 installs what it needs"
    ),
]


def sized(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("aarch64") / "portable"
    flags = [flag for flag in FLAGS if flag != "-fPIC"]
    output_of(COMPILER, *flags, "-ffp-contract=off", "-static", *SOURCES, "-ljpeg", "-o", program)
    return program


def answers(program: Path, requests: list[bytes]) -> list[bytes]:
    done = subprocess.run([EMULATOR, str(program)], input=b"".join(requests), capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found, rest = [], done.stdout
    while rest:
        (size,) = struct.unpack_from("<Q", rest)
        found.append(rest[8 : 8 + size])
        rest = rest[8 + size :]
    assert len(found) == len(requests)
    return found


def jpegs() -> list[tuple[bytes, int, int]]:
    noise = np.random.default_rng(0).integers(0, 256, (211, 173, 3), dtype=np.uint8)
    return [
        (encode(photo(1, 260, 190), quality=95), 260, 190),
        (encode(photo(2, 190, 260), quality=80, subsampling=0), 190, 260),
        (encode(photo(3, 201, 203), quality=90, progressive=True), 201, 203),
        (encode(photo(4, 240, 180)[..., 0], quality=90), 240, 180),
        (encode(noise, quality=92), 173, 211),
    ]


def views(width: int, height: int) -> list[View]:
    return [
        crop_view((0, 0, width, height), 96),
        crop_view((13, 7, 101, 77), 64),
        crop_view((5, 9, 24, 31), 64),
        centre_view(width, height, 72, 64),
    ]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_decoder_gives_the_same_pixels(program: Path, interpolation: str) -> None:
    here = native.NativeDecoder(interpolation, 10**8)
    requests, expected = [], []
    for data, width, height in jpegs():
        for view in views(width, height):
            asked = native._View(*view.region, *view.box, *view.size, native.INTERPOLATIONS[interpolation])
            requests.append(b"d" + sized(data) + sized(bytes(asked)) + struct.pack("<2i", *view.size))
            expected.append(here.read(data, lambda _width, _height, view=view: view).transpose(2, 0, 1).tobytes())
    assert answers(program, requests) == expected


def test_the_recoder_gives_the_same_bytes(program: Path) -> None:
    here, requests, expected = native.NativeRecoder(), [], []
    for data, width, height in jpegs():
        for side in (32, 100):
            size = result_size(width, height, side)
            shrink = next((part for part in native.SHRINKS if min(width, height) >= part * 2 * side), 1)
            requests.append(b"s" + sized(data) + struct.pack("<4i", 8 // shrink, *size, 90))
            expected.append(here.shrink(data, side, 90, 2))
    assert all(expected)
    assert answers(program, requests) == expected
    assert min(Image.open(io.BytesIO(expected[0])).size) == 32


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_warps_give_pillows_bits(program: Path, interpolation: str) -> None:
    requests, expected = [], []
    rng = np.random.default_rng(5)
    for width, height in ((1, 1), (31, 7), (57, 90)):
        planes = rng.integers(0, 256, (3, height, width), dtype=np.uint8)
        image = augment.image_of(planes)
        matrices = [augment.rotation(31.0, width, height), (1, 0.3, 2.5, -0.2, 1, 0), tuple(rng.uniform(-2, 2, 6))]
        for matrix in matrices:
            asked = struct.pack("<6d3i", *matrix, width, height, int(interpolation == "bicubic"))
            requests.append(b"w" + sized(planes.tobytes()) + sized(bytes(FILL)) + asked)
            theirs = image.transform(
                image.size, Image.Transform.AFFINE, matrix, RESAMPLE[interpolation], fillcolor=FILL
            )
            expected.append(augment.planes_of(theirs).tobytes())
    assert answers(program, requests) == expected
