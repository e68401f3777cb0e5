"""Values and every gradient of the kernels against the float64 reference and a plain formula."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as NotInTimeError
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from karat_scale.attention import FourierKaratOperator, fourier_karat_attention
from karat_scale.attention.kernels.triton_tiles import tf32_is_allowed
from karat_scale.attention.variants import ContentOperator
from karat_scale.commands.bench.gpu.calls import (
    BF16,
    FP16,
    FP32,
    TF32,
    Call,
    Inputs,
    compiled_calls,
    core_calls,
    make_inputs,
    more_calls,
    plain_attention,
    psi_shapes,
    toy,
)
from karat_scale.commands.bench.gpu.process import one_line
from karat_scale.commands.bench.gpu.worker import CompilerThreads, Task, is_fatal

# What a refusal of `fourier_karat_attention` says.
REFUSAL = "cannot take this call: "


def measure(task: Task) -> None:
    """A row for each call, in an order in which what training needs comes first."""

    def sized(calls: Iterable[Call]) -> list[Call]:
        return list(toy(calls) if task.toy else calls)

    dtypes = (BF16, FP16, FP32)
    first, *core = sized(core_calls(dtypes))
    _check_all(task, [first])  # alone: Triton sets itself up
    _check_all(task, core)
    with tf32():  # the switch is the process's, so these calls wait for the others
        _check_all(task, sized(core_calls((TF32,))))
    _check_all(task, sized(compiled_calls((BF16, FP32))), threads=1)
    if not task.toy:
        _check_all(task, list(more_calls(dtypes)))
        with tf32():
            _check_all(task, list(more_calls((TF32,))))


@contextmanager
def tf32() -> Iterator[None]:
    """torch's switch on, which the kernels read too."""
    before = tf32_is_allowed()
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def check(call: Call, task: Task) -> dict[str, Any]:
    """The call's row. Raises ValueError where the implementation does not take it."""
    inputs = make_inputs(call, task.device)
    attend: Callable[..., Tensor] = content_attention if call.content else fourier_karat_attention
    if call.compiled:
        torch.compiler.reset()  # these calls are of one function, which torch compiles only a few times
        attend = torch.compile(attend, fullgraph=True)
    ours = _results(attend, inputs, base=call.base, implementation=task.implementation)
    wide = _widened(inputs)
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
        "implementation": task.implementation,
        "error": errors[worst],
        "worst": worst,
        "formula_error": formula_error,
        "tolerance": tolerance,
        "right": max(errors[worst], formula_error) <= tolerance,
    }


def content_attention(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, base: str, implementation: str, **learned: Tensor
) -> Tensor:
    """Return O of the content form, whose module takes the parameters that are given."""
    heads, rank, tokens, grid = learned["cos_coef"].shape
    operator = FourierKaratOperator(tokens, heads, rank, grid, base=base, implementation=implementation)
    module = ContentOperator(operator)
    named = {name if name in psi_shapes(grid) else f"operator.{name}": x for name, x in learned.items()}
    output: Tensor = functional_call(module, named, (query, key, value), {"mask": mask}, strict=True)
    return output


def _check_all(task: Task, calls: list[Call], threads: int | None = None) -> None:
    """Check in threads and report in order; calls that are not done when the time is up are left out."""
    if not task.budget.left:
        task.channel.late(f"{len(calls)} calls from {calls[0]} on")
        return
    task.channel.begin(f"{len(calls)} calls from {calls[0]} on")
    with CompilerThreads(threads) as pool:
        waiting = {call: pool.begin(functools.partial(check, call, task)) for call in calls}
        late = [call for call, future in waiting.items() if not _reported(task, call, future)]
        if late:
            pool.shutdown(cancel_futures=True)
            task.channel.late(f"{len(late)} calls from {late[0]} on")


def _reported(task: Task, call: Call, future: "Future[dict[str, Any]]") -> bool:
    """Report the call's outcome; False if it is not there in time."""
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
        task.channel.failed(str(call), one_line(error))
    return True


def _results(attend: Callable[..., Tensor], inputs: Inputs, **settings: str) -> dict[str, Tensor]:
    tensors = inputs.tensors
    output = attend(**tensors, mask=inputs.mask, **settings)
    gradients = torch.autograd.grad(output, list(tensors.values()), inputs.grad_output)
    return {"output": output.detach(), **dict(zip(tensors, gradients, strict=True))}


def _widened(inputs: Inputs) -> Inputs:
    tensors = {name: x.detach().double().requires_grad_() for name, x in inputs.tensors.items()}
    return Inputs(tensors, inputs.mask, inputs.grad_output.double())


def _errors(ours: dict[str, Tensor], true: dict[str, Tensor]) -> dict[str, float]:
    """The relative L2 error of each; infinite where a number is not finite."""
    found = {name: float((x.double() - true[name]).norm() / true[name].norm()) for name, x in ours.items()}
    return {name: error if math.isfinite(error) else math.inf for name, error in found.items()}
