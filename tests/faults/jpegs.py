"""JPEGs with damaged bytes and segments, which the native decoder and recoder read.

    python -m tests.faults.jpegs COUNT SEED LAST

It is meant for a process that has the C++ built with sanitizers (tests/faults/test_sanitizers.py), which end it at the
first fault. The file LAST then holds the JPEG. The last line of the output has the counts as JSON.
"""

import json
import random
import struct
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from karat_scale.data.decoders.decode import UndecodableImageError, View, centre_view, crop_view
from karat_scale.data.decoders.native import NativeDecoder, NativeRecoder
from tests.data.decoders.conftest import encode_photo

MAX_PIXELS = 200_000
KINDS = (
    {},
    {"progressive": True},
    {"restart_marker_blocks": 1},
    {"subsampling": "4:4:4"},
    {"subsampling": "4:2:2", "progressive": True},
    {"mode": "L"},
    {"mode": "CMYK"},
    {"quality": 5},
    {"optimize": True, "exif": b"Exif\0\0" + bytes(60), "comment": b"x" * 30},
)
SIZES = ((1, 1), (7, 9), (16, 16), (33, 70), (90, 61), (8, 300))
HEADERS = {0xC0, 0xC1, 0xC2}


def segments(data: bytes) -> list[bytes]:
    """Return a JPEG's marker segments; the last piece is everything from the first scan's header on."""
    pieces, at = [data[:2]], 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        pieces.append(data[at:end])
        at = end
    return [*pieces, data[at:]]


def mutated(chosen: random.Random, photos: list[bytes]) -> bytes:
    """Return one photo with its structure and its bytes changed a little."""
    pieces = segments(chosen.choice(photos))
    for _ in range(chosen.choice((0, 1, 1, 2))):
        at = chosen.randrange(1, len(pieces))
        pieces = chosen.choice(MUTATIONS)(chosen, pieces, at, photos)
    data = bytearray(b"".join(pieces))
    for _ in range(chosen.choice((0, 1, 1, 2, 8))):
        data[chosen.randrange(len(data))] = chosen.choice((chosen.randrange(256), 0xFF, 0x00, 0xD9, 0xDA, 0xC4, 0xDB))
    if chosen.random() < 0.2:
        del data[chosen.randrange(len(data)) :]
    if chosen.random() < 0.1:
        at = chosen.randrange(len(data) + 1)
        data[at:at] = chosen.randbytes(chosen.randrange(40))
    return bytes(data)


def _foreign(chosen: random.Random, pieces: list[bytes], at: int, photos: list[bytes]) -> list[bytes]:
    """Replace a segment by one of another photo: other tables, other sampling, another image's scan."""
    others = segments(chosen.choice(photos))
    return [*pieces[:at], others[min(at, len(others) - 1)], *pieces[at + 1 :]]


def _resized(chosen: random.Random, pieces: list[bytes], at: int, photos: list[bytes]) -> list[bytes]:
    """Change the height and width in the frame's header, or a byte that describes its components."""
    frame = next((i for i, piece in enumerate(pieces) if len(piece) > 11 and piece[1] in HEADERS), None)
    if frame is None:
        return pieces
    header = bytearray(pieces[frame])
    sides = (chosen.choice((0, 1, 2, 7, 8, 9, 17, 65, 400, 65535)) for _ in range(2))
    if chosen.random() < 0.5:
        struct.pack_into(">HH", header, 5, *sides)
    else:
        header[chosen.randrange(9, len(header))] = chosen.choice(
            (0, 1, 2, 3, 4, 0x11, 0x12, 0x21, 0x22, 0x41, 0x14, 0xFF)
        )
    return [*pieces[:frame], bytes(header), *pieces[frame + 1 :]]


MUTATIONS: tuple[Callable[[random.Random, list[bytes], int, list[bytes]], list[bytes]], ...] = (
    lambda chosen, pieces, at, photos: pieces[:at] + pieces[at + 1 :],
    lambda chosen, pieces, at, photos: pieces[: at + 1] + pieces[at:],  # doubled
    lambda chosen, pieces, at, photos: [*pieces[: at - 1], *reversed(pieces[at - 1 : at + 1]), *pieces[at + 1 :]],
    _foreign,
    _resized,
)


def view_of(chosen: random.Random, width: int, height: int) -> View:
    """Return any part of the image at any size, as training and evaluation request."""
    if chosen.random() < 0.3:
        size = chosen.randrange(1, 40)
        return centre_view(width, height, size + chosen.randrange(8), size)
    left, top = chosen.randrange(width), chosen.randrange(height)
    box = (left, top, chosen.randint(1, width - left), chosen.randint(1, height - top))
    return crop_view(box, chosen.choice((1, 2, 7, 16, 31, 32, 33, 100)))


def main(count: int, seed: int, last: Path) -> None:
    """Decode and recode `count` JPEGs."""
    photos = [encode_photo(*size, number, **kind) for number, kind in enumerate(KINDS) for size in SIZES]
    decoders = [NativeDecoder(name, MAX_PIXELS) for name in ("bilinear", "bicubic")]
    recoder, counts = NativeRecoder(), Counter[str]()
    for number in range(count):
        chosen = random.Random(f"{seed} {number}")
        data = mutated(chosen, photos)
        last.write_bytes(data)
        try:
            # Not `read`, which lets Pillow read what is refused.
            pixels = chosen.choice(decoders)._decoded(data, lambda *size, chosen=chosen: view_of(chosen, *size))
            counts["decoded" if pixels is not None else "refused"] += 1
        except UndecodableImageError:
            counts["too large"] += 1
        recoded = recoder.shrink(data, chosen.randrange(1, 50), chosen.randint(1, 100), chosen.randint(1, 3))
        counts["recoded" if recoded is not None else "not recoded"] += 1
    print(json.dumps({"jpegs": count, **counts}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
