"""The launches of the modular operator's forward and backward passes, complete except for their tensors.

Everything but the tensors follows from shapes, strides, dtypes and the device. It is worked out once for each such
signature and kept with the compiled kernel: Triton's own launch takes longer than these kernels do.
"""

import math
import os
from collections.abc import Sequence
from typing import Any

import triton
from triton.runtime import driver
from triton.runtime.errors import OutOfResources

from karat_scale.attention.kernels.triton_backward import grad_key_kernel, grad_query_kernel
from karat_scale.attention.kernels.triton_forward import forward_kernel, readout_kernel
from karat_scale.attention.kernels.triton_psi import prepare_kernel, reduce_kernel
from karat_scale.attention.kernels.triton_tiles import (
    LARGEST_HALF,
    LARGEST_UNROLLED,
    Products,
    Sizes,
    block,
    choose_tiles,
    coef_groups,
    compile_options,
    is_fused,
    padded_tokens,
    parts_of,
    readout_rows,
)

Strides = tuple[int, ...]
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_NO_STRIDES = (0, 0, 0, 0)


class Launch:
    """A kernel with its grid and all arguments but the tensors, which come first.

    Called with the tensors, and with whether the addresses of all of them are multiples of 16, for which there is a
    kernel of its own.
    """

    def __init__(
        self, kernel: Any, programs: int, numbers: tuple[Any, ...], constants: dict[str, Any], options: dict[str, Any]
    ) -> None:
        self.kernel, self.grid, self.numbers = kernel, (programs, 1, 1), numbers
        self.constants, self.options = constants, options
        names = kernel.arg_names
        ordered = [constants[name] for name in names if name in constants]
        assert names[len(names) - len(constants) :] == [name for name in names if name in constants]
        self._tail = (*numbers, *ordered)
        self._compiled: Any = None

    def __call__(self, *tensors: Any, aligned: bool = True) -> None:
        """Launches on the current device and stream."""
        if aligned and self._compiled is not None:
            self._compiled(*tensors, *self._tail)
            return
        try:
            compiled = self.kernel[self.grid](*tensors, *self.numbers, **self.constants, **self.options)
        except OutOfResources:  # without loads ahead of need it takes about half of the shared memory
            self.options = {**self.options, "num_stages": 1}
            compiled = self.kernel[self.grid](*tensors, *self.numbers, **self.constants, **self.options)
        if aligned and compiled is not None:
            self._compiled = compiled[self.grid]


class ForwardPlan:
    """The launches of the forward pass for one signature.

    `matrices` are the images and heads of U or, under a mask, of the mask.
    """

    def __init__(
        self,
        sizes: Sizes,
        products: Products,
        base: str,
        query: Strides,
        key: Strides,
        value: Strides,
        bias: Strides | None,
        mask: Strides | None,
        bits: Strides | None,
        output: Strides,
        matrices: Sequence[int],
    ) -> None:
        shared = _shared(sizes, products)
        paired = bias is not None or bits is not None
        padded, rank = padded_tokens(sizes.tokens), block(sizes.rank)
        prepare = {
            "GRID": sizes.grid,
            "BLOCK_GRID": triton.next_power_of_2(sizes.grid),
            "RANK": rank,
            "VALUE_WIDTH": sizes.value_width,
            "BLOCK_VALUE": block(sizes.value_width),
            "BLOCK_TOKENS": 64,
            "FAST": products.fast,
            "PRECISION": products.others,
        }
        self.prepare = Launch(
            prepare_kernel,
            sizes.heads * rank + math.prod(matrices),
            (sizes.heads, matrices[1], sizes.rank, sizes.tokens, padded, *value[:3], *(mask or _NO_STRIDES)),
            prepare,
            compile_options(4, 2),
        )
        tiles = choose_tiles("forward", sizes, products, architecture(), paired)
        forward = {
            **shared,
            "HALF": products.fast and sizes.grid <= LARGEST_HALF,
            "BASE": base,
            "VALUE_WIDTH": sizes.value_width,
            "BLOCK_VALUE": block(sizes.value_width),
            "BLOCK_QUERY": tiles.own,
            "BLOCK_KEY": tiles.walked,
        }
        self.forward = Launch(
            forward_kernel,
            triton.cdiv(sizes.tokens, tiles.own) * sizes.batch * sizes.heads,
            (
                sizes.heads,
                sizes.rank,
                sizes.tokens,
                padded,
                sizes.width**-0.5,
                *query[:3],
                *key[:3],
                *(bias or _NO_STRIDES),
                *(bits or _NO_STRIDES)[:2],
                *value[:3],
                *output[:3],
            ),
            forward,
            tiles.options,
        )


class BackwardPlan:
    """The launches of the backward pass for one signature, and how the batch is cut."""

    def __init__(
        self,
        sizes: Sizes,
        products: Products,
        base: str,
        query: Strides,
        key: Strides,
        value: Strides,
        bias: Strides | None,
        bits: Strides | None,
        grad_output: Strides,
        grad_query: Strides,
        grad_key: Strides,
        grad_value: Strides,
        bias_by_image: bool,
    ) -> None:
        shared = _shared(sizes, products)
        paired = bias is not None or bits is not None
        padded, rank = padded_tokens(sizes.tokens), block(sizes.rank)
        readout_images, self.readout_parts = parts_of(sizes.batch, sizes.heads)
        self.readout = Launch(
            readout_kernel,
            sizes.heads * self.readout_parts,
            (
                sizes.batch,
                readout_images,
                sizes.heads,
                sizes.rank,
                sizes.tokens,
                *value[:3],
                *(bits or _NO_STRIDES)[:2],
                *grad_output[:3],
                *grad_value[:3],
            ),
            {
                "RANK": rank,
                "VALUE_WIDTH": sizes.value_width,
                "BLOCK_VALUE": block(sizes.value_width),
                "BLOCK_ROWS": readout_rows(sizes, products, bits is not None),
                "FAST": products.fast,
                "PRECISION": products.others,
            },
            compile_options(4, 2 if bits is None else 1, maxnreg=255),
        )
        numbers = (sizes.heads, sizes.tokens, padded, sizes.width**-0.5)
        strides = (*query[:3], *key[:3], *(bias or _NO_STRIDES), *(bits or _NO_STRIDES)[:2])
        backward = {**shared, "UNROLL": sizes.grid <= LARGEST_UNROLLED, "BASE": base}
        tiles = choose_tiles("grad_query", sizes, products, architecture(), paired)
        self.grad_query = Launch(
            grad_query_kernel,
            triton.cdiv(sizes.tokens, tiles.own) * sizes.batch * sizes.heads,
            (*numbers, *strides, *grad_query[:3]),
            {**backward, "BLOCK_QUERY": tiles.own, "BLOCK_KEY": tiles.walked},
            tiles.options,
        )
        half = products.fast and sizes.grid <= LARGEST_HALF
        group, groups = coef_groups(sizes.grid)
        self.features = 2 * group * groups
        fused = is_fused(sizes, products) and not bias_by_image

        def grad_key_launch(
            kernel: str, with_key: bool, group: int, groups: int, most: int | None
        ) -> tuple[Launch, int]:
            tiles = choose_tiles(kernel, sizes, products, architecture(), paired)
            programs = triton.cdiv(sizes.tokens, tiles.own) * groups * sizes.heads
            images, parts = parts_of(sizes.batch, programs) if most is None else (most, sizes.batch // most)
            chosen = {"KEY": with_key, "GROUP": group, "GROUPS": groups, "HALF": half and groups == 1}
            own = {"BLOCK_KEY": tiles.own, "BLOCK_QUERY": tiles.walked}
            launch = Launch(
                grad_key_kernel,
                programs * parts,
                (sizes.batch, images, *numbers, *strides, *grad_key[:3]),
                {**backward, **chosen, **own},
                tiles.options,
            )
            return launch, parts

        one_image = 1 if bias_by_image else None
        self.grad_key, self.bias_parts = grad_key_launch(
            "grad_key" if fused else "grad_key_alone", True, group if fused else 0, 1, one_image
        )
        self.grad_coef: Launch | None = None
        self.coef_parts = self.bias_parts
        if not fused:
            self.grad_coef, self.coef_parts = grad_key_launch("grad_coef", False, group, groups, None)
        self.reduce = Launch(
            reduce_kernel,
            triton.cdiv(sizes.tokens, 64) * (2 * sizes.grid + 1) * sizes.heads,
            (self.coef_parts, self.readout_parts, sizes.heads, sizes.rank, sizes.tokens, padded),
            {"FEATURES": self.features, "GRID": sizes.grid, "RANK": rank, "BLOCK_ROWS": 64},
            compile_options(4, 2),
        )


def architecture() -> int:
    """The current device's compute capability, 90 for 9.0."""
    return 90 if _INTERPRETED else driver.active.get_current_target().arch


def _shared(sizes: Sizes, products: Products) -> dict[str, Any]:
    return {
        "GRID": sizes.grid,
        "RANK": block(sizes.rank),
        "WIDTH": sizes.width,
        "BLOCK_WIDTH": block(sizes.width),
        # A power of two scales 16-bit queries without a rounding.
        "SCALED_FIRST": sizes.width in (16, 64),
        "FAST": products.fast,
        "SCORES": products.scores,
        "PRECISION": products.others,
    }
