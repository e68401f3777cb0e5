"""Fourier-KArAt attention as functions of tensors: checks the call and chooses an implementation."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from karat_scale.attention import flex, reference, streaming
from karat_scale.attention.call import FourierCall, check_call, check_choice, output_dtype
from karat_scale.attention.kernels import cpu, triton_fourier

IMPLEMENTATIONS: dict[str, Callable[[FourierCall], Tensor]] = {
    "reference": reference.attend,
    "streaming": streaming.attend,
    "cpu": cpu.attend,
    "triton": triton_fourier.attend,
    "flex": flex.attend,
}
# For each implementation: why it cannot take a call, or None. The others take any call.
REFUSALS: dict[str, Callable[[FourierCall], str | None]] = {
    "cpu": cpu.refusal,
    "triton": triton_fourier.refusal,
    "flex": flex.refusal,
}
# The same for a GPU that runs Triton's kernels, asked on any machine.
REFUSALS_ON_A_GPU = {
    "cpu": lambda _: "the tensors are on a GPU",
    "triton": triton_fourier.call_refusal,
    "flex": flex.call_refusal,
}
# The implementations that "auto" tries, the fastest first. On a CPU, FlexAttention holds all features at once.
AUTOMATIC = ("triton", "cpu", "streaming")
AUTOMATIC_ON_A_GPU = ("triton", "flex", "streaming")
# The kernels that are made for a kind of device.
KERNELS_OF = {"cuda": "triton", "cpu": "cpu"}


def fourier_karat_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos_coef: Tensor,
    sin_coef: Tensor,
    proj: Tensor,
    *,
    base: str = "zero",
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Return attention with the learnable modular operator of arXiv 2503.10632, section 4, instead of softmax.

    A = Q K^T / sqrt(d) + bias;  H[k, p] = sum_q phi_pq(A[k, q]) for p = 1..r;  S = H W^T;  O = S V, with
    phi_pq(x) = b(x) + sum_{m=1..G} a_pqm cos(m x) + b_pqm sin(m x).

    Args:
        query, key, value: [B, h, N, d], float16, bfloat16, float32 or float64, with any strides.
        cos_coef, sin_coef: a_pqm and b_pqm, [h, r, N, G].
        proj: W, [h, N, r].
        base: b(x): "zero", "identity", "silu" or "gelu".
        bias: added to the scores; broadcastable to [B, h, N, N].
        mask: boolean, broadcastable to [B, h, N, N], true where a query-key pair takes part (as in
            `scaled_dot_product_attention`). Another pair (k, q) adds nothing to H[k, :] and has S[k, q] = 0.
        implementation: "reference" (materialises everything), "streaming", "cpu" (a kernel compiled at first use),
            "triton" (NVIDIA GPUs), "flex" (PyTorch's FlexAttention), or "auto", which takes the fastest that can run.

    Returns:
        O, [B, h, N, d], in the value's dtype or, under autocast, in autocast's. Scores, features and sums are
        float32 (float64 where an input is), under autocast too. All tensors but the mask have gradients, once.

    Raises:
        ValueError: a shape, dtype, device or name does not fit, or the implementation asked for by name cannot take
            the call; the message says what was expected.
    """
    return attend_call(FourierCall(query, key, value, cos_coef, sin_coef, proj, bias, mask, base), implementation)


def attend_call(call: FourierCall, implementation: str) -> Tensor:
    """Return O of a call. See `fourier_karat_attention`."""
    output = _check_and_choose(implementation, call)(call)
    dtype = output_dtype(call.value)
    return output if output.dtype == dtype else output.to(dtype)


