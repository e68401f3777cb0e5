"""Timing of several contenders in turn, so that a machine's drift falls on all of them alike."""

import resource
import statistics
import time
from collections.abc import Callable, Mapping


def interleaved_seconds(
    contenders: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each contender in each of `rounds` rounds, after one round that is not counted.

    Every other round runs in reverse order: whoever follows whom must not matter.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        names = list(contenders) if number % 2 else list(contenders)[::-1]
        for name in names:
            begun = clock()
            contenders[name]()
            if number:
                seconds[name].append(clock() - begun)
    return seconds


def median_ratio(seconds: Mapping[str, list[float]], name: str, base: str) -> float:
    """The median over rounds of `name`'s seconds over `base`'s in the same round."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))


def processor_seconds() -> float:
    """Processor time of this process, and of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime
