"""Attention of a ViT as one call to measure: KArAt's implementations, SDPA and softmax, in time and memory.

The peers are `scaled_dot_product_attention` (SDPA), which a user has without us, and softmax written out, which
holds the N x N matrix as the literature's code does. Contenders run in turn; ratios are medians over rounds.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from karat_scale.attention import FourierKaratOperator, KaratOperator, make_basis
from karat_scale.attention.variants import ContentOperator
from karat_scale.commands.measure.interleaved import interleaved_seconds, peak_memory_of
from karat_scale.engine.distributed import wait_for
from karat_scale.foundation.errors import UserError

HEADS = {"tiny": 3, "small": 6, "base": 12}
TOKENS, HEAD_WIDTH = 197, 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SDPA, SOFTMAX = "sdpa", "softmax"

# Of query, key and value. A module has parameters, too.
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


def passes(attend: Attend, inputs: Sequence[Tensor]) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return a forward pass, and one with all gradients, as functions that do not wait for the device."""
    grad_output = torch.ones_like(inputs[2])
    leaves = [*inputs, *(attend.parameters() if isinstance(attend, nn.Module) else ())]

    def forward() -> None:
        with torch.no_grad():
            attend(*inputs)

    def both() -> None:
        # A constant matrix has no use for query and key.
        torch.autograd.grad(attend(*inputs), leaves, grad_output, allow_unused=True)

    return forward, both


def waiting(run: Callable[[], None], device: str) -> Callable[[], None]:
    """Return `run`, after which the device is waited for."""

    def waited() -> None:
        run()
        wait_for(device)

    return waited


def forward_backward(name: str, case: Case) -> Callable[[], None]:
    """Return a function that calls the contender, computes all gradients and waits for the device."""
    return waiting(passes(case.attend_by(name), case.inputs())[1], case.device)


def forward_backward_once(name: str, case: Case, warm_up: bool) -> Callable[[], None]:
    """Return the call whose memory is measured; as a warm-up, a small one that loads and builds all it needs."""
    return forward_backward(name, replace(case, batch=1, tokens=16) if warm_up else case)


def clock_for(device: str, threads: int) -> Callable[[], float]:
    """Return the process's CPU time for one thread, since other processes do not affect it; else the wall clock."""
    return time.process_time if device == "cpu" and threads == 1 else time.perf_counter


def attention_rows(case: Case, rounds: int, names: Sequence[str], threads: int = 1) -> list[dict[str, Any]]:
    """Return a row of figures for SDPA, explicit softmax, and each of the named implementations that can run the case.

    Raises:
        UserError: none of them can.
    """
    case.check()

    def can_run(name: str) -> bool:
        try:
            case.attend_by(name)(*replace(case, batch=1).inputs())
        except ValueError:
            return False
        return True

    runnable = list(filter(can_run, names))
    if not runnable:
        raise UserError(f"none of {', '.join(names)} can run {case}")
    contenders = [SDPA, SOFTMAX, *runnable]
    memory = {name: peak_memory_of(forward_backward_once, (name, case), case.device) for name in contenders}
    pairs = {name: passes(case.attend_by(name), case.inputs()) for name in contenders}
    forward, both = (
        interleaved_seconds(
            {name: waiting(pair[way], case.device) for name, pair in pairs.items()},
            rounds,
            clock_for(case.device, threads),
        )
        for way in (0, 1)
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
        for name in contenders
    ]
