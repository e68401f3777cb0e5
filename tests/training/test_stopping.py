"""When a rank saves and stops: by steps, by the clock, on a signal, and when its launcher is killed."""

import itertools
import os
import signal
import subprocess
import sys

import psutil
import pytest

from karat_scale.engine.distributed import ALONE
from karat_scale.training.agreement import STOP_SIGNALS, Agreement, SavePoints, StopSignals
from tests.clock import Clock
from tests.conftest import karat_done, summary
from tests.training.runs import start, wait_for_checkpoint


def test_a_rank_alone_hears_a_signal_after_each_step() -> None:
    clock, signals = Clock(), StopSignals()
    points = SavePoints(ALONE, signals, None, None, clock)
    for step in range(1, 100):
        clock.go(0.01)
        assert not points.decide(step).stop
    signals.received = signal.SIGTERM
    assert points.decide(100).stop


def test_saves_by_steps_and_by_minutes() -> None:
    for every_steps, expected in ((25, [25, 50, 75, 100]), (None, [30, 60, 90])):  # each 30 steps after the last save
        clock, saved = Clock(), []
        points = SavePoints(ALONE, StopSignals(), every_steps, 2.0, clock)
        for step in range(1, 101):
            clock.go(4.0)
            if points.decide(step).save:
                points.note_save()
                saved.append(step)
        assert saved == expected


def test_a_save_in_progress_continues_when_no_rank_is_busy() -> None:
    points = SavePoints(ALONE, StopSignals(), None, None, Clock())
    assert not points.decide(1, is_busy=True).is_idle
    assert points.decide(2, is_busy=False).is_idle


@pytest.mark.parametrize(("pace", "fewest", "most"), [(0.001, 10, 22), (0.01, 10, 19), (0.4, 10, 15), (3.0, 3, 4)])
def test_agreements_come_about_once_a_second(pace, fewest, most) -> None:
    clock = Clock()
    agreement, asked, step = Agreement(ALONE, clock), 0, 0
    while clock.now < 110:
        step += 1
        clock.go(pace)
        asked += agreement.is_due(step)
        agreement.maxima(step, 0)
    assert fewest <= asked <= most  # in 10 seconds, the first of them after 1, 2, 4, ... steps


def test_a_pause_makes_the_next_stretch_short_and_no_later_one() -> None:
    clock = Clock()
    agreement, asked = Agreement(ALONE, clock), []
    for step in range(1, 2000):
        clock.go(60.0 if step == 1000 else 0.01)  # such as an evaluation
        if agreement.is_due(step):
            asked.append(step)
        agreement.maxima(step, 0)
    distances = [later - earlier for earlier, later in itertools.pairwise(asked)]
    assert max(distances) in (99, 100)
    assert distances.count(1) <= 3
    assert distances[-1] in (99, 100)


WAIT = """
import signal, sys, time
from karat_scale.training.agreement import StopSignals
signals = StopSignals().install()
print("ready", flush=True)
while True:
    time.sleep(0.01)
    if signals.received:
        print(signals.received.name, flush=True)
        time.sleep(30)
"""


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda s: s.name)
def test_a_signal_is_remembered_and_a_second_ctrl_c_quits_at_once(number) -> None:
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", WAIT], stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.stdout.readline() == f"{number.name}\n"
    if number == signal.SIGINT:
        assert process.stderr.readline() == "\n"
        assert process.stderr.readline() == "stopping: the state is saved first; Ctrl-C again quits at once\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=5) == 1
    else:
        assert process.poll() is None
        process.kill()
        process.wait()


COMPILE = """
import os, signal, subprocess, sys
from karat_scale.training.agreement import StopSignals
signals = StopSignals().install()
compiler = subprocess.Popen([sys.executable, "-c", "import sys; print('at work', flush=True); sys.stdin.read()"])
print("ready", flush=True)
code = compiler.wait()
print(code, signals.received.name, flush=True)
"""


def test_usr2_to_the_group_is_remembered_and_spares_a_compiler() -> None:
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", COMPILE], stdin=pipe, stdout=pipe, text=True, start_new_session=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert {process.stdout.readline(), process.stdout.readline()} == {"ready\n", "at work\n"}
    os.killpg(process.pid, signal.SIGUSR2)
    process.stdin.close()  # the compiler has nothing more to do
    assert process.stdout.readline() == "0 SIGUSR2\n"
    assert process.wait(timeout=5) == 0


@pytest.mark.slow
@pytest.mark.multiprocess
def test_ranks_stop_with_a_checkpoint_when_their_launcher_is_killed(recipe_file, tmp_path) -> None:
    run = tmp_path / "run"
    process = start(recipe_file, run, "train.epochs=5000", "checkpoint.every_steps=4", processes=2)
    wait_for_checkpoint(run, 4, process)
    ranks = psutil.Process(process.pid).children()
    assert len(ranks) == 2
    os.kill(process.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(ranks, timeout=60)
    for rank in alive:
        rank.kill()
    output, _ = process.communicate()
    assert not alive, output
    assert output.count("the launcher has ended; this rank stops, too") == 2
    assert "Traceback" not in output
    assert summary(run)["exit"] == 75
    steps = summary(run)["steps"]
    karat_done("train", str(recipe_file), f"run.dir={run}", "train.epochs=5000", f"train.max_steps={steps}")
