"""Values and every gradient of the kernels against the float64 reference and a plain formula.

The calls differ in dtype, shapes, strides, size of the scores, and options. The formula is KArAt's equations in plain
PyTorch, with autograd's derivatives: an oracle that shares no line with the package. Some calls check FlexAttention,
PyTorch's own way to compute the operator.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as NotInTimeError
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from karat_scale.attention import FourierKaratOperator, fourier_karat_attention
from karat_scale.attention.kernels.triton_tiles import tf32_is_allowed
from karat_scale.attention.variants import ContentOperator
from karat_scale.commands.bench.gpu.worker import CompilerThreads, Task, is_fatal

# A part of the error with which `fourier_karat_attention` refuses a call.
REFUSAL = "cannot take this call: "

FP32, TF32, BF16, FP16 = "fp32", "tf32", "bf16", "fp16"
TORCH_DTYPES = {FP32: torch.float32, TF32: torch.float32, BF16: torch.bfloat16, FP16: torch.float16}
BASE_FUNCTIONS = {"identity": lambda x: x, "silu": functional.silu, "gelu": functional.gelu}


@dataclass(frozen=True)
class Call:
    """One call of `fourier_karat_attention`, or with `content` of the content form.

    Args:
        dtype: the dtype of query, key and value; "tf32" is float32 with torch's switch on.
        topic: the reason why this call is in the list.
        score_std: standard deviation of the scores.
        layout: a key of LAYOUTS.
        compiled: whether torch.compile compiles it.
        flex: whether FlexAttention computes it, in place of the task's implementation.
    """

    dtype: str
    topic: str = "ViT"
    grid: int = 3
    width: int = 64
    tokens: int = 197
    rank: int = 12
    batch: int = 2
    heads: int = 2
    score_std: float = 1.0
    layout: str = "contiguous"
    base: str = "zero"
    bias: bool = False
    mask: bool = False
    content: bool = False
    compiled: bool = False
    flex: bool = False

    def __str__(self) -> str:
        shape = f"B {self.batch}, h {self.heads}, N {self.tokens}, d {self.width}, r {self.rank}, G {self.grid}"
        more = [self.layout] if self.layout != "contiguous" else []
        more += [f"scores of std {self.score_std:g}"] if self.score_std != 1 else []
        more += [f"base {self.base}"] if self.base != "zero" else []
        more += [name for name in ("bias", "mask", "content", "compiled", "flex") if getattr(self, name)]
        return f"{self.dtype}: {', '.join([shape, *more])}"

    def tolerance(self, largest_score: float) -> float:
        """Return the relative L2 error allowed for the output and for each gradient.

        TF32 keeps 10 bits of each factor. Cutting the rest off in every product of the operator, in float64, gave 3e-3,
        4e-3 and 1.1e-2 at G = 1, 3 and 16, and 0.85e-2, 2.1e-2 and 1e-1 with scores of std 10.
        """
        if self.dtype == FP32:
            # The gradient of psi is a sum over all pairs, which cancel.
            limit = max(1e-5 if self.content else 2e-6, 5e-8 * self.grid * largest_score)
            # FlexAttention has the backward pass of `streaming`: at G = 16 and d = 160 a CPU's error is 0.99 of that.
            return 2 * limit if self.flex else limit
        if self.dtype == TF32:
            return 4e-3 + 1e-3 * self.grid * self.score_std
        return 5e-3


class Inputs(NamedTuple):
    """The arguments of a call: tensors that need gradients, by name; the mask; and the gradient of the output."""

    tensors: dict[str, Tensor]
    mask: Tensor | None
    grad_output: Tensor


def core_calls(dtypes: tuple[str, ...]) -> Iterator[Call]:
    """Yield the calls that training makes, first the ViT's in each dtype."""
    yield from (Call(dtype) for dtype in dtypes)
    variations: list[dict[str, Any]] = [
        *({"topic": "strides", "layout": layout} for layout in LAYOUTS if layout != "contiguous"),
        *({"topic": "large scores", "score_std": std} for std in (4.0, 10.0)),
        {"topic": "odd shapes", "tokens": 50, "width": 48, "batch": 3, "heads": 1},
        {"topic": "odd shapes", "tokens": 65, "rank": 1, "batch": 1},
        *({"topic": "grid", "grid": grid} for grid in (1, 2)),
        {"topic": "bias", "bias": True},
        *({"topic": "base", "base": base} for base in BASE_FUNCTIONS),
        {"topic": "mask", "mask": True},
        {"topic": "content", "content": True},
    ]
    yield from (replace(Call(dtype), **change) for change in variations for dtype in dtypes)


