import json

import pytest

from karat_scale.engine.reporting.interval import StepProfiler
from karat_scale.engine.reporting.progress import PlainDisplay, Reporter
from tests.small_engines import equal, train_once, weights


@pytest.fixture
def train_three(make_engine, small_recipe, world):
    """Weights after three steps, in each of which a profiler may look on."""

    def train(profiler: StepProfiler, first: int = 1):
        engine = make_engine(small_recipe())
        for number in range(first, 4):
            with profiler.step(number):
                train_once(engine, seed=number)
        return weights(engine)

    return train


def test_the_chosen_steps_are_traced_and_change_nothing(train_three, world, tmp_path, capsys) -> None:
    reporter = Reporter(PlainDisplay(), None)
    plain = train_three(StepProfiler(None, tmp_path / "none", world, reporter))
    traced = train_three(StepProfiler((2, 3), tmp_path / "profile", world, reporter))
    assert equal(plain, traced)
    assert not (tmp_path / "none").exists()
    trace, table = sorted((tmp_path / "profile").iterdir())
    assert (trace.name, table.name) == ("rank-00000-steps-2-3.pt.trace.json", "rank-00000-steps-2-3.txt")
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert "aten::addmm" in names
    assert "aten::addmm" in table.read_text()
    lines = [line for line in capsys.readouterr().out.splitlines() if "profiled" in line]
    assert len(lines) == 1
    assert "profiled steps 2 to 3" in lines[0]


def test_a_run_that_resumes_in_the_middle_traces_the_rest(train_three, world, tmp_path) -> None:
    train_three(StepProfiler((1, 3), tmp_path, world, Reporter(PlainDisplay(), None)), first=3)
    assert (tmp_path / "rank-00000-steps-3-3.txt").is_file()


def test_a_trace_that_cannot_be_written_is_a_warning(train_three, world, tmp_path, capsys) -> None:
    (tmp_path / "profile").write_text("in the way")
    train_three(StepProfiler((1, 1), tmp_path / "profile", world, Reporter(PlainDisplay(), None)))
    assert "warning: profile of steps 1 to 1 not written" in capsys.readouterr().out
