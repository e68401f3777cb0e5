"""The choice of the tests that run, and their distribution to processes. tests/conftest.py has the rules."""

import zlib
from collections import Counter
from typing import Any

import pytest

TURNS = 12
TOGETHER = "tests/slurm/"  # one cluster serves all of these
TRAINS = {"multiprocess", "recipe_file", "train_recipe"}  # a marker and fixtures of tests that start a training


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--slow` and `--turn`, and the two options of tests/faults."""
    parser.addoption("--slow", choices=("none", "all"), default="none", help="whether slow tests run beside all others")
    parser.addoption("--turn", type=int, metavar="N", help="run only the slow tests whose turn is N")
    parser.addoption("--faults", choices=("few", "all"), default="few", help="how many faults tests/faults tries")
    parser.addoption(
        "--seed", type=int, metavar="N", help="which faults tests/faults tries (default: those of the turn)"
    )


@pytest.hookimpl(trylast=True)  # after conftests that mark tests slow
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests that were not asked for, unless the command line names a test by `file::test`."""
    slow, turn = config.getoption("--slow"), config.getoption("--turn")
    if any("::" in argument for argument in config.args):
        return
    left_out = [item for item in items if not runs(item, slow == "all", turn)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if runs(item, slow == "all", turn)]
    if hasattr(config, "workerinput"):  # a worker of pytest-xdist
        items[:] = longest_files_first(items)


def runs(item: pytest.Item, everything: bool, turn: int | None) -> bool:
    """Return whether these options select a test."""
    slow, night = (item.get_closest_marker(name) is not None for name in ("slow", "night"))
    if turn is not None:
        return slow and not night and turn_of(item) == turn % TURNS
    return everything or not (slow or night)


def turn_of(item: pytest.Item) -> int:
    """Return a slow test's turn.

    Tests of a file with `slow(together=True)` share a fixture, so they share a turn. `slow(turn=N)` names the turn, so
    that many long tests alike are spread evenly.
    """
    said = {key: value for marker in item.iter_markers("slow") for key, value in marker.kwargs.items()}
    if "turn" in said:
        return int(said["turn"])
    name = scope(item.nodeid) if said.get("together") else item.nodeid
    # A hash and not a position: a test keeps its turn when others are added, removed or renamed.
    return zlib.crc32(name.encode()) % TURNS


def longest_files_first(items: list[pytest.Item]) -> list[pytest.Item]:
    """Return the tests with the files first that train most often, so that short files fill the gaps at the end."""
    trains = Counter(scope(item.nodeid) for item in items if TRAINS & {*item.keywords, *item.fixturenames})
    return sorted(items, key=lambda item: -trains[scope(item.nodeid)])


def scope(nodeid: str) -> str:
    """Return what runs in one process: a file, or the tests that share a cluster."""
    return TOGETHER if nodeid.startswith(TOGETHER) else nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)  # pytest-xdist's, which need not be installed
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep the tests of a file together, so that its fixtures are made once, and the tests that share a cluster."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return scope(nodeid)

    config.option.loadscopereorder = False  # not by the number of tests: the order is that of `longest_files_first`
    return ByFile(config, log)