def compiled_calls(dtypes: tuple[str, ...]) -> Iterator[Call]:
    """Yield calls under torch.compile."""
    yield from (Call(dtype, "torch.compile", bias=bias, compiled=True) for bias in (False, True) for dtype in dtypes)


def flex_calls() -> Iterator[Call]:
    """Yield calls of FlexAttention, which computes in float32."""
    changes: list[dict[str, Any]] = [{}, {"bias": True}, {"content": True}, {"grid": 16, "width": 160, "tokens": 65}]
    yield from (Call(FP32, "FlexAttention", flex=True, **change) for change in changes)


def more_calls(dtypes: tuple[str, ...]) -> Iterator[Call]:
    """Yield every grid at every width of a head, longer ranks and sequences."""
    variations: list[dict[str, Any]] = [
        {"topic": "odd shapes", "tokens": 17, "batch": 3},
        {"topic": "odd shapes", "tokens": 577},
        *({"topic": "rank", "rank": rank} for rank in (16, 24, 40)),
        *({"topic": "grid", "grid": grid} for grid in (5, 7, 9, 11, 16)),
        *({"topic": "width", "width": width} for width in (24, 32, 80, 96, 128)),
        *({"topic": "content", "content": True, "grid": grid, "width": width} for grid, width in ((1, 32), (7, 96))),
        *({"topic": "grid and width", "grid": grid, "width": width} for grid in (1, 9, 16) for width in (32, 96, 128)),
    ]
    yield from (replace(Call(dtype), **change) for change in variations for dtype in dtypes)


def toy(calls: Iterable[Call]) -> Iterator[Call]:
    """Yield one small call of each topic and dtype."""
    seen: set[tuple[str, str]] = set()
    for call in calls:
        if (call.dtype, call.topic) not in seen:
            seen.add((call.dtype, call.topic))
            yield replace(call, tokens=min(call.tokens, 20), width=16, heads=1, rank=4)


