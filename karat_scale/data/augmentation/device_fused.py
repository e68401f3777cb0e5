"""Augmentation of a batch in at most two kernels a turn, whatever the operations: `device_triton`'s, launched.

The launches are operations of torch.library, so that the same code runs on `meta` tensors, where kernels are counted.
"""

import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from karat_scale.attention.kernels.triton_toolchain import launch_problem

# Pixels that a program works on at a time; more would not fit the registers of the kernel that interpolates.
TURN_BLOCK, TABLE_BLOCK = 256, 1024
# The results of `device_ops` to the bit: a fused multiply-add rounds once where Pillow rounds twice.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def can_run(device: torch.device) -> bool:
    """Whether Triton launches kernels on the device."""
    if device.type == "meta":
        return True
    if importlib.util.find_spec("triton") is None or torch.version.hip is not None:
        return False
    return (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1") and launch_problem() is None


def augment(
    images: Tensor,
    program: Tensor,
    by_table: Sequence[bool],
    fill: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    cubic: bool,
) -> Tensor:
    """All turns of `program` (see `pack`), uint8 [b, 3, H, W] to new images.

    fill: a colour, in levels. mean, std: of erased boxes, in fractions of the range.
    """
    device = images.device
    program = (program.pin_memory() if device.type == "cuda" else program).to(device, non_blocking=True)
    images = images.contiguous()
    noise = [255 * x for x in (*mean, *std)]
    for turn, needs_tables in zip(program.unbind(), by_table, strict=True):
        # Not read where no image of the turn has a table.
        tables = torch.ops.karat_scale.augment_tables(images, turn) if needs_tables else images
        images = torch.ops.karat_scale.augment_turn(images, turn, tables, list(fill), noise, cubic)
    return images


def _tables(images: Tensor, turn: Tensor) -> Tensor:
    from karat_scale.data.augmentation.device_triton import tables_kernel

    tables: Tensor = _fake_tables(images, turn)
    with torch.cuda.device_of(images):
        tables_kernel[(3 * len(images),)](
            images, turn, tables, images.shape[2] * images.shape[3], BLOCK=TABLE_BLOCK, **OPTIONS
        )
    return tables


def _turn(images: Tensor, turn: Tensor, tables: Tensor, fill: list[int], noise: list[float], cubic: bool) -> Tensor:
    from karat_scale.data.augmentation.device_triton import turn_kernel

    result = torch.empty_like(images)
    batch, _, height, width = images.shape
    with torch.cuda.device_of(images):
        turn_kernel[(-(-height * width // TURN_BLOCK), batch)](
            images, turn, tables, result, height, width, *fill, *noise, CUBIC=cubic, BLOCK=TURN_BLOCK, **OPTIONS
        )
    return result


_library = torch.library.Library("karat_scale", "FRAGMENT")
_library.define("augment_tables(Tensor images, Tensor turn) -> Tensor")
_library.define(
    "augment_turn(Tensor images, Tensor turn, Tensor tables, int[] fill, float[] noise, bool cubic) -> Tensor"
)
_library.impl("augment_tables", _tables, "CompositeExplicitAutograd")
_library.impl("augment_turn", _turn, "CompositeExplicitAutograd")


def _fake_tables(images: Tensor, _turn: Tensor) -> Tensor:
    return images.new_empty(len(images), 3, 256)


def _fake_turn(images: Tensor, *_: object) -> Tensor:
    return torch.empty_like(images)


torch.library.register_fake("karat_scale::augment_tables", _fake_tables, lib=_library)
torch.library.register_fake("karat_scale::augment_turn", _fake_turn, lib=_library)
