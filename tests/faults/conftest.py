"""How many faults these tests try: a few that differ by CI run, or with `--faults=all` (`make faults`) all of them."""

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
        """How many to try."""
        return full if self.is_all else few


class TooLongError(BaseException):
    """Raised in what takes too long; not an error that code would handle."""


@contextmanager
def no_longer_than(seconds: float) -> Iterator[None]:
    """Raise TooLongError in what is still at work, or waits at a pipe."""

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
    """Write what was tried to build/faults/TEST.json, if all faults were tried."""

    def keep(tried: dict[str, Any]) -> None:
        if share.is_all:
            OUTCOMES.mkdir(parents=True, exist_ok=True)
            path: Path = OUTCOMES / f"{request.node.name}.json"
            path.write_text(json.dumps({"seed": share.seed, **tried}, indent=2) + "\n")

    return keep