def make_inputs(call: Call, device: str) -> Inputs:
    """Draw the tensors on the CPU in float64 and round them; the same for the same sizes."""
    generator = torch.Generator().manual_seed(call.grid * call.width + call.tokens)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return std * torch.randn(*shape, generator=generator, dtype=torch.float64)

    heads, tokens, rank, grid = call.heads, call.tokens, call.rank, call.grid
    lay_out, dtype = LAYOUTS[call.layout], TORCH_DTYPES[call.dtype]
    rows = (call.batch, heads, tokens, call.width)
    std = call.score_std**0.5
    wide = {"query": normal(*rows, std=std), "key": normal(*rows, std=std), "value": normal(*rows)}
    learned = {
        "cos_coef": normal(heads, rank, tokens, grid, std=(tokens * grid) ** -0.5),
        "sin_coef": normal(heads, rank, tokens, grid, std=(tokens * grid) ** -0.5),
        "proj": normal(heads, tokens, rank, std=(rank * tokens) ** -0.5),
    }
    if call.bias:
        learned["bias"] = normal(heads, tokens, tokens)
    if call.content:
        learned |= {name: normal(heads, *shape) for name, shape in psi_shapes(grid).items()}
    tensors = {name: lay_out(x.to(device, dtype)) for name, x in wide.items()}
    tensors |= {name: x.to(device, torch.float32) for name, x in learned.items()}
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    mask = (distance.abs() <= tokens // 2).to(device) if call.mask else None
    grad_output = GRADIENT_LAYOUTS.get(call.layout, torch.clone)(normal(*rows).to(device, dtype))
    return Inputs({name: x.detach().requires_grad_() for name, x in tensors.items()}, mask, grad_output)


def psi_shapes(grid: int) -> dict[str, tuple[int, ...]]:
    """Return the parameters of psi, of the content form, with the shape of each for one head."""
    return {"psi_constant": (), "psi_cos": (grid,), "psi_sin": (grid,)}


def _packed(x: Tensor) -> Tensor:
    """A view into [B, N, 3, h, d], as timm's projection gives query, key and value."""
    batch, heads, tokens, width = x.shape
    packed = x.new_zeros(batch, tokens, 3, heads, width)
    packed[:, :, 1] = x.transpose(1, 2)
    return packed[:, :, 1].transpose(1, 2)


def _unaligned(x: Tensor) -> Tensor:
    """Return a copy that begins one element after an allocation's start."""
    storage = x.new_zeros(x.numel() + 1)
    storage[1:] = x.flatten()
    return storage[1:].view(x.shape)


def _by_columns(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.clone,
    "packed": _packed,
    "by columns": _by_columns,
    "unaligned": _unaligned,
    "same for the batch": lambda x: x[:1].expand(x.shape),
}
# The layouts in which later layers pass gradients back, such as with merged heads, or from a sum.
GRADIENT_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "packed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "by columns": _by_columns,
    "unaligned": _unaligned,
    "same for the batch": lambda x: x[:1, :1, :1, :1].expand(x.shape),
}


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos_coef: Tensor,
    sin_coef: Tensor,
    proj: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    base: str = "zero",
    **psi: Tensor,
) -> Tensor:
    """O = H (W^T V) with H[k, p] = sum_q phi_pq(A[k, q]) (arXiv 2503.10632, section 4), as matrix products.

    Shapes and meanings are those of `fourier_karat_attention`; the dtype is that of the arguments, float64 here.
    With psi, a constant and coefficients for each head, psi(A) V / N is added: the content form.
    """
    scores = torch.einsum("bhkd,bhqd->bhkq", query, key) / query.shape[-1] ** 0.5
    if bias is not None:
        scores = scores + bias
    hidden = scores.new_zeros(())
    for order in range(1, cos_coef.shape[-1] + 1):
        rotation = torch.polar(torch.ones_like(scores), order * scores)
        # Re((a - ib) e^(imx)) = a cos(mx) + b sin(mx)
        coef = torch.complex(cos_coef[..., order - 1], -sin_coef[..., order - 1])
        rotation = rotation if mask is None else rotation * mask
        hidden = hidden + (rotation @ coef.mT).real
    if base != "zero":
        activated = BASE_FUNCTIONS[base](scores)
        activated = activated if mask is None else activated * mask
        hidden = hidden + activated.sum(-1, keepdim=True)
    output: Tensor = hidden @ (proj.mT @ value) if mask is None else ((hidden @ proj.mT) * mask) @ value
    if not psi:
        return output
    learned = psi["psi_constant"][:, None, None].expand_as(scores)
    for order in range(1, psi["psi_cos"].shape[-1] + 1):
        cos, sin = (psi[name][:, order - 1, None, None] for name in ("psi_cos", "psi_sin"))
        learned = learned + cos * torch.cos(order * scores) + sin * torch.sin(order * scores)
    return output + learned @ value / key.shape[-2]


def measure(task: Task) -> None:
    """Report a row for each call; the calls that training makes come first."""
    sized: Callable[[Iterable[Call]], Iterable[Call]] = toy if task.toy else iter
    dtypes = (BF16, FP16, FP32)
    first, *core = sized(core_calls(dtypes))
    _check_all(task, [first])  # alone: Triton sets itself up
    _check_all(task, core)
    with tf32():  # the switch is for the whole process, so these calls wait for the others
        _check_all(task, list(sized(core_calls((TF32,)))))
    _check_all(task, list(sized(itertools.chain(compiled_calls((BF16, FP32)), flex_calls()))), threads=1)
    if not task.toy:
        _check_all(task, list(more_calls(dtypes)))
        with tf32():
            _check_all(task, list(more_calls((TF32,))))


