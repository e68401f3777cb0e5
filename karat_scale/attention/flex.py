"""KArAt attention by PyTorch's FlexAttention, whose kernels share nothing with those of the other implementations.

FlexAttention changes each score by a function and applies softmax. A positive function g needs no softmax: with log g
as the new score, softmax gives g / l, where l is the sum of g over the keys, and FlexAttention returns log l as well.
A shift c makes a bounded function f positive, so with O' = softmax(log(f(A) + c)) C,

    sum_q f(A[k, q]) C[q] = l[k] O'[k] - c sum_q C[q].

For H, the 2 G harmonics are a batch of such calls. For the content form, f is psi and the C[q] are the values. The
backward pass is written out in plain PyTorch: for H it is the one of `streaming`, for psi it is in this file.

On a GPU, torch.compile makes one kernel of it. On a CPU, PyTorch has only a forward pass that holds every f(A).
"""

import functools
import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from karat_scale.attention import reference, streaming
from karat_scale.attention.call import (
    FourierCall,
    compute_dtype,
    empty_output,
    full_precision,
    register_function,
)
from karat_scale.attention.routes import plan_tiles, workspace_budget

# The shift c of a cosine or sine. Nearer to 1 the logarithm is steeper; farther off, more digits cancel.
SHIFT = 1.5
# The least width of heads that FlexAttention's kernels for GPUs take.
LEAST_WIDTH = 16
# A trial that is worse than this in relative L2 error is wrong, not rounded: TF32 has 3 digits.
WRONG = 0.02


def refusal(call: FourierCall) -> str | None:
    """Return why `attend` cannot take the call, or None."""
    device = call.query.device
    if device.type == "cpu":
        return _base_or_mask(call)
    return (call_refusal(call) if device.type == "cuda" else None) or device_refusal(device, _width(call))


def psi_refusal(call: FourierCall) -> str | None:
    """Return why `attend_psi` cannot take the content form of a call that `attend` takes, or None."""
    return problem(_width(call), psi=True) if call.query.device.type == "cuda" else None


def _width(call: FourierCall) -> int:
    """The width of the heads that FlexAttention's kernels are to take."""
    return max(call.query.shape[-1], call.value.shape[-1])


def device_refusal(device: torch.device, width: int) -> str | None:
    """Return why FlexAttention does not run on a device with heads of a width, or None."""
    if device.type not in ("cpu", "cuda"):
        return f"it needs tensors on a GPU or a CPU and these are on {device.type}"
    return problem(width) if device.type == "cuda" else None


def call_refusal(call: FourierCall) -> str | None:
    """Return why `attend` cannot take the call on a GPU that runs FlexAttention, or None."""
    if any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in call):
        return "it computes in float32 on a GPU and an argument is float64"
    return width_refusal(min(call.query.shape[-1], call.value.shape[-1])) or _base_or_mask(call)


def width_refusal(width: int) -> str | None:
    """Return why FlexAttention's kernels for GPUs cannot take heads of a width, or None."""
    if width < LEAST_WIDTH:
        return f"on a GPU its heads are at least {LEAST_WIDTH} wide and these are {width}"
    return None


def _base_or_mask(call: FourierCall) -> str | None:
    if call.base != "zero":
        return f"base = {call.base!r}; it has no base activation"
    return None if call.mask is None else "it has no mask"


def problem(width: int, psi: bool = False) -> str | None:
    """Return why FlexAttention does not run on this GPU with heads of a width, or None.

    Each process finds out once, by a small call. `psi`: as `attend_psi`, whose kernel needs more shared memory.
    """
    return _problem(width, psi)


# The same as torch.compiler.assume_constant_result, without the second that importing the compiler takes.
problem._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
@torch.no_grad()
def _problem(width: int, psi: bool) -> str | None:
    generator = torch.Generator().manual_seed(0)
    tokens = 160  # for fewer than 128, PyTorch has another kernel
    shapes: list[tuple[int, ...]] = [(2, 2, tokens, width)] * 3
    shapes += [(2, 5)] if psi else [*[(2, 4, tokens, 2)] * 2, (2, tokens, 4)]
    try:
        here = [torch.randn(shape, generator=generator) for shape in shapes]
        tensors = [tensor.cuda() for tensor in here]
        if psi:
            output, expected = attend_psi(*tensors), attend_psi(*here).cuda()
        else:
            call = FourierCall._make((*tensors, None, None, "zero"))
            output, expected = attend(call), reference.attend(call)
    except Exception as error:  # of any kind: from the compiler, from what it calls, or from the driver
        return f"FlexAttention does not run on this GPU: {str(error).strip().partition(chr(10))[0]}"
    distance = float((output - expected).norm() / expected.norm())
    return None if distance < WRONG else f"FlexAttention is wrong by {distance:.1g} on this GPU"


