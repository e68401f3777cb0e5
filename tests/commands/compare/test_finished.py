"""What a run's own files say about it."""

import json
from pathlib import Path

import pytest

from karat_scale.commands.compare.finished import _curve, _Event, read_run
from karat_scale.foundation.errors import UserError
from karat_scale.foundation.files import sealed
from tests.commands.compare.conftest import Copy, write_lines
from tests.conftest import events, summary


def test_a_trained_run_is_read_as_it_says(trained: Path) -> None:
    run = read_run(str(trained / "seed1"))
    said, evaluations = summary(trained / "seed1"), events(trained / "seed1", "eval")
    assert run.seed == 1
    assert len(run.curve) == 3
    assert [point.scores["top1"] for point in run.curve] == [event["top1"] for event in evaluations]
    for score in ("top1", "top5"):
        assert run.values[f"last_{score}"] == said[f"last_{score}"]
        assert run.values[f"best_{score}"] == said[f"best_{score}"]
    assert run.values["last_loss"] == evaluations[-1]["loss"]
    assert run.values["parameters"] == said["parameters"]
    assert run.budget[:5] == (24, 3.0, 64, 28, 4)
    first = events(trained / "seed1", "train")[0]
    seconds = evaluations[-1]["time"] - first["time"] + first["samples"] / (first["images_per_second"] or 1e9)
    assert run.values["hours"] * 3600 == pytest.approx(seconds, abs=0.01)


def test_the_time_between_two_starts_is_no_work_and_lost_evaluations_do_not_count(copy: Copy) -> None:
    run = copy("run")
    evaluated = {"event": "eval", "images": 28}
    lines = [
        {"event": "train", "step": 4, "time": 100.0, "samples": 32, "images_per_second": 16.0},
        {**evaluated, "step": 8, "time": 110.0, "samples": 64, "top1": 10.0, "top5": 90.0, "loss": 2.0},
        {**evaluated, "step": 16, "time": 120.0, "samples": 128, "top1": 99.0, "top5": 99.0, "loss": 0.1},
        {"event": "checkpoint", "step": 8, "time": 121.0},
        {"event": "resume", "step": 8, "time": 9000.0},
        {**evaluated, "step": 24, "time": 9030.0, "samples": 192, "top1": 20.0, "top5": 95.0, "loss": 1.5},
    ]
    write_lines(run, lines)
    said = summary(run)
    del said["sha256"]
    said |= {"last_top1": 20.0, "last_top5": 95.0, "best_top1": 20.0, "best_top5": 95.0, "best_step": 24}
    (run / "summary.json").write_text(json.dumps(said))
    read = read_run(str(run))
    assert [(point.step, point.hours * 3600) for point in read.curve] == [
        (8, pytest.approx(12.0)),
        (24, pytest.approx(52.0)),
    ]


def test_a_start_from_the_beginning_that_repeats_the_first_line_is_no_work_between() -> None:
    steps = [(1, 0.0), (1, 86400.0), (50, 86410.0)]
    lines = [_Event(event="train", step=step, time=time, samples=8 * step) for step, time in steps]
    assert _curve(lines, ())[1] * 3600 == pytest.approx(10)


def test_a_start_is_known_by_its_event_although_its_first_line_is_a_later_step() -> None:
    """Two minutes of work with a weekend between them, after an abandoned start with an evaluation."""
    lines = [
        _Event(event="start", step=0, time=0.0, anew=True),
        _Event(event="train", step=30, time=3e5, samples=240, images_per_second=0.001),
        _Event(event="eval", step=40, time=3e5 + 5, samples=320, top1=5.0),
        _Event(event="start", step=0, time=4e5, anew=True),
        _Event(event="eval", step=15, time=4e5 + 60, samples=120, top1=7.0),
        _Event(event="start", step=0, time=6e5),
        _Event(event="train", step=50, time=6e5 + 9, samples=400, images_per_second=10.0),
        _Event(event="eval", step=100, time=6e5 + 29, samples=800, top1=50.0),
    ]
    curve, hours = _curve(lines, ("top1",))
    assert [(point.step, point.scores["top1"]) for point in curve] == [(15, 7.0), (100, 50.0)]
    assert hours * 3600 == pytest.approx(60 + 40 + 20)


def rewrite(run: Path, **fields: object) -> None:
    """Write the summary that the run would have written with other fields."""
    (run / "summary.json").write_text(json.dumps(sealed({**summary(run), **fields})))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda run: (run / "summary.json").unlink(), "has no summary.json"),
        (lambda run: (run / "summary.json").write_text("{"), "damaged"),
        (lambda run: rewrite(run, train_images="x"), "damaged: train_images = 'x': should be a whole number"),
        (lambda run: (run / "recipe.yaml").unlink(), "not a run directory"),
        (lambda run: rewrite(run, exit=75, reason="stopped by SIGTERM"), r"has not finished \(stopped by SIGTERM\)"),
        (lambda run: rewrite(run, best_step=None), "was never evaluated"),
        (lambda run: (run / "metrics.jsonl").unlink(), "has no evaluation of this run"),
        (lambda run: (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text() + "# \n"), "has begun again"),
        (lambda run: (run / "summary.json").write_text(json.dumps({**summary(run), "steps": 5})), "was changed"),
        (
            lambda run: write_lines(run, [{**line, "top1": 1.0} for line in events(run)]),
            "in metrics.jsonl: the run goes on, or a file was changed",
        ),
    ],
)
def test_a_run_that_is_not_whole_is_refused_in_one_line(damage, said: str, copy: Copy) -> None:
    run = copy("run")
    damage(run)
    with pytest.raises(UserError, match=said) as error:
        read_run(str(run))
    assert "\n" not in str(error.value)


def test_the_best_evaluation_may_be_of_the_run_that_this_one_branched_from(copy: Copy) -> None:
    run = copy("run", best_step=2, best_top1=77.0, best_top5=99.0)
    values = read_run(str(run)).values
    assert (values["best_top1"], values["best_top5"]) == (77.0, 99.0)
    assert "best_loss" not in values


def test_half_a_line_is_skipped_and_counted_and_a_loss_that_is_not_finite_is_left_out(copy: Copy) -> None:
    run = copy("run")
    write_lines(run, [{**line, "loss": None} if line["event"] == "eval" else line for line in events(run)])
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text('{"event": "train", "st\n' + text)
    read = read_run(str(run))
    assert len(read.curve) == 3
    assert "last_loss" not in read.values
    assert "1 damaged line" in read.damage
