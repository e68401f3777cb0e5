"""`karat bench attention`: time and memory of each implementation of an operator against softmax attention.

The peers are `scaled_dot_product_attention` (SDPA), which a user has without us, and softmax written out, which
holds the N x N matrix as the literature's code does. Contenders run in turn; ratios are medians over rounds.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from karat_scale.attention import FourierKaratOperator, KaratOperator, make_basis
from karat_scale.attention.operator import AttentionHeads
from karat_scale.attention.variants import ContentOperator
from karat_scale.commands.bench.measuring import interleaved_seconds, median_ratio, peak_memory_of
from karat_scale.engine.devices import wait_for
from karat_scale.foundation.console import print_table, write_json
from karat_scale.foundation.errors import UserError

HEADS = {"tiny": 3, "small": 6, "base": 12}
TOKENS, HEAD_WIDTH = 197, 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SDPA, SOFTMAX = "sdpa", "softmax"


@dataclass(frozen=True)
class Case:
    """One call to measure: attention of a ViT/16 at 224 px (N = 197, d = 64) in a batch, forward and backward."""

    model: str
    batch: int
    grid: int
    rank: int
    dtype: str
    device: str
    tokens: int = TOKENS
    basis: str = "fourier"
    form: str = "modular"


class Contender(NamedTuple):
    """Attention as a function of query, key and value, and its parameters."""

    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    parameters: tuple[Tensor, ...] = ()


def bench_attention(case: Case, rounds: int, threads: int, json_file: str | None, names: Sequence[str]) -> int:
    """Measure the named implementations; print a table, and write `json_file`; returns 0.

    Raises:
        UserError: no implementation can run the case.
    """
    if case.device == "cpu":
        torch.set_num_threads(threads)
    rows = attention_rows(case, rounds, names, threads)
    result = {**asdict(case), "device_name": device_name(case.device), "threads": threads, "rows": rows}
    _print(result)
    write_json(json_file, result)
    return 0


def check_case(case: Case) -> None:
    """Raise UserError for an unknown basis, a grid or form that the basis does not take, or a GPU that is not here."""
    if torch.device(case.device).type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {case.device}: no CUDA device here; use --device cpu")
    if case.form == "content" and case.basis != "fourier":
        raise UserError(f"--form content needs --basis fourier, not {case.basis}")
    try:
        make_basis(case.basis, grid=case.grid)
    except ValueError as error:
        raise UserError(f"--{error}") from error


def attention_rows(case: Case, rounds: int, names: Sequence[str], threads: int = 1) -> list[dict[str, Any]]:
    """Return a row of figures for SDPA, explicit softmax, and each of the named implementations that can run the case.

    Raises:
        UserError: none of them can.
    """
    check_case(case)
    runnable = [name for name in names if _can_run(name, case)]
    if not runnable:
        raise UserError(f"none of {', '.join(names)} can run {case}")
    contenders = [SDPA, SOFTMAX, *runnable]
    clock = clock_for(case.device, threads)
    memory = {name: peak_memory_of(forward_backward_once, (name, case), case.device) for name in contenders}
    pairs = {name: passes(make_contender(name, case), case) for name in contenders}
    forward, both = (
        interleaved_seconds({name: _waiting(pair[way], case) for name, pair in pairs.items()}, rounds, clock)
        for way in (0, 1)
    )
    return [
        {
            "implementation": name,
            "forward_ms": round(1e3 * statistics.median(forward[name]), 3),
            "forward_backward_ms": round(1e3 * statistics.median(both[name]), 3),
            "peak_mb": round(memory[name], 1),
            "ratio_forward": round(median_ratio(forward, name, SDPA), 3),
            "ratio_forward_backward": round(median_ratio(both, name, SDPA), 3),
            "ratio_memory": round(memory[name] / memory[SDPA], 3),
            "ratio_forward_to_softmax": round(median_ratio(forward, name, SOFTMAX), 3),
            "ratio_forward_backward_to_softmax": round(median_ratio(both, name, SOFTMAX), 3),
        }
        for name in contenders
    ]


def make_inputs(case: Case) -> tuple[Tensor, ...]:
    """Return query, key and value [B, h, N, d] that need gradients; scores have a standard deviation of about one."""
    generator = torch.Generator().manual_seed(0)
    shape = case.batch, HEADS[case.model], case.tokens, HEAD_WIDTH
    tensors = [torch.randn(shape, generator=generator).to(DTYPES[case.dtype]) for _ in range(3)]
    return tuple(tensor.to(case.device).requires_grad_() for tensor in tensors)


def make_contender(name: str, case: Case) -> Contender:
    """Return SDPA, softmax, or an implementation of the case's operator with variance-preserving parameters.

    Raises:
        ValueError: the implementation does not have the operator.
    """
    if name == SDPA:
        return Contender(functional.scaled_dot_product_attention)
    if name == SOFTMAX:
        return Contender(_explicit_softmax)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        operator = _make_operator(name, case).to(case.device)
    return Contender(operator, tuple(operator.parameters()))


def _make_operator(name: str, case: Case) -> AttentionHeads:
    heads, basis = HEADS[case.model], make_basis(case.basis, grid=case.grid)
    if case.form != "content":
        return KaratOperator(case.tokens, heads, basis, case.rank, form=case.form, implementation=name)
    return ContentOperator(FourierKaratOperator(case.tokens, heads, case.rank, case.grid, implementation=name))


def _explicit_softmax(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return torch.softmax(scores, -1) @ value


def _can_run(name: str, case: Case) -> bool:
    try:
        make_contender(name, case).attend(*make_inputs(replace(case, batch=1)))
    except ValueError:
        return False
    return True


def passes(contender: Contender, case: Case) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return a forward pass, and one with all gradients, as functions that do not wait for the device."""
    inputs = make_inputs(case)
    grad_output = torch.ones_like(inputs[2])

    def forward() -> None:
        with torch.no_grad():
            contender.attend(*inputs)

    def both() -> None:
        torch.autograd.grad(contender.attend(*inputs), (*inputs, *contender.parameters), grad_output)

    return forward, both


def forward_backward(name: str, case: Case) -> Callable[[], None]:
    """Return a function that calls the contender, computes all gradients and waits for the device."""
    _, both = passes(make_contender(name, case), case)
    return _waiting(both, case)


def _waiting(run: Callable[[], None], case: Case) -> Callable[[], None]:
    def waited() -> None:
        run()
        wait_for(case.device)

    return waited


def forward_backward_once(name: str, case: Case, warm_up: bool) -> Callable[[], None]:
    """Return the call whose memory is measured; as a warm-up, a small one that loads and builds all it needs."""
    return forward_backward(name, replace(case, batch=1, tokens=16) if warm_up else case)


def clock_for(device: str, threads: int) -> Callable[[], float]:
    """Return the process's CPU time for one thread, since other processes do not affect it; else the wall clock."""
    return time.process_time if device == "cpu" and threads == 1 else time.perf_counter


def device_name(device: str) -> str:
    """Return the GPU's name, or the CPU's vector instructions."""
    return torch.cuda.get_device_name() if device == "cuda" else torch.backends.cpu.get_cpu_capability()


def _print(result: dict[str, Any]) -> None:
    title = f"ViT-{result['model'].capitalize()} batch {result['batch']}, N = {result['tokens']}, "
    title += f"{result['basis']} {result['form']}, grid {result['grid']}, rank {result['rank']}, "
    title += f"{result['dtype']} on {result['device_name']}"
    rows = []
    for row in result["rows"]:
        forward = (row["forward_ms"], row["ratio_forward"], row["ratio_forward_to_softmax"])
        both = (
            row["forward_backward_ms"],
            row["ratio_forward_backward"],
            row["ratio_forward_backward_to_softmax"],
        )
        rows.append([f"{row['implementation']} forward", *(f"{figure:.2f}" for figure in forward), "", ""])
        memory = (f"{row['peak_mb']:.1f}", f"{row['ratio_memory']:.2f}")
        rows.append(["  and backward", *(f"{figure:.2f}" for figure in both), *memory])
    print_table(title, ("implementation", "ms", "to SDPA", "to softmax", "MB", "to SDPA"), rows)
