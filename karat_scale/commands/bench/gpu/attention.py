"""KArAt's attention against every backend of SDPA and FlexAttention, by the device's events and by the clock."""

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel

from karat_scale.commands.bench.gpu.kernels import tf32
from karat_scale.commands.bench.gpu.worker import CompilerThreads, Task, is_fatal, one_line
from karat_scale.commands.measure import interleaved as timing
from karat_scale.commands.measure.attention import SDPA, TOKENS, Case, passes
from karat_scale.foundation.errors import is_out_of_memory

BACKENDS = {
    "SDPA, flash": SDPBackend.FLASH_ATTENTION,
    "SDPA, cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA, efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA, math": SDPBackend.MATH,
}
CHOSEN = "SDPA, torch's choice"
# Grid and form.
OPERATORS = {"KArAt G1": (1, "modular"), "KArAt G3": (3, "modular"), "KArAt content, G3": (3, "content")}
# Baselines of the operator itself, in float32.
FLEX = {"KArAt G3 by FlexAttention": (3, "modular"), "KArAt content, G3, by FlexAttention": (3, "content")}
BATCH, ROUNDS, TOY_TOKENS = 256, 7, 32
# Model and dtype; the most common in training come first.
CASES = (("small", "bf16"), ("tiny", "bf16"), ("base", "bf16"), ("small", "tf32"), ("small", "fp16"), ("small", "fp32"))
GUESS = 30.0


@dataclass(frozen=True)
class Timed:
    """A contender as it is measured: each way of calling it, within the setting it needs."""

    forward: Callable[[], object]
    both: Callable[[], object]
    setting: Callable[[], AbstractContextManager[Any]] = nullcontext

    @classmethod
    def of(cls, name: str, case: Case, setting: Callable[[], AbstractContextManager[Any]] = nullcontext) -> "Timed":
        """Return SDPA or an implementation of the case."""
        return cls(*passes(case.attend_by(name), case.inputs()), setting)

    def refusal(self) -> str | None:
        """Return why it does not run, with the warnings of SDPA's backends; None if it runs."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                with self.setting():
                    self.both()
            except Exception as error:
                if is_out_of_memory(error) or is_fatal(error):
                    raise
                return "; ".join([one_line(error), *(str(one.message).split(" (Triggered")[0] for one in caught)])
        return None

    def measure(self, way: str, clock: Callable[..., float], device: str) -> Callable[[], float]:
        """Return a function that measures the seconds of a call."""
        run = getattr(self, way)
        with self.setting():
            calls = timing.calls_for(run, device)

        def seconds() -> float:
            with self.setting():
                return clock(run, calls, device)

        return seconds


def measure(task: Task) -> None:
    """Report rows for each case that the time allows."""
    cases, tokens = (CASES[:1], TOY_TOKENS) if task.toy else (CASES, TOKENS)
    _compile(task, sorted({_plain(dtype) for _, dtype in cases}), tokens)
    for model, dtype in cases:
        what = f"ViT-{model.capitalize()}, {dtype}, N {tokens}"
        case = Case(model, 1, 1, 12, _plain(dtype), task.device, tokens)
        task.part(what, "case", GUESS, partial(_measure_case, task, case, dtype, what))


def _measure_case(task: Task, case: Case, dtype: str, what: str) -> None:
    with tf32() if dtype == "tf32" else nullcontext():
        task.halving(what, 2 if task.toy else BATCH, lambda batch: _compare(task, replace(case, batch=batch), what))


def _plain(dtype: str) -> str:
    return "fp32" if dtype == "tf32" else dtype


def _compile(task: Task, dtypes: list[str], tokens: int) -> None:
    """Compile the Triton kernels before they are timed; a failure here repeats in the timing and is reported there."""

    def once(dtype: str, grid: int, form: str) -> None:
        Timed.of(task.implementation, Case("tiny", 2, grid, 12, dtype, task.device, tokens, form=form)).both()

    first, *others = (partial(once, dtype, grid, form) for dtype in dtypes for grid, form in OPERATORS.values())
    with CompilerThreads() as pool:
        wait([pool.begin(first)])  # alone: Triton sets itself up
        wait([pool.begin(other) for other in others])


def _compare(task: Task, case: Case, what: str) -> None:
    contenders = dict(_contenders(task, case, what))
    figures: dict[tuple[str, Any], timing.Rounds] = {
        (way, clock): timing.interleaved(
            {name: timed.measure(way, clock, task.device) for name, timed in contenders.items()},
            1 if task.toy else ROUNDS,
        )
        for way in ("forward", "both")
        for clock in (timing.device_seconds, timing.wall_seconds)
    }
    forward, both = figures["forward", timing.device_seconds], figures["both", timing.device_seconds]
    best = min((name for name in contenders if name.startswith("SDPA")), key=both.median)
    for name, timed in contenders.items():
        peak = None
        if not task.toy:
            with timed.setting():
                peak = round(timing.cuda_peak(timed.both), 1)
        task.channel.row(
            case=f"{what}, B {case.batch}",
            attention=name,
            forward_ms=round(1e3 * forward.median(name), 4),
            both_ms=round(1e3 * both.median(name), 4),
            ratio_forward=round(forward.ratio(name, CHOSEN), 3),
            ratio_both=round(both.ratio(name, CHOSEN), 3),
            ratio_best=round(both.ratio(name, best), 3),
            forward_wall_ms=round(1e3 * figures["forward", timing.wall_seconds].median(name), 4),
            both_wall_ms=round(1e3 * figures["both", timing.wall_seconds].median(name), 4),
            peak_mb=peak,
        )


def _contenders(task: Task, case: Case, what: str) -> Iterator[tuple[str, Timed]]:
    """Yield the contenders that run: torch lacks some backends on some cards and dtypes, but KArAt should run."""
    yield CHOSEN, Timed.of(SDPA, case)
    others = {name: Timed.of(SDPA, case, partial(sdpa_kernel, backend)) for name, backend in BACKENDS.items()}
    for implementation, operators in (("flex", FLEX), (task.implementation, OPERATORS)):
        for name, (grid, form) in operators.items():
            others[name] = Timed.of(implementation, replace(case, grid=grid, form=form))
    for name, timed in others.items():
        if why := timed.refusal():
            report = task.channel.failed if name in OPERATORS else task.channel.left_out
            report(f"{what}: {name}", why)
        else:
            yield name, timed
