"""Tests of which tests the options select: twelve turns run every slow test once."""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

from tests import test_readme
from tests.conftest import ROOT, output_of
from tests.selection import TURNS, longest_files_first, runs

TESTS = """
import pytest

def test_quick(): pass

@pytest.mark.slow
@pytest.mark.parametrize("number", range(20))
def test_slow(number): pass

@pytest.mark.slow(together=True)
@pytest.mark.parametrize("number", range(9))
def test_of_one_fixture(number): pass

@pytest.mark.parametrize("number", [pytest.param(n, marks=pytest.mark.slow(turn=n % 12)) for n in range(24)])
def test_spread_evenly(number): pass

@pytest.mark.night
def test_night(): pass
"""
PROMISED = (test_readme.test_imagenet_in_three_steps, test_readme.test_other_commands_by_example)
TOGETHER = {f"test_of_one_fixture[{number}]" for number in range(9)}
EVEN = {f"test_spread_evenly[{number}]" for number in range(24)}
SLOW = TOGETHER | EVEN | {f"test_slow[{number}]" for number in range(20)}


@pytest.fixture
def select(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that lets pytest collect tests, and returns the selected and the deselected ones."""
    (tmp_path / "conftest.py").write_text("from tests.selection import pytest_addoption, pytest_collection_modifyitems")
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nmarkers =\n  slow:\n  night:\n  multiprocess:\naddopts = --import-mode=importlib\n"
    )
    (tmp_path / "test_some.py").write_text(TESTS)
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.chdir(tmp_path)

    class Seen:
        left_out: tuple[pytest.Item, ...] = ()

        def pytest_collection_finish(self, session: pytest.Session) -> None:
            self.items = session.items

        def pytest_deselected(self, items: list[pytest.Item]) -> None:
            self.left_out = tuple(items)

    def run(*arguments: str) -> Seen:
        seen = Seen()
        pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments], plugins=[seen])
        return seen

    return run


def names(items: Iterable[pytest.Item]) -> list[str]:
    return [item.name for item in items]


@pytest.mark.slow
def test_slow_tests_run_when_asked_for(select) -> None:
    assert set(names(select("--slow=all").items)) == {"test_quick", *SLOW, "test_night"}
    assert names(select().items) == ["test_quick"]
    assert names(select("test_some.py::test_night").items) == ["test_night"]


@pytest.mark.parametrize("test", PROMISED)
def test_what_the_readme_promises_first_runs_each_time(test: Callable[..., None]) -> None:
    assert not {"slow", "night"} & {mark.name for mark in getattr(test, "pytestmark", [])}


def test_twelve_turns_in_a_row_run_each_slow_test_once(select) -> None:
    seen = select("--turn=507")
    items = [*seen.items, *seen.left_out]
    assert set(names(items)) == {"test_quick", *SLOW, "test_night"}
    turns = {turn: names(item for item in items if runs(item, False, turn)) for turn in range(507, 507 + TURNS)}
    assert sorted(names(seen.items)) == sorted(turns[507])
    assert Counter(name for chosen in turns.values() for name in chosen) == dict.fromkeys(SLOW, 1)
    assert sum(not TOGETHER.isdisjoint(chosen) for chosen in turns.values()) == 1
    assert all(len(EVEN.intersection(chosen)) == 2 for chosen in turns.values())


def test_files_that_train_come_first_and_keep_their_order(select, tmp_path: Path) -> None:
    trains = "import pytest\n@pytest.mark.multiprocess\ndef test_train(): pass\ndef test_quick_too(): pass\n"
    (tmp_path / "test_zz.py").write_text(trains)
    items = select().items
    assert names(items) == ["test_quick", "test_train", "test_quick_too"]
    assert names(longest_files_first(items)) == ["test_train", "test_quick_too", "test_quick"]


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="runs in a worker of pytest-xdist")
def test_a_worker_computes_with_one_thread() -> None:
    assert torch.get_num_threads() == 1
    program = "import torch; print(torch.get_num_threads())"
    assert output_of(sys.executable, "-c", program, env=None) == "1\n"
