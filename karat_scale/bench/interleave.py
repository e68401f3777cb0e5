"""Timing of several contenders in turn, so that a machine's drift falls on all of them alike."""

import functools
import resource
import statistics
import time
from collections.abc import Callable, Mapping


def interleaved(measures: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each contender measures of itself in each of `rounds` rounds, after one round that is not counted.

    Every other round runs in reverse order: whoever follows whom must not matter.
    """
    found: dict[str, list[float]] = {name: [] for name in measures}
    for number in range(rounds + 1):
        names = list(measures) if number % 2 else list(measures)[::-1]
        for name in names:
            figure = measures[name]()
            if number:
                found[name].append(figure)
    return found


def interleaved_seconds(
    contenders: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each contender in each of `rounds` rounds of `interleaved`."""

    def timed(run: Callable[[], object]) -> float:
        begun = clock()
        run()
        return clock() - begun

    return interleaved({name: functools.partial(timed, run) for name, run in contenders.items()}, rounds)


def median_ratio(seconds: Mapping[str, list[float]], name: str, base: str) -> float:
    """The median over rounds of `name`'s seconds over `base`'s in the same round."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))


def processor_seconds() -> float:
    """Processor time of this process, and of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime
