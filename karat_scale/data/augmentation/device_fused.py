"""Augment a batch on its device in few kernels of `device_triton`.

One kernel makes all crops, at most two do each turn, and one makes the model's input. The launches are operations of
torch.library, so that the same code runs on `meta` tensors, where kernels are counted.
"""

import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from karat_scale.attention.kernels.triton_toolchain import launch_problem
from karat_scale.data.augmentation.device_program import pack_views
from karat_scale.data.augmentation.mixing import MixParams
from karat_scale.data.decoders.decode import View

# Pixels that a program works on at a time; more would not fit the registers of the kernel that interpolates.
TURN_BLOCK, TABLE_BLOCK, INPUT_BLOCK = 256, 1024, 1024
# Each thread has one column of a view.
VIEW_ROWS, VIEW_WIDTH = 8, 128
MIXES = ("none", "mixup", "cutmix")
# The results of `device_augment` to the bit: a fused multiply-add rounds once where Pillow rounds twice.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def can_run(device: torch.device) -> bool:
    """Return whether Triton launches kernels on the device."""
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
    """Return images, uint8 [b, 3, H, W], after all turns of `program` (see `pack`).

    fill: a colour, in levels. mean, std: those of the noise in erased boxes, in fractions of the range.
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


def resized_views(
    images: Sequence[Tensor], views: Sequence[View], flips: Sequence[bool], size: int, cubic: bool
) -> Tensor:
    """Return the views of whole images, uint8 [3, h, w] each, mirrored where `flips` says so: uint8 [b, 3, size, size].

    It takes one kernel, and one copy of a table.
    """
    table = pack_views(images, views, flips)
    device = images[0].device
    table = (table.pin_memory() if device.type == "cuda" else table).to(device, non_blocking=True)
    resized: Tensor = torch.ops.karat_scale.resized_views(list(images), table, size, cubic)
    return resized


def model_input(
    images: Tensor, scale: Sequence[float], shift: Sequence[float], mix: MixParams, dtype: torch.dtype
) -> Tensor:
    """Return uint8 [b, 3, H, W] times `scale` plus `shift` of each channel, mixed, in `dtype`; by one kernel."""
    kind, box = MIXES.index(mix.kind), list(mix.box)
    made: Tensor = torch.ops.karat_scale.model_input(
        images.contiguous(), list(scale), list(shift), kind, mix.lam, box, dtype
    )
    return made


def _tables(images: Tensor, turn: Tensor) -> Tensor:
    from karat_scale.data.augmentation.device_triton import tables_kernel

    tables = images.new_empty(len(images), 3, 256)
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


def _views(images: list[Tensor], table: Tensor, size: int, cubic: bool) -> Tensor:
    from karat_scale.data.augmentation.device_triton import views_kernel

    result = table.new_empty(len(images), 3, size, size, dtype=torch.uint8)
    grid = (-(-size // VIEW_ROWS), -(-size // VIEW_WIDTH), len(images))
    with torch.cuda.device_of(table):
        views_kernel[grid](table, result, size, CUBIC=cubic, ROWS=VIEW_ROWS, WIDTH=VIEW_WIDTH, **OPTIONS)
    return result


def _input(
    images: Tensor, scale: list[float], shift: list[float], mix: int, lam: float, box: list[int], dtype: torch.dtype
) -> Tensor:
    from karat_scale.data.augmentation.device_triton import input_kernel

    result = torch.empty_like(images, dtype=dtype)
    batch, _, height, width = images.shape
    pixels = height * width
    with torch.cuda.device_of(images):
        input_kernel[(3 * batch, -(-pixels // INPUT_BLOCK))](
            *(images, result, pixels, width, *scale, *shift, lam, 1 - lam, *box), MIX=mix, BLOCK=INPUT_BLOCK, **OPTIONS
        )
    return result


_library = torch.library.Library("karat_scale", "FRAGMENT")
# For each operation its signature, the function that launches it, and its result on `meta` tensors.
for _signature, _launch, _on_meta in (
    (
        "augment_tables(Tensor images, Tensor turn) -> Tensor",
        _tables,
        lambda images, turn: images.new_empty(len(images), 3, 256),
    ),
    (
        "augment_turn(Tensor images, Tensor turn, Tensor tables, int[] fill, float[] noise, bool cubic) -> Tensor",
        _turn,
        lambda images, *_: torch.empty_like(images),
    ),
    (
        "resized_views(Tensor[] images, Tensor table, int size, bool cubic) -> Tensor",
        _views,
        lambda images, table, size, _: table.new_empty(len(images), 3, size, size, dtype=torch.uint8),
    ),
    (
        "model_input(Tensor images, float[] scale, float[] shift, int mix, float lam, int[] box, ScalarType dtype)"
        " -> Tensor",
        _input,
        lambda images, *arguments: torch.empty_like(images, dtype=arguments[-1]),
    ),
):
    _name = _signature.partition("(")[0]
    _library.define(_signature)
    _library.impl(_name, _launch, "CompositeExplicitAutograd")
    torch.library.register_fake(f"karat_scale::{_name}", _on_meta, lib=_library)