def fourier_karat_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    cos_coef: Tensor,
    sin_coef: Tensor,
    proj: Tensor,
    *,
    base: str = "zero",
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Return the learned attention S, for analysis: `fourier_karat_attention` with the same arguments is S @ value.

    `value` is not used and may be None. The result is [B, h, N, N], in the query's dtype or, under autocast, in
    autocast's. Rows need not sum to one, and entries may be negative. An implementation that can attend but cannot
    give S leaves it to "auto". Raises ValueError like `fourier_karat_attention`.
    """
    value = query if value is None else value
    return call_scores(FourierCall(query, key, value, cos_coef, sin_coef, proj, bias, mask, base), implementation)


def call_scores(call: FourierCall, implementation: str) -> Tensor:
    """Return S of a call. See `fourier_karat_scores`."""
    check_call(call)
    _choose(implementation, call._replace(value=call.query))  # refuses what attention refuses
    call = call._replace(value=identity(call.query))
    # A kernel may take no values that are wider than the queries.
    able = implementation if refusal(implementation, call) is None else "auto"
    return _choose(able, call)(call).to(output_dtype(call.query))


def identity(query: Tensor) -> Tensor:
    """I [B, h, N, N] as values: S = S I, by whichever implementation attends."""
    batch, heads, tokens, _ = query.shape
    return torch.eye(tokens, dtype=query.dtype, device=query.device).expand(batch, heads, -1, -1)


def content_kernel(call: FourierCall, implementation: str) -> str | None:
    """Return what computes psi of the content form of a call: "cpu", "triton", "flex", or None where none does.

    "cpu" computes psi and units together. The others compute only psi(A) V. None supports a bias or a mask.

    Args:
        implementation: a name, or "auto", as in `fourier_karat_attention`.
    """
    attend = _check_and_choose(implementation, call)
    if call.bias is not None or call.mask is not None:
        return None
    name = next((name for name in ("cpu", "triton", "flex") if attend is IMPLEMENTATIONS[name]), None)
    return None if name == "flex" and flex.psi_refusal(call) else name


# The implementations chosen so far, by what calls look like, on devices where checking takes longer than launching.
_chosen: dict[tuple[Any, ...], Callable[[FourierCall], Tensor]] = {}
_REMEMBERED_DEVICES = ("cuda",)
_MOST_REMEMBERED = 4096


def _check_and_choose(implementation: str, call: FourierCall) -> Callable[[FourierCall], Tensor]:
    """Return the implementation of a call. Equal shapes, dtypes and names are checked only once."""
    # Shapes of fake tensors may be symbols, which cannot be looked up.
    if torch.compiler.is_compiling() or type(call.query) is not Tensor:
        return _check_and_choose_anew(implementation, call)
    if call.query.device.type not in _REMEMBERED_DEVICES:
        return _check_and_choose_anew(implementation, call)
    # Refusals may be replaced, to plan for another machine.
    signature = (implementation, _refusals["triton"], *map(_describe, call))
    attend = _chosen.get(signature)
    if attend is None:
        attend = _check_and_choose_anew(implementation, call)
        if len(_chosen) >= _MOST_REMEMBERED:
            _chosen.clear()
        _chosen[signature] = attend
    return attend


def _describe(argument: Tensor | str | None) -> object:
    return (argument.shape, argument.dtype, argument.device) if isinstance(argument, Tensor) else argument


def _check_and_choose_anew(implementation: str, call: FourierCall) -> Callable[[FourierCall], Tensor]:
    check_call(call)
    return _choose(implementation, call)


def _choose(implementation: str, call: FourierCall) -> Callable[[FourierCall], Tensor]:
    check_choice("implementation", implementation, ("auto", *IMPLEMENTATIONS))
    if implementation == "auto":
        implementation = automatic(call)
    elif (why := refusal(implementation, call)) is not None:
        raise ValueError(f"implementation = {implementation!r} cannot take this call: {why}")
    return IMPLEMENTATIONS[implementation]


def automatic(call: FourierCall) -> str:
    """Return the implementation that "auto" chooses for a call."""
    on_gpu = call.query.device.type == "cuda" or _refusals is REFUSALS_ON_A_GPU
    return next(name for name in (AUTOMATIC_ON_A_GPU if on_gpu else AUTOMATIC) if refusal(name, call) is None)


def refusal(implementation: str, call: FourierCall) -> str | None:
    """Return why an implementation, or "auto", cannot run a call, or None. Only shapes, dtypes and device matter."""
    return _refusals[implementation](call) if implementation in _refusals else None


_refusals = REFUSALS


@contextmanager
def choosing_as_on_a_gpu() -> Iterator[None]:
    """Choose implementations as on a GPU with Triton's kernels; their fake kernels can be traced on any machine."""
    global _refusals  # not a context variable, which torch.compile cannot trace
    before, _refusals = _refusals, REFUSALS_ON_A_GPU
    try:
        yield
    finally:
        _refusals = before
