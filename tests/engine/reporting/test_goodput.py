"""Tests of how the wall time of a run is divided."""

import pytest

from karat_scale.engine.reporting.goodput import PARTS, Stopwatch, WallTime, wall_time


def start(began: float, step: int = 0, **more: object) -> dict[str, object]:
    event = {"event": "start", "began": began, "anew": step == 0, "submitted": None, "last_sign": None}
    event |= {"started": began if more.get("submitted") else None}
    return {**event, "step": step, "time": began + 10, "spent": {"starting": 10.0}, **more}


def event(kind: str, time: float, step: int, training: float, saving: float = 0, **more: object) -> dict[str, object]:
    spent = {"starting": 10.0, "training": training, "saving": saving}
    return {"event": kind, "time": time, "step": step, "spent": spent, **more}


KILLED = (
    start(1000, submitted=400),
    event("train", 1050, 5, 40),
    event("checkpoint", 1060, 5, 48, 2, seconds=10, stall_seconds=2),
    event("train", 1110, 10, 98, 2),
)


def test_what_came_after_the_checkpoint_is_lost_and_the_rest_is_time_in_the_queue() -> None:
    ended = event("end", 2060, 10, 49, 1, exit=0)
    found = wall_time([*KILLED, start(2000, 5, last_sign=1112, submitted=400), ended])
    assert found.seconds == 2060 - 400 == pytest.approx(sum(found.parts.values()))
    assert found.parts["queue"] == 600 + (2000 - 1112)
    assert found.parts["lost"] == 98 - 40 + 2
    assert found.parts["training"] == 40 + 49
    assert found.parts["starting"] == 20
    assert str(WallTime({**dict.fromkeys(PARTS, 0.0), "training": 99.7}, 100.0)).endswith("training 100 %")
    assert str(found) == "27 min 40 s: training 5.4 %, saving 0.18 %, starting 1.2 %, lost 3.6 %, queue 90 %"


def test_a_restart_in_the_same_job_is_not_in_the_queue() -> None:
    first = {**KILLED[0], "started": 960}
    found = wall_time([first, *KILLED[1:], start(2000, 5, last_sign=1112, submitted=400, started=960)])
    assert found.parts["queue"] == 560
    assert found.parts["starting"] == 40 + 10 + (2000 - 1112) + 10
    assert found.seconds == 2010 - 400 == pytest.approx(sum(found.parts.values()))


@pytest.mark.parametrize(("submitted", "queue"), [(1500, 500), (None, 0)])
def test_time_without_a_job_does_not_count(submitted, queue) -> None:
    found = wall_time([*KILLED, start(2000, 5, last_sign=1112, submitted=submitted)])
    assert found.parts["queue"] == 600 + queue
    assert found.seconds == (1112 - 400) + queue + 10 == pytest.approx(sum(found.parts.values()))


def test_a_run_that_was_never_saved_loses_all_its_work_and_one_that_begins_anew_has_none():
    again = {**start(2000), "anew": False}
    found = wall_time([*KILLED, again])
    assert (found.parts["lost"], found.parts["training"], found.parts["starting"]) == (100, 0, 20)
    assert wall_time([*KILLED, start(2000)]).seconds == 10
    ended = event("end", 1120, 10, 108, 2, exit=0)
    found = wall_time([*KILLED, ended, start(9000, 10), event("end", 9011, 10, 1, exit=0)])
    assert found.seconds == 720 + 11 == sum(found.parts.values())


def test_a_run_that_goes_on_has_spent_its_time_until_the_last_sign_and_lies_are_skipped() -> None:
    lies = [{}, {**KILLED[1], "time": "x"}, {**KILLED[1], "spent": {"training": "x"}}, {**KILLED[0], "began": None}]
    found = wall_time([*lies, *KILLED, *lies])
    found.reach(1115, "evaluating")
    assert (found.parts["evaluating"], found.parts["training"]) == (5, 98)


def test_a_stopwatch_divides_all_the_time_of_its_process() -> None:
    watch = Stopwatch()
    for doing in ("waiting for data", "forward", "snapshot"):
        watch.begin(doing)
    spent = watch.read()
    assert spent.keys() == {"starting", "waiting for data", "training", "saving"}
    assert spent["starting"] > 0.1
