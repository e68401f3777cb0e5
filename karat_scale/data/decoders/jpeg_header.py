"""Read the dimensions of an ordinary JPEG from its first few hundred bytes, without a library."""

import struct
from dataclasses import dataclass

START_OF_IMAGE = b"\xff\xd8"
# Start of frame, Huffman-coded with 8 bits: baseline, extended sequential, progressive.
FRAMES = (0xC0, 0xC1, 0xC2)
# Arithmetic, lossless and hierarchical frames, and the start of a scan before any frame.
NOT_ORDINARY = (0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF, 0xDA)
START_OF_SCAN, FILL = 0xDA, 0xFF
# The segment of EXIF and XMP, and one that means nothing to a decoder.
APP1, APP15 = 0xE1, 0xEF
LENGTH_BYTES, MARKER_BYTES, FRAME_BYTES = 2, 4, 6


@dataclass(frozen=True)
class Frame:
    """Width and height in pixels and the number of colour components."""

    width: int
    height: int
    components: int

    @property
    def is_grey_or_colour(self) -> bool:
        """True if every JPEG decoder reads it equally: one component or three, so neither CMYK nor YCCK."""
        return self.components in (1, 3)


def read_frame(data: bytes) -> Frame | None:
    """Return the frame of a JPEG with 8 bits per sample; None for other data and for junk between segments."""
    if not data.startswith(START_OF_IMAGE):
        return None
    at = len(START_OF_IMAGE)
    while at + MARKER_BYTES + FRAME_BYTES <= len(data):
        prefix, marker, length = struct.unpack_from(">BBH", data, at)
        if prefix != 0xFF or marker in NOT_ORDINARY or not 0xC0 <= marker < 0xFF or length < LENGTH_BYTES:
            return None
        if marker in FRAMES:
            bits, height, width, components = struct.unpack_from(">BHHB", data, at + MARKER_BYTES)
            return Frame(width, height, components) if bits == 8 and width and height else None
        at += MARKER_BYTES - LENGTH_BYTES + length
    return None


def hide_exif(data: bytearray) -> bool:
    """Rename the segments that hold EXIF, so that no decoder turns the image; its pixels stay what they are.

    Returns False if junk before the pixels leaves it open where the segments are.
    """
    at = len(START_OF_IMAGE)
    while at + MARKER_BYTES <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == START_OF_SCAN:
            return True
        if marker == FILL:
            at += 1
            continue
        if marker == APP1:
            data[at + 1] = APP15
        at += MARKER_BYTES - LENGTH_BYTES + int.from_bytes(data[at + 2 : at + MARKER_BYTES], "big")
    return False
