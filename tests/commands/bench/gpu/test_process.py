"""A worker's process: what it tells is heard, and however it ends it does end."""

import sys
from typing import Any

import pytest

from karat_scale.commands.bench.gpu.process import HungError, run_process


def run(code: str, seconds: float = 60.0) -> tuple[str | None, list[tuple[str, Any]]]:
    heard: list[tuple[str, Any]] = []
    trouble = run_process([sys.executable, "-c", code], lambda kind, content: heard.append((kind, content)), seconds)
    return trouble, heard


def test_events_are_heard_among_other_lines() -> None:
    trouble, heard = run("""print('{"row": {"a": 1}}\\nchatter\\n12\\n{"notice": "half the batch"}')""")
    assert trouble is None
    assert heard == [("row", {"a": 1}), ("notice", "half the batch")]


def test_a_failure_is_told_with_the_last_lines_of_standard_error() -> None:
    trouble, _ = run("import sys; print('reason', file=sys.stderr); sys.exit(3)")
    assert trouble == "exit code 3\nreason"


def test_a_process_that_takes_too_long_is_ended_and_what_it_told_is_kept() -> None:
    heard: list[tuple[str, Any]] = []
    code = """print('{"row": 1}', flush=True); import time; time.sleep(60)"""
    with pytest.raises(TimeoutError, match="it was stopped after 0 s"):
        run_process([sys.executable, "-c", code], lambda kind, content: heard.append((kind, content)), 0.5)
    assert heard in ([("row", 1)], [])  # it may not have begun


WATCHED = """
import threading, time
from karat_scale.commands.bench.gpu.process import Channel
from karat_scale.commands.bench.gpu.watch import watch

def lock_twice():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()

def compute():
    ends = time.monotonic() + 8
    while time.monotonic() < ends:
        sum(range(10**5))

watch(Channel(1), "cpu", 5)
"""


def test_a_process_that_waits_for_ever_is_hung_and_its_stack_is_told() -> None:
    with pytest.raises(HungError) as error:
        run_process([sys.executable, "-c", WATCHED + "lock_twice()"], lambda kind, content: None, 60, hung=5)
    first, *stack = str(error.value).splitlines()
    assert first == "hung: it has not moved for 5 s"
    assert stack[-1].endswith("in lock_twice")


@pytest.mark.slow
def test_a_process_that_works_is_not_hung() -> None:
    assert run_process([sys.executable, "-c", WATCHED + "compute()"], lambda kind, content: None, 60, hung=5) is None