@contextmanager
def tf32() -> Iterator[None]:
    """Turn torch's switch on, which the kernels read too."""
    before = tf32_is_allowed()
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def check(call: Call, task: Task) -> dict[str, Any]:
    """Return the call's row. Raises ValueError if the implementation does not take the call."""
    inputs = make_inputs(call, task.device)
    attend: Callable[..., Tensor] = content_attention if call.content else fourier_karat_attention
    if call.compiled:
        torch.compiler.reset()  # these calls are of one function, which torch compiles only a few times
        attend = torch.compile(attend, fullgraph=True)
    implementation = "flex" if call.flex else task.implementation
    ours = _results(attend, inputs, base=call.base, implementation=implementation)
    leaves = {name: x.detach().double().requires_grad_() for name, x in inputs.tensors.items()}
    wide = Inputs(leaves, inputs.mask, inputs.grad_output.double())
    true = _results(attend, wide, base=call.base, implementation="reference")
    formula = _results(plain_attention, wide, base=call.base)
    errors = _errors(ours, true)
    worst = max(errors, key=errors.__getitem__)
    formula_error = max(_errors(ours, formula).values())
    scores = wide.tensors["query"] @ wide.tensors["key"].mT * call.width**-0.5
    tolerance = call.tolerance(float(scores.detach().abs().max()))
    return {
        "call": str(call),
        "dtype": call.dtype,
        "topic": call.topic,
        "implementation": implementation,
        "error": errors[worst],
        "worst": worst,
        "formula_error": formula_error,
        "tolerance": tolerance,
        "right": max(errors[worst], formula_error) <= tolerance,
    }


def content_attention(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, base: str, implementation: str, **learned: Tensor
) -> Tensor:
    """Return O of the content form, with the given parameters in its module."""
    heads, rank, tokens, grid = learned["cos_coef"].shape
    module = ContentOperator(FourierKaratOperator(tokens, heads, rank, grid, base=base, implementation=implementation))
    named = {name if name in psi_shapes(grid) else f"operator.{name}": x for name, x in learned.items()}
    output: Tensor = functional_call(module, named, (query, key, value), {"mask": mask}, strict=True)
    return output


def _check_all(task: Task, calls: list[Call], threads: int | None = None) -> None:
    """Check in threads and report in order; calls that are not done when the time is up are left out."""
    if not task.budget.left:
        task.channel.late(f"{len(calls)} calls from {calls[0]} on")
        return
    task.channel.send("begin", f"{len(calls)} calls from {calls[0]} on")
    with CompilerThreads(threads) as pool:
        waiting = {call: pool.begin(partial(check, call, task)) for call in calls}
        late = [call for call, future in waiting.items() if not _reported(task, call, future)]
        if late:
            pool.shutdown(cancel_futures=True)
            task.channel.late(f"{len(late)} calls from {late[0]} on")


def _reported(task: Task, call: Call, future: "Future[dict[str, Any]]") -> bool:
    """Report the call's outcome; returns False if it does not come in time."""
    try:
        task.channel.row(**future.result(timeout=task.budget.left))
    except (NotInTimeError, CancelledError):
        return False
    except ValueError as error:
        if REFUSAL not in str(error):
            raise
        task.channel.left_out(str(call), str(error).split(REFUSAL)[1])
    except Exception as error:
        if is_fatal(error):
            raise
        task.channel.raised(str(call), error)
    return True


def _results(attend: Callable[..., Tensor], inputs: Inputs, **settings: str) -> dict[str, Tensor]:
    tensors = inputs.tensors
    output = attend(**tensors, mask=inputs.mask, **settings)
    gradients = torch.autograd.grad(output, list(tensors.values()), inputs.grad_output)
    return {"output": output.detach(), **dict(zip(tensors, gradients, strict=True))}


def _errors(ours: dict[str, Tensor], true: dict[str, Tensor]) -> dict[str, float]:
    """Return the relative L2 error of each tensor; infinite if a number is not finite."""
    found = {name: float((x.double() - true[name]).norm() / true[name].norm()) for name, x in ours.items()}
    return {name: error if math.isfinite(error) else math.inf for name, error in found.items()}