def attend(call: FourierCall) -> Tensor:
    """O [B, h, N, dv] in the value's dtype; differentiable once. `refusal` must have returned None.

    Scores, features and sums are float32 or, on a CPU, float64 where an argument is.
    """
    return streaming.attend(call, torch.ops.karat_scale.flex_forward)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """O [B, h, N, dv] and H [h, B, N, r]; the arguments are those of `streaming_forward`."""
    query, key, value, coef, proj, bias, *_ = arguments
    output, hidden = streaming.fake_forward(*arguments)
    (batch, heads, tokens, _), grid, dtype = query.shape, coef.shape[1] // 2, coef.dtype
    if batch == 0:
        return output, hidden
    pairs = None if bias is None else bias.to(dtype).expand(batch, heads, tokens, tokens)

    def log_feature(score: Tensor, feature: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        if pairs is not None:
            score = score + pairs[head // heads, head % heads, row, column]
        angle = score * (feature % grid + 1)
        return torch.log(torch.where(feature < grid, torch.cos(angle), torch.sin(angle)) + SHIFT)

    with full_precision(query.device):
        # The features are the batch of the call: all of them read the same queries and keys.
        q, k = (x.to(dtype).flatten(0, 1).expand(2 * grid, -1, -1, -1) for x in (query, key))
        columns = coef.permute(1, 0, 3, 2)
        read, total = _attend_by(log_feature, q, k, columns.repeat(1, batch, 1, 1))
        read = (read * total).sum(0).unflatten(0, (batch, heads)) - SHIFT * columns.sum((0, 2)).unsqueeze(1)
        hidden.copy_(read.transpose(0, 1))
        output.copy_(read @ (proj.mT @ value.to(dtype)))
    return output, hidden


@torch.no_grad()
def _attend_by(log: Callable[..., Tensor], *heads: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(log(A)) V of query, key and value, and the sum of exp(log(A)) over the keys [..., N, 1]."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    given, on_cpu = [x.detach() for x in heads], heads[0].device.type == "cpu"
    with _with_vmap(), torch.compiler.set_stance("force_eager" if on_cpu else "default"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        attend: Any = flex_attention if on_cpu else _compiled()
        # All functions, shapes and precisions are signatures of one compiled function; the default limit is 8.
        many = nullcontext() if on_cpu else torch._dynamo.config.patch(recompile_limit=256)
        with many:
            read, kept = attend(*given, log, return_aux=AuxRequest(lse=True))
    return read, kept.lse.to(read.dtype).exp().unsqueeze(-1)


def _with_vmap() -> AbstractContextManager[None]:
    """Let FlexAttention map its function over scores, which an operation in a compiled graph may not do by itself."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for name in ("FuncTorchBatched", "FuncTorchDynamicLayerFrontMode", "FuncTorchDynamicLayerBackMode"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, name))
    guard: AbstractContextManager[None] = torch._C._ForceDispatchKeyGuard(
        torch._C._dispatch_tls_local_include_set(), excluded
    )
    return guard


@functools.cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, fullgraph=True)


_library = torch.library.Library("karat_scale", "FRAGMENT")
_library.define(f"flex_forward({streaming.INPUTS}) -> (Tensor, Tensor)")
_library.impl("flex_forward", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("karat_scale::flex_forward", streaming.fake_forward, lib=_library)
torch.library.register_autograd(
    "karat_scale::flex_forward", streaming.differentiate, setup_context=streaming.setup_context, lib=_library
)


def attend_psi(query: Tensor, key: Tensor, value: Tensor, psi: Tensor) -> Tensor:
    """O [B, h, N, dv] = psi(A) V, A = Q K^T / sqrt(d), in the value's dtype; differentiable once.

    `refusal` must have returned None for a call with these tensors.

    Args:
        psi: [h, 2 G + 1], c, a_1 to a_G and b_1 to b_G of psi(x) = c + sum_m a_m cos(m x) + b_m sin(m x).
    """
    psi = psi.to(compute_dtype(query, key, value, psi))
    output: Tensor = torch.ops.karat_scale.flex_psi_forward(query, key, value, psi)
    return output


def _psi_forward(query: Tensor, key: Tensor, value: Tensor, psi: Tensor) -> Tensor:
    output, grid = empty_output(query, value), psi.shape[1] // 2
    if query.shape[0] == 0:
        return output
    # psi + shift is at least a fifth of its largest swing: far enough from 0.
    swing = psi[:, 1:].abs().sum(1).clamp(min=torch.finfo(psi.dtype).tiny)
    shift = 1.2 * swing - psi[:, 0]
    # No index may hold G: a compiled function that has seen two values of it indexes by a symbol, which fails.
    constant, of_cos, of_sin = psi[:, 0] + shift, psi[:, 1 : grid + 1], psi[:, grid + 1 :]

    def log_psi(score: Tensor, item: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        positive = constant[head]
        for order in range(1, grid + 1):
            cos, sin = torch.cos(order * score), torch.sin(order * score)
            positive = positive + of_cos[head, order - 1] * cos + of_sin[head, order - 1] * sin
        return torch.log(positive)

    with full_precision(query.device):
        q, k, v = (x.to(psi.dtype) for x in (query, key, value))
        read, total = _attend_by(log_psi, q, k, v)
        output.copy_(read * total - shift[:, None, None] * v.sum(2, keepdim=True))
    return output


def _psi_backward(grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, psi: Tensor) -> tuple[Tensor, ...]:
    grid, grad_psi = psi.shape[1] // 2, torch.zeros_like(psi)

    def function(head: int, scores: Tensor, by_entry: Tensor) -> tuple[Tensor, Tensor]:
        entries, slope = psi[head, 0].expand_as(scores), torch.zeros_like(scores)
        grad_psi[head, 0] += by_entry.sum()
        for order in range(1, grid + 1):
            cos, sin = torch.cos(order * scores), torch.sin(order * scores)
            a, b = psi[head, order], psi[head, grid + order]
            entries = entries + a * cos + b * sin
            slope += order * (b * cos - a * sin)
            grad_psi[head, order] += (by_entry * cos).sum()
            grad_psi[head, grid + order] += (by_entry * sin).sum()
        return entries, slope

    return *_pull_back(grad_output, query, key, value, psi.dtype, function), grad_psi


def _pull_back(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dtype: torch.dtype,
    function: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, ...]:
    """The gradients of query, key and value of O = f(A) V, a tile of scores at a time.

    `function` takes a head, its scores and the gradient of f(A) there; it returns f(A) and its derivative.
    """
    batch, heads, tokens, width = query.shape
    scale = width**-0.5
    grads = [torch.zeros_like(x, dtype=dtype) for x in (query, key, value)]
    tiling = plan_tiles(max(batch, 1), tokens, 6 * tokens, workspace_budget(query.device))
    with full_precision(query.device):
        for head in range(heads):
            given = [x[:, head].to(dtype) for x in (query, key, value, grad_output)]
            by_query, by_key, by_value = (x[:, head] for x in grads)
            for items, rows in tiling.tiles():
                q, k, v, upstream = given[0][items, rows], given[1][items], given[2][items], given[3][items, rows]
                scores, by_entry = scale * q @ k.mT, upstream @ v.mT
                entries, slope = function(head, scores, by_entry)
                by_value[items] += entries.mT @ upstream
                by_score = scale * slope * by_entry
                by_query[items, rows] += by_score @ k
                by_key[items] += by_score.mT @ q
    return tuple(grad.to(x.dtype) for grad, x in zip(grads, (query, key, value), strict=True))


register_function(_library, "flex_psi", _psi_forward, _psi_backward, "Tensor psi")


class Pointwise(NamedTuple):
    """A fixed function f of a score x. `size` is N, the tokens for which the heads were built.

    `log` takes x, size and a sign s and returns the logarithm of the positive part of s f(x). `slope` takes x and size
    and returns f and its derivative. `negative` says whether f has a negative part.
    """

    log: Callable[[Tensor, int, int], Tensor]
    slope: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    negative: bool = False


def _sigmoid(score: Tensor, size: int) -> tuple[Tensor, Tensor]:
    value = (score - math.log(size)).sigmoid()
    return value, value * (1 - value)


POINTWISE = {
    "sigmoid": Pointwise(lambda x, size, _: torch.log(torch.sigmoid(x - math.log(size))), _sigmoid),
    "polynomial": Pointwise(
        lambda x, size, sign: 3 * torch.log(torch.relu(sign * x)) - math.log(size) / 2,
        lambda x, size: (x**3 / size**0.5, 3 * x**2 / size**0.5),
        negative=True,
    ),
}
"""The functions by `attention.kind`; the formulas are those of `PointwiseHeads`."""


def attend_pointwise(kind: str, size: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """O [B, h, N, dv] = f(A) V with f of `POINTWISE`, in the value's dtype; differentiable once.

    On a GPU, `width_refusal` and `device_refusal` must have returned None.
    """
    output: Tensor = torch.ops.karat_scale.flex_pointwise_forward(query, key, value, kind, size)
    return output


def _pointwise_forward(query: Tensor, key: Tensor, value: Tensor, kind: str, size: int) -> Tensor:
    output, function = empty_output(query, value), POINTWISE[kind]
    if query.shape[0] == 0:
        return output
    with full_precision(query.device):
        heads = [x.to(compute_dtype(query, key, value)) for x in (query, key, value)]
        whole = torch.zeros_like(heads[2])
        for sign in (1, -1) if function.negative else (1,):

            def log(score: Tensor, item: Tensor, head: Tensor, row: Tensor, column: Tensor, sign: int = sign) -> Tensor:
                return function.log(score, size, sign)

            read, total = _attend_by(log, *heads)
            whole += sign * torch.where(total == 0, 0, read * total)
        output.copy_(whole)
    return output


def _pointwise_backward(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, kind: str, size: int
) -> tuple[Tensor, ...]:
    dtype = compute_dtype(query, key, value)
    return _pull_back(
        grad_output, query, key, value, dtype, lambda head, scores, _: POINTWISE[kind].slope(scores, size)
    )


register_function(_library, "flex_pointwise", _pointwise_forward, _pointwise_backward, "str kind, int size")
