"""The operations on each image of a batch, as one table of numbers that goes to the device in one copy."""

from collections.abc import Sequence
from enum import IntEnum
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor

from karat_scale.data.augmentation.augment import JITTERS, MATRICES
from karat_scale.data.batch import Draw, Operation
from karat_scale.data.decoders.decode import View

ERASE = "Erase"
# The kind of an operation and up to six arguments; a power of two keeps each turn's table aligned.
COLUMNS = 8
# The same of a view: where its image is, and the view.
VIEW_COLUMNS, VIEW_BOX = 16, 9

# One operation of each image, None where it has none left.
Turn = tuple[Operation | None, ...]


class Kind(IntEnum):
    """The kinds of operation in the kernels. From BRIGHTNESS on, a channel's new level depends only on its old one."""

    NONE = 0
    AFFINE = 1
    ERASE = 2
    COLOR = 3
    DESATURATE = 4
    SHARPNESS = 5
    BRIGHTNESS = 6
    CONTRAST = 7
    POSTERIZE = 8
    SOLARIZE = 9
    SOLARIZE_ADD = 10
    INVERT = 11
    AUTO_CONTRAST = 12
    EQUALIZE = 13


_BLENDED = {
    "Brightness": Kind.BRIGHTNESS,
    "Contrast": Kind.CONTRAST,
    "Color": Kind.COLOR,
    "Sharpness": Kind.SHARPNESS,
}
# By timm's names; where only the strength is drawn in another way, the operation is the same.
KINDS: dict[str, Kind] = {
    **_BLENDED,
    **{f"{name}Increasing": kind for name, kind in _BLENDED.items()},
    **dict.fromkeys(MATRICES, Kind.AFFINE),
    **dict.fromkeys(("Posterize", "PosterizeIncreasing", "PosterizeOriginal"), Kind.POSTERIZE),
    **dict.fromkeys(("Solarize", "SolarizeIncreasing"), Kind.SOLARIZE),
    "SolarizeAdd": Kind.SOLARIZE_ADD,
    "Invert": Kind.INVERT,
    "AutoContrast": Kind.AUTO_CONTRAST,
    "Equalize": Kind.EQUALIZE,
    "Desaturate": Kind.DESATURATE,
    ERASE: Kind.ERASE,
}


def turns(draws: Sequence[Draw]) -> list[Turn]:
    """Return the operations in turns: the first of each image, then the second, and so on.

    An image's operations are those of RandAugment, jitter and erasing, in this order.
    """
    return list(zip_longest(*map(_operations, draws)))


def _operations(draw: Draw) -> tuple[Operation, ...]:
    jitter = tuple((JITTERS[name], (factor,)) for name, factor in draw.jitter)
    return draw.ops + jitter + (() if draw.erase is None else ((ERASE, draw.erase),))


def pack(all_turns: Sequence[Turn], width: int, height: int) -> tuple[Tensor, list[bool]]:
    """Return the table, float64 [turns, images, COLUMNS], and whether each turn needs tables of levels.

    The images have these dimensions in pixels. A row is the Kind and its arguments: the six of a matrix of MATRICES;
    left, top, width, height and seed of a box; else one number.
    """
    images = len(all_turns[0]) if all_turns else 0
    numbers = [0.0] * (len(all_turns) * images * COLUMNS)
    by_table = [False] * len(all_turns)
    place = 0
    for number, turn in enumerate(all_turns):
        for operation in turn:
            if operation is not None:
                name, arguments = operation
                kind = KINDS[name]
                if kind == Kind.AFFINE:
                    arguments = MATRICES[name](arguments[0], width, height)
                by_table[number] |= kind >= Kind.BRIGHTNESS
                numbers[place] = float(kind)
                numbers[place + 1 : place + 1 + len(arguments)] = arguments
            place += COLUMNS
    # By numpy, which reads a list in half the time.
    return torch.from_numpy(np.array(numbers)).view(len(all_turns), images, COLUMNS), by_table


def pack_views(images: Sequence[Tensor], views: Sequence[View], flips: Sequence[bool]) -> Tensor:
    """Return the table, int64 [images, VIEW_COLUMNS], of views of whole images, uint8 [3, h, w] each with any strides.

    A row is the image's address and strides, the ends of the view's region, and whether to mirror it; from VIEW_BOX on,
    the bits of the ends of its box in float64.
    """
    table = np.zeros((len(images), VIEW_COLUMNS), dtype=np.int64)
    rows = zip(images, views, flips, strict=True)
    table[:, :VIEW_BOX] = [(image.data_ptr(), *image.stride(), *view.region, flip) for image, view, flip in rows]
    table[:, VIEW_BOX : VIEW_BOX + 4] = np.array([view.box for view in views], dtype=np.float64).view(np.int64)
    return torch.from_numpy(table)
