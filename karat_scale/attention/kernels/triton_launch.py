"""Runs forward and backward passes by the Triton kernels: finds the launches, allocates tensors, launches.

Tensors reach the kernels with contiguous rows, at addresses of known alignment, on the current device. O = psi(A) V has
separate kernels: one for a forward pass, two for a backward pass.

Everything in a launch except the tensors follows from shapes, strides, dtypes and the device. It is worked out once for
each such signature and kept with the compiled kernel: Triton's own launch takes longer than these kernels do.
"""

import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver
from triton.runtime.errors import OutOfResources

from karat_scale.attention.call import FourierCall
from karat_scale.attention.kernels.triton_backward import grad_key_kernel, grad_query_kernel
from karat_scale.attention.kernels.triton_forward import forward_kernel, readout_kernel
from karat_scale.attention.kernels.triton_psi import (
    prepare_kernel,
    psi_forward_kernel,
    psi_grad_key_kernel,
    psi_grad_query_kernel,
    reduce_kernel,
)
from karat_scale.attention.kernels.triton_tiles import (
    LARGEST_HALF,
    LARGEST_UNROLLED,
    Products,
    Sizes,
    block,
    choose_psi_tiles,
    choose_tiles,
    coef_groups,
    compile_options,
    is_fused,
    padded_tokens,
    parts_of,
    products,
    products_of,
    readout_rows,
)

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_NO_STRIDES = (0, 0, 0, 0)


class Launch:
    """A kernel with its grid and all arguments but the tensors, which come first.

    Call it with the tensors, and with `alignment_of` those that a caller gave: Triton compiles a kernel for each. Where
    all are our own allocations, it is always the same.
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
        self._compiled: dict[int, Any] = {}

    def __call__(self, *tensors: Any, alignment: int = 0) -> None:
        """Launches on the current device and stream."""
        known = self._compiled.get(alignment)
        if known is not None:
            known(*tensors, *self._tail)
            return
        try:
            compiled = self.kernel[self.grid](*tensors, *self.numbers, **self.constants, **self.options)
        except OutOfResources:  # without prefetching it needs about half of the shared memory
            self.options = {**self.options, "num_stages": 1}
            compiled = self.kernel[self.grid](*tensors, *self.numbers, **self.constants, **self.options)
        if compiled is not None:
            self._compiled[alignment] = compiled[self.grid]


class ForwardPlan:
    """The launches of the forward pass for one signature.

    `strides` are those of query, key, value, bias, mask, the mask's bits and output, None for an absent tensor.
    `matrices` are the numbers of images and heads of U or, under a mask, of the mask.
    """

    def __init__(
        self, sizes: Sizes, products: Products, base: str, strides: Sequence[Any], matrices: Sequence[int]
    ) -> None:
        query, key, value, bias, mask, bits, output = strides
        paired = bias is not None or bits is not None
        padded, rank = padded_tokens(sizes.tokens), block(sizes.rank)
        prepare = {
            "GRID": sizes.grid,
            "BLOCK_GRID": triton.next_power_of_2(sizes.grid),
            "RANK": rank,
            **_values(sizes),
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
            **_scores(sizes, products),
            **_values(sizes),
            "RANK": rank,
            "HALF": products.fast and sizes.grid <= LARGEST_HALF,
            "BASE": base,
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
    """The launches of the backward pass for one signature, and how the batch is split.

    `strides` are those of query, key, value, bias, a mask's bits and the gradients of output, query, key and value.
    """

    def __init__(
        self, sizes: Sizes, products: Products, base: str, strides: Sequence[Any], bias_by_image: bool
    ) -> None:
        query, key, value, bias, bits, grad_output, grad_query, grad_key, grad_value = strides
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
                **_values(sizes),
                "BLOCK_ROWS": readout_rows(sizes, products, bits is not None),
                "FAST": products.fast,
                "PRECISION": products.others,
            },
            compile_options(4, 2 if bits is None else 1, maxnreg=255),
        )
        numbers = (sizes.heads, sizes.tokens, padded, sizes.width**-0.5)
        steps = (*query[:3], *key[:3], *(bias or _NO_STRIDES), *(bits or _NO_STRIDES)[:2])
        backward = {"RANK": rank, "UNROLL": sizes.grid <= LARGEST_UNROLLED, "BASE": base, **_scores(sizes, products)}
        tiles = choose_tiles("grad_query", sizes, products, architecture(), paired)
        self.grad_query = Launch(
            grad_query_kernel,
            triton.cdiv(sizes.tokens, tiles.own) * sizes.batch * sizes.heads,
            (*numbers, *steps, *grad_query[:3]),
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
                (sizes.batch, images, *numbers, *steps, *grad_key[:3]),
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


def _values(sizes: Sizes) -> dict[str, Any]:
    """The constants of the kernels that read values."""
    return {"VALUE_WIDTH": sizes.value_width, "BLOCK_VALUE": block(sizes.value_width)}


def _scores(sizes: Sizes, products: Products) -> dict[str, Any]:
    """The constants of the kernels that compute scores."""
    return {
        "GRID": sizes.grid,
        "WIDTH": sizes.width,
        "BLOCK_WIDTH": block(sizes.width),
        # A power of two scales 16-bit queries without a rounding.
        "SCALED_FIRST": sizes.width in (16, 64),
        "FAST": products.fast,
        "SCORES": products.scores,
        "PRECISION": products.others,
    }


def rows_in(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in `dtype` with contiguous rows, copied only where it must be."""
    if tensor.dtype != dtype:
        tensor = tensor.to(dtype)
    return tensor if _has_rows(tensor) else tensor.contiguous()


