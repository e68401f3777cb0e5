"""Attention of a ViT as one call to measure: KArAt's implementations, SDPA and softmax, in time and memory.

The peers are `scaled_dot_product_attention` (SDPA), which a user has without us, and softmax written out, which
holds the N x N matrix as the literature's code does. Contenders run in turn; ratios are medians over rounds.
"""

import ctypes
import gc
import multiprocessing
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from karat_scale.attention import FourierKaratOperator, KaratOperator, make_basis
from karat_scale.attention.variants import ContentOperator
from karat_scale.commands.measure.interleaved import (
    Rounds,
    calls_for,
    cuda_peak,
    device_seconds,
    interleaved,
    interleaved_seconds,
)
from karat_scale.engine.distributed import wait_for
from karat_scale.foundation.errors import UserError, one_line

HEADS = {"tiny": 3, "small": 6, "base": 12}
TOKENS, HEAD_WIDTH = 197, 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SDPA, SOFTMAX = "sdpa", "softmax"

# A function of query, key and value. A module has parameters, too.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


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

    def check(self) -> None:
        """Raise UserError for an unknown basis, a grid or form that it does not take, or a GPU that is not here."""
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError(f"--device {self.device}: no CUDA device here; use --device cpu")
        if self.form == "content" and self.basis != "fourier":
            raise UserError(f"--form content needs --basis fourier, not {self.basis}")
        try:
            make_basis(self.basis, grid=self.grid)
        except ValueError as error:
            raise UserError(f"--{error}") from error

    @property
    def device_name(self) -> str:
        """The GPU's name, or the CPU's vector instructions."""
        return torch.cuda.get_device_name() if self.device == "cuda" else torch.backends.cpu.get_cpu_capability()

    def inputs(self) -> tuple[Tensor, ...]:
        """Query, key and value [B, h, N, d] that need gradients; scores have a standard deviation of about one."""
        generator = torch.Generator().manual_seed(0)
        shape = self.batch, HEADS[self.model], self.tokens, HEAD_WIDTH
        tensors = [torch.randn(shape, generator=generator).to(DTYPES[self.dtype]) for _ in range(3)]
        return tuple(tensor.to(self.device).requires_grad_() for tensor in tensors)

    def attend_by(self, name: str) -> Attend:
        """Return SDPA, softmax, or an implementation of the operator with variance-preserving parameters.

        Raises:
            ValueError: the implementation does not have the operator.
        """
        if name == SDPA:
            return functional.scaled_dot_product_attention
        if name == SOFTMAX:
            return lambda query, key, value: torch.softmax(query @ key.mT * query.shape[-1] ** -0.5, -1) @ value
        heads = HEADS[self.model]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            basis = make_basis(self.basis, grid=self.grid)
            if self.form == "content":
                series = FourierKaratOperator(self.tokens, heads, self.rank, self.grid, implementation=name)
                return ContentOperator(series).to(self.device)
            operator = KaratOperator(self.tokens, heads, basis, self.rank, form=self.form, implementation=name)
            return operator.to(self.device)


def passes(
    attend: Attend, inputs: Sequence[Tensor], parameters: Iterable[Tensor] = ()
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return a forward pass, and one with all gradients, as functions that do not wait for the device.

    parameters: those of an `attend` that is no module.
    """
    grad_output = torch.ones_like(inputs[2])
    leaves = [*inputs, *(attend.parameters() if isinstance(attend, nn.Module) else parameters)]

    def forward() -> None:
        with torch.no_grad():
            attend(*inputs)

    def both() -> None:
        # A constant matrix has no use for query and key.
        torch.autograd.grad(attend(*inputs), leaves, grad_output, allow_unused=True)

    return forward, both


def waiting(run: Callable[[], None], device: str) -> Callable[[], None]:
    """Return a function that calls `run` and then waits for the device."""

    def waited() -> None:
        run()
        wait_for(device)

    return waited


def forward_backward(name: str, case: Case) -> Callable[[], None]:
    """Return a function that calls the contender, computes all gradients and waits for the device."""
    return waiting(passes(case.attend_by(name), case.inputs())[1], case.device)


def peak_memory(name: str, case: Case) -> float:
    """Return the peak of extra megabytes of a contender's call, in a process of its own.

    A small call beforehand loads and builds all that it needs. On CUDA this is the allocator's peak; on the CPU the
    peak of the resident set (Linux).
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_memory, (name, case))


def _peak_memory(name: str, case: Case) -> float:
    torch.set_num_threads(1)
    forward_backward(name, replace(case, batch=1, tokens=16))()
    run = forward_backward(name, case)
    if case.device == "cuda":
        return cuda_peak(run)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status_mb("VmRSS")
    run()
    return _status_mb("VmHWM") - before


def _status_mb(key: str) -> float:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:")]
    return int(line.split()[1]) * 1024 / 1e6


def seconds_of(contenders: Mapping[str, Callable[[], None]], device: str, rounds: int, threads: int) -> Rounds:
    """Return the interleaved seconds of functions that do not wait for the device: on a GPU, those of its own work."""
    if device == "cpu":
        # Other processes do not affect the processor time.
        return interleaved_seconds(contenders, rounds, time.process_time if threads == 1 else time.perf_counter)
    timed = {name: partial(device_seconds, run, calls_for(run, device), device) for name, run in contenders.items()}
    return interleaved(timed, rounds)


def attention_rows(case: Case, rounds: int, names: Sequence[str], threads: int = 1) -> list[dict[str, Any]]:
    """Return a row of figures for SDPA, explicit softmax, and each of the named implementations that can run the case.

    Raises:
        UserError: none of them can.
    """
    case.check()
    memory, why = {}, []
    for name in (SDPA, SOFTMAX, *names):  # all before this process uses the card, which may admit only one at a time
        try:
            memory[name] = peak_memory(name, case)
        except ValueError as error:
            why.append(f"{name}: {one_line(error)}")
    if not memory.keys() & set(names):
        raise UserError(f"no implementation can run this: {'; '.join(why)}; name others by --only")
    for line in why:
        print(f"not measured: {line}")
    pairs = {name: passes(case.attend_by(name), case.inputs()) for name in memory}
    forward, both = (
        seconds_of({name: pair[way] for name, pair in pairs.items()}, case.device, rounds, threads) for way in (0, 1)
    )
    return [
        {
            "implementation": name,
            "forward_ms": round(1e3 * forward.median(name), 3),
            "forward_backward_ms": round(1e3 * both.median(name), 3),
            "peak_mb": round(memory[name], 1),
            "ratio_forward": round(forward.ratio(name, SDPA), 3),
            "ratio_forward_backward": round(both.ratio(name, SDPA), 3),
            "ratio_memory": round(memory[name] / memory[SDPA], 3),
            "ratio_forward_to_softmax": round(forward.ratio(name, SOFTMAX), 3),
            "ratio_forward_backward_to_softmax": round(both.ratio(name, SOFTMAX), 3),
        }
        for name in memory
    ]
