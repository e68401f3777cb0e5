"""KArAt's attention against every backend of SDPA, by the device's events and by the clock."""

import functools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel

from karat_scale.commands.bench.attention import SDPA, TOKENS, Case, Contender, make_contender, passes
from karat_scale.commands.bench.gpu.kernels import tf32
from karat_scale.commands.bench.gpu.process import one_line
from karat_scale.commands.bench.gpu.worker import CompilerThreads, Task, is_fatal
from karat_scale.commands.bench.measuring import (
    calls_for,
    cuda_peak,
    device_seconds,
    interleaved,
    median_ratio,
    wall_seconds,
)
from karat_scale.foundation.errors import is_out_of_memory

BACKENDS = {
    "SDPA, flash": SDPBackend.FLASH_ATTENTION,
    "SDPA, cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA, efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA, math": SDPBackend.MATH,
}
CHOSEN = "SDPA, torch's choice"
# Name, grid and form.
OPERATORS = (("KArAt G1", 1, "modular"), ("KArAt G3", 3, "modular"), ("KArAt content, G3", 3, "content"))
BATCH, ROUNDS, TOY_TOKENS = 256, 7, 32
# Model and dtype, what training meets first.
CASES = (("small", "bf16"), ("tiny", "bf16"), ("base", "bf16"), ("small", "tf32"), ("small", "fp16"), ("small", "fp32"))
GUESS = 30.0


@dataclass(frozen=True)
class Timed:
    """A contender as it is measured: each way of calling it, within the setting it needs."""

    forward: Callable[[], object]
    both: Callable[[], object]
    setting: Callable[[], AbstractContextManager[Any]]


def measure(task: Task) -> None:
    """Rows for each case that the time allows."""
    cases = CASES[:1] if task.toy else CASES
    _compile(task, sorted({_plain(dtype) for _, dtype in cases}))
    for model, dtype in cases:
        _measure_case(task, model, dtype)


def _measure_case(task: Task, model: str, dtype: str) -> None:
    what = f"ViT-{model.capitalize()}, {dtype}, N {TOY_TOKENS if task.toy else TOKENS}"
    if not task.budget.allows("case", GUESS):
        task.channel.late(what)
        return
    task.channel.begin(what)
    begun = time.monotonic()
    with tf32() if dtype == "tf32" else nullcontext():
        task.halving(what, 2 if task.toy else BATCH, lambda batch: _compare(task, model, dtype, batch, what))
    task.free()
    task.budget.note("case", begun)


def _plain(dtype: str) -> str:
    return "fp32" if dtype == "tf32" else dtype


def _case(task: Task, model: str, batch: int, grid: int, dtype: str) -> Case:
    return Case(model, batch, grid, 12, dtype, task.device, tokens=TOY_TOKENS if task.toy else TOKENS)


def _compile(task: Task, dtypes: list[str]) -> None:
    """Compile the Triton kernels before they are timed; a failure here repeats there and is reported then."""

    def once(dtype: str, grid: int, form: str) -> None:
        case = replace(_case(task, "tiny", 2, grid, dtype), form=form)
        _timed(make_contender(task.implementation, case), case, nullcontext).both()

    first, *others = (functools.partial(once, dtype, grid, form) for dtype in dtypes for _, grid, form in OPERATORS)
    with CompilerThreads() as pool:
        wait([pool.begin(first)])  # alone: Triton sets itself up
        wait([pool.begin(other) for other in others])


def _compare(task: Task, model: str, dtype: str, batch: int, what: str) -> None:
    contenders = dict(_contenders(task, model, dtype, batch, what))
    rounds = 1 if task.toy else ROUNDS
    figures = {
        (way, clock): interleaved(dict(_measures(contenders, way, clock, task.device)), rounds)
        for way in ("forward", "both")
        for clock in (device_seconds, wall_seconds)
    }
    forward, both = figures["forward", device_seconds], figures["both", device_seconds]
    best = min((name for name in contenders if name.startswith("SDPA")), key=lambda name: statistics.median(both[name]))
    for name, timed in contenders.items():
        task.channel.row(
            case=f"{what}, B {batch}",
            attention=name,
            forward_ms=_milliseconds(forward[name]),
            both_ms=_milliseconds(both[name]),
            ratio_forward=round(median_ratio(forward, name, CHOSEN), 3),
            ratio_both=round(median_ratio(both, name, CHOSEN), 3),
            ratio_best=round(median_ratio(both, name, best), 3),
            forward_wall_ms=_milliseconds(figures["forward", wall_seconds][name]),
            both_wall_ms=_milliseconds(figures["both", wall_seconds][name]),
            peak_mb=None if task.toy else _peak_mb(timed),
        )


def _contenders(task: Task, model: str, dtype: str, batch: int, what: str) -> Iterator[tuple[str, Timed]]:
    """Those that run: torch has not every backend for every card and dtype, but KArAt should."""
    case = _case(task, model, batch, OPERATORS[0][1], _plain(dtype))
    yield CHOSEN, _timed(make_contender(SDPA, case), case, nullcontext)
    for name, backend in BACKENDS.items():
        timed = _timed(make_contender(SDPA, case), case, functools.partial(sdpa_kernel, backend))
        if why := _refusal(timed):
            task.channel.left_out(f"{what}: {name}", why)
        else:
            yield name, timed
    for name, grid, form in OPERATORS:
        case = replace(_case(task, model, batch, grid, case.dtype), form=form)
        timed = _timed(make_contender(task.implementation, case), case, nullcontext)
        if why := _refusal(timed):
            task.channel.failed(f"{what}: {name}", why)
        else:
            yield name, timed


def _timed(contender: Contender, case: Case, setting: Callable[[], AbstractContextManager[Any]]) -> Timed:
    return Timed(*passes(contender, case), setting)


def _refusal(timed: Timed) -> str | None:
    """Return why a contender does not run, with the warnings of SDPA's backends; None if it runs."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with timed.setting():
                timed.both()
        except Exception as error:
            if is_out_of_memory(error) or is_fatal(error):
                raise
            reasons = [str(one.message).split(" (Triggered")[0] for one in caught]
            return "; ".join([one_line(error), *reasons])
    return None


def _measures(
    contenders: dict[str, Timed], way: str, clock: Callable[..., float], device: str
) -> Iterator[tuple[str, Callable[[], float]]]:
    for name, timed in contenders.items():
        run = getattr(timed, way)
        with timed.setting():
            calls = calls_for(run, device)

        def seconds(timed: Timed = timed, run: Callable[[], object] = run, calls: int = calls) -> float:
            with timed.setting():
                return clock(run, calls, device)

        yield name, seconds


def _milliseconds(seconds: list[float]) -> float:
    return round(1e3 * statistics.median(seconds), 4)


def _peak_mb(timed: Timed) -> float:
    with timed.setting():
        return round(cuda_peak(timed.both), 1)
