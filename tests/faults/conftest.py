"""These tests try a few faults that differ by CI run, or all of them with `--faults=all` (`make faults`)."""

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

OUTCOMES = ROOT / "build" / "faults"


@dataclass(frozen=True)
class Share:
    """Which faults to try."""

    is_all: bool
    seed: int
    """Of random choices: a CI run has that of its turn, so that one after another they try all kinds of faults."""

    def of(self, few: int, full: int) -> int:
        """Return how many faults to try."""
        return full if self.is_all else few


class TooLongError(BaseException):
    """Raised in code that takes too long. It is a BaseException, so that the code does not handle it."""


@contextmanager
def no_longer_than(seconds: float) -> Iterator[None]:
    """Raise TooLongError in the block if it still works, or waits at a pipe, after `seconds`."""

    def give_up(*_: object) -> None:
        raise TooLongError(f"it still works or waits after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="session")
def share(pytestconfig) -> Share:
    seed, turn = pytestconfig.getoption("--seed"), pytestconfig.getoption("--turn")
    return Share(pytestconfig.getoption("--faults") == "all", next((n for n in (seed, turn) if n is not None), 0))


@pytest.fixture
def record(share, request) -> Callable[[dict[str, Any]], None]:
    """Return a function that writes what was tried to build/faults/TEST.json, if all faults were tried."""

    def keep(tried: dict[str, Any]) -> None:
        if share.is_all:
            OUTCOMES.mkdir(parents=True, exist_ok=True)
            path: Path = OUTCOMES / f"{request.node.name}.json"
            path.write_text(json.dumps({"seed": share.seed, **tried}, indent=2) + "\n")

    return keep