def room_for_rows(grad: Tensor) -> Tensor:
    """Return the gradient if its rows are contiguous, else an empty tensor like it with contiguous rows."""
    return grad if _has_rows(grad) else torch.empty_like(grad, memory_format=torch.contiguous_format)


def _has_rows(tensor: Tensor) -> bool:
    """Return whether rows are contiguous, and near enough for the kernels' offsets of 32 bits."""
    return tensor.stride(-1) == 1 and tensor.shape[-2] * tensor.stride(-2) < 2**31


def room(grad: Tensor) -> Tensor:
    """Return the gradient if it is contiguous, else an empty contiguous tensor like it."""
    return grad if grad.is_contiguous() else torch.empty_like(grad, memory_format=torch.contiguous_format)


def alignment_of(*tensors: Tensor | None) -> int:
    """Return which tensors have addresses that are multiples of 16, as bits: Triton specialises kernels on that."""
    bits = 0
    for tensor in tensors:
        bits = 2 * bits + (tensor is None or tensor.data_ptr() & 15 == 0)
    return bits


def device_of(tensor: Tensor) -> Any:
    """A context in which the tensor's device is the current one."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


# Plans by everything that launches depend on; a model has a handful.
_forward_plans: dict[Any, ForwardPlan] = {}
_backward_plans: dict[Any, BackwardPlan] = {}


def forward(outputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], call: FourierCall) -> None:
    """Fills O, H, U or the mask's bits, the packed coefficients and their scale, which `triton_fourier` allocates."""
    output, hidden, reader, coef, coef_scale = outputs
    bias, mask, base = call[6:]
    dtype = hidden.dtype
    q, k, v = (rows_in(x, dtype) for x in call[:3])
    cos, sin, w = (x.contiguous() for x in call[3:6])
    added, keep = _spread(bias, q), _spread(mask, q)
    narrow, bits = _narrow_and_bits(reader, mask, q)
    strides = q.stride(), k.stride(), v.stride(), _stride(added), _stride(keep), _stride(bits)
    dtypes = cos.dtype, sin.dtype, w.dtype, None if bias is None else bias.dtype, output.dtype, dtype, coef.dtype
    signature = (q.shape, v.shape[3], cos.shape, strides, reader.shape[:2], dtypes, base, q.device)
    with device_of(q):
        plan = _forward_plans.get(signature)
        if plan is None:
            sizes, chosen = _sizes(q, v, cos), products(dtype, coef.dtype == torch.float16)
            every = *strides, output.stride()
            plan = _forward_plans[signature] = ForwardPlan(sizes, chosen, base, every, reader.shape[:2])
        alignment = alignment_of(q, k, v, cos, sin, w, added, keep)
        plan.prepare(cos, sin, w, v, keep, coef, coef_scale, narrow, bits, alignment=alignment)
        plan.forward(q, k, added, bits, coef, coef_scale, narrow, w, v, output, hidden, alignment=alignment)


def backward(
    grad_output: Tensor, kept: Sequence[Tensor], call: FourierCall, bias_is_learned: bool
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the call's tensors, laid out as `torch.empty_like` does; the last is the bias's or None.

    `kept` is H, U or the mask's bits, the packed coefficients and their scale.
    """
    hidden, reader, coef, coef_scale = kept
    given, cos_coef, (bias, mask, base) = call[:6], call.cos_coef, call[6:]
    dtype = hidden.dtype
    q, k, v = (rows_in(x, dtype) for x in call[:3])
    upstream, w = rows_in(grad_output, grad_output.dtype), call.proj.contiguous()
    added = _spread(bias, q)
    narrow, bits = _narrow_and_bits(reader, mask, q)
    grads = [torch.empty_like(x) for x in given]
    rows = [room_for_rows(x) for x in grads[:3]]
    parameters = [room(x) for x in grads[3:]]
    grad_query, grad_key, grad_value = rows
    bias_by_image = bias_is_learned and bias is not None and bias.dim() == 4 and bias.shape[0] > 1
    strides = (
        q.stride(),
        k.stride(),
        v.stride(),
        _stride(added),
        _stride(bits),
        upstream.stride(),
        grad_query.stride(),
        grad_key.stride(),
        grad_value.stride(),
    )
    dtypes = (*(x.dtype for x in given), upstream.dtype, dtype, coef.dtype, None if bias is None else bias.dtype)
    signature = (q.shape, v.shape[3], cos_coef.shape, strides, dtypes, base, bias_is_learned, bias_by_image, q.device)
    with device_of(q):
        plan = _backward_plans.get(signature)
        if plan is None:
            sizes, chosen = _sizes(q, v, cos_coef), products(dtype, coef.dtype == torch.float16)
            plan = _backward_plans[signature] = BackwardPlan(sizes, chosen, base, strides, bias_by_image)
        alignment = alignment_of(q, k, v, w, added, upstream)
        batch, heads, tokens, _ = q.shape
        padded_rank = coef.shape[3]
        wide = torch.float32
        grad_hidden = hidden.new_empty(hidden.shape, dtype=coef.dtype)
        grad_scale = hidden.new_empty((batch, heads), dtype=wide)
        grad_base = None if base == "zero" else hidden.new_empty((batch, heads, tokens), dtype=wide)
        proj_parts = hidden.new_empty((plan.readout_parts, heads, tokens, padded_rank), dtype=wide)
        shape = (plan.coef_parts, heads, plan.features, padded_tokens(tokens), padded_rank)
        coef_parts = hidden.new_empty(shape, dtype=wide)
        bias_parts = hidden.new_empty((plan.bias_parts, heads, tokens, tokens), dtype=wide) if bias_is_learned else None
        plan.readout(
            hidden,
            narrow,
            w,
            v,
            bits,
            upstream,
            grad_value,
            grad_hidden,
            grad_scale,
            grad_base,
            proj_parts,
            alignment=alignment,
        )
        shared = (q, k, added, bits, coef, coef_scale, grad_hidden, grad_scale, grad_base)
        plan.grad_query(*shared, grad_query, alignment=alignment)
        plan.grad_key(*shared, grad_key, bias_parts, coef_parts, alignment=alignment)
        if plan.grad_coef is not None:
            plan.grad_coef(*shared, grad_key, None, coef_parts, alignment=alignment)
        plan.reduce(coef_parts, proj_parts, *parameters)
    for grad, written in zip(grads, (*rows, *parameters), strict=True):
        if written is not grad:
            grad.copy_(written)
    if bias_parts is None or bias is None:
        return *grads, None
    return *grads, torch.empty_like(bias).copy_(bias_parts.sum_to_size(bias.shape))


def _narrow_and_bits(reader: Tensor, mask: Tensor | None, query: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """U, or the bits of a mask as [B, h, 2, N / 32, N]."""
    if mask is None:
        return reader, None
    return None, reader.expand(*query.shape[:2], -1, -1, -1)


def _spread(pairs: Tensor | None, query: Tensor) -> Tensor | None:
    """A bias or a mask as [B, h, N, N], with rows near enough for the kernels' offsets of 32 bits."""
    if pairs is None:
        return None
    spread = pairs.expand(*query.shape[:3], query.shape[2])
    return spread if max(spread.stride()[2:]) * query.shape[2] < 2**31 else spread.contiguous()


def _stride(pairs: Tensor | None) -> tuple[int, ...] | None:
    return None if pairs is None else pairs.stride()


def _sizes(query: Tensor, value: Tensor, cos_coef: Tensor) -> Sizes:
    batch, heads, tokens, width = query.shape
    return Sizes(batch, heads, tokens, width, value.shape[3], cos_coef.shape[1], cos_coef.shape[3])


PSI_KERNELS = {"forward": psi_forward_kernel, "grad_query": psi_grad_query_kernel, "grad_key": psi_grad_key_kernel}
_psi_launches: dict[Any, Launch] = {}


def psi_forward(output: Tensor, query: Tensor, key: Tensor, value: Tensor, psi: Tensor) -> None:
    """Fill O [B, h, N, dv] of query, key and value and of psi, float32 [h, 2 G + 1]."""
    products = products_of(query.dtype, key.dtype, value.dtype)
    heads = [rows_in(x, products.dtype) for x in (query, key, value)]
    with device_of(query):
        launch = _psi_launch("forward", heads, [output], psi, products)
        launch(*heads, psi, output, alignment=alignment_of(*heads, psi, output))


def psi_backward(grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, psi: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of query, key, value and psi, laid out as `torch.empty_like` does."""
    products = products_of(query.dtype, key.dtype, value.dtype)
    heads = [rows_in(x, products.dtype) for x in (query, key, value)]
    upstream = rows_in(grad_output, products.dtype)
    grads = [torch.empty_like(x) for x in (query, key, value)]
    grad_query, grad_key, grad_value = rows = [room_for_rows(x) for x in grads]
    with device_of(query):
        alignment = alignment_of(*heads, psi, upstream)
        launch = _psi_launch("grad_query", heads, [upstream, grad_query], psi, products)
        batch, count = query.shape[:2]
        partial = psi.new_empty((batch, count, launch.grid[0] // (batch * count), psi.shape[1]))
        launch(*heads, psi, upstream, grad_query, partial, alignment=alignment)
        launch = _psi_launch("grad_key", heads, [upstream, grad_key, grad_value], psi, products)
        launch(*heads, psi, upstream, grad_key, grad_value, alignment=alignment)
    for grad, written in zip(grads, rows, strict=True):
        if written is not grad:
            grad.copy_(written)
    return *grads, partial.sum((0, 2))


def _psi_launch(kernel: str, heads: list[Tensor], others: list[Tensor], psi: Tensor, products: Products) -> Launch:
    """The launch of a kernel, a program for each tile; `others` are the other tensors of rows that the kernel takes."""
    tensors = (*heads, *others)
    kinds = tuple((x.stride(), x.dtype) for x in tensors)
    signature = (kernel, heads[0].shape, heads[2].shape[3], psi.shape, kinds, products, heads[0].device)
    found = _psi_launches.get(signature)
    if found is None:
        batch, count, tokens, width = heads[0].shape
        sizes = Sizes(batch, count, tokens, width, heads[2].shape[3], 1, psi.shape[1] // 2)
        cut = choose_psi_tiles(kernel, sizes, products)
        programs = triton.cdiv(tokens, cut.own) * batch * count
        numbers = (count, tokens, width**-0.5, *(step for x in tensors for step in x.stride()[:3]))
        own = {"BLOCK_OWN": cut.own, "BLOCK_WALKED": cut.walked}
        constants = {**_scores(sizes, products), **_values(sizes), **own}
        found = _psi_launches[signature] = Launch(PSI_KERNELS[kernel], programs, numbers, constants, cut.options)
    return found
