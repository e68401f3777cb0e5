"""When a rank saves and stops: by steps, by the clock, on a signal, and when its launcher is killed."""

import itertools
import math
import os
import re
import signal
import subprocess
import sys

import psutil
import pytest

from karat_scale.engine.distributed import ALONE, World
from karat_scale.engine.reporting.goodput import PARTS, WallTime
from karat_scale.training.agreement import LEAST_SECONDS, MOST_STEPS, Agreement, BestInterval, SavePoints, StopSignals
from tests.clock import Clock
from tests.conftest import karat_done, output_of, summary
from tests.small_engines import make_trainer
from tests.training.runs import start_torchrun, wait_for_checkpoint


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


def test_saves_on_each_node_come_ten_times_as_often() -> None:
    for every_steps, expected in ((25, range(2, 25, 2)), (None, range(3, 28, 3))):
        clock, saved = Clock(), []
        points = SavePoints(ALONE, StopSignals(), every_steps, 2.0, clock)
        for step in range(1, 31):
            clock.go(4.0)
            decision = points.decide(step)
            if decision.save:
                points.note_save()
                break
            if decision.save_near:
                points.note_save(near=True)
                saved.append(step)
        assert saved == list(expected)


def test_the_chosen_interval_costs_less_than_shorter_and_longer_ones() -> None:
    running, failures = 9 * 3600.0, 4
    parts = {**dict.fromkeys(PARTS, 0.0), "training": running, "queue": 7000.0}
    before = WallTime(parts, running + 7000.0)
    before.failures = failures
    between = (running + 86400) / (failures + 1)
    for stall in (0.5, 20.0):
        interval = BestInterval(before, Clock())
        minutes, said = interval.choose(stall, 3 * stall)

        def cost(seconds: float, stall: float = stall) -> float:
            """Return the time spent for a second of training, with saves and repeated work, if failures are random."""
            share = (seconds + stall) / between
            return between * math.expm1(share) / seconds

        assert cost(60 * minutes) < min(cost(50 * minutes), cost(72 * minutes))
        assert f"training waits {stall:g} s for one and a failure is expected every 6 h" in said
        assert interval.choose(stall * 1.1, 3 * stall)[1] == ""  # about as before
    assert BestInterval(before, Clock()).choose(1e-6, 0.01)[0] == LEAST_SECONDS / 60
    assert BestInterval(before, Clock()).choose(0.01, 600.0)[0] == 20.0  # no save can follow sooner


def test_a_run_chooses_how_often_to_save_and_says_so(small_recipe, world, capsys) -> None:
    own = ("checkpoint.every=auto", "checkpoint.every_steps=2", "checkpoint.asynchronous=false", "data.workers=0")
    trainer = make_trainer(small_recipe(*own), world)
    try:
        trainer.run()
    finally:
        trainer.task.close()
    said = capsys.readouterr().out
    assert re.search(
        r"checkpoint.every = auto: saves every .* (s|min), as training waits [\d.e-]+ s for one and a fail", said
    )
    assert "is expected every 1 d\n" in said


def test_a_save_in_progress_continues_when_no_rank_is_busy() -> None:
    points = SavePoints(ALONE, StopSignals(), None, None, Clock())
    assert not points.decide(1, is_busy=True).is_idle
    assert points.decide(2, is_busy=False).is_idle


@pytest.mark.parametrize(("pace", "fewest", "most"), [(0.001, 10, 22), (0.01, 10, 19), (0.4, 10, 15), (3.0, 3, 4)])
def test_agreements_come_about_once_a_second(pace, fewest, most) -> None:
    clock = Clock()
    agreement, asked, step = Agreement(ALONE, clock), [], 0
    while clock.now < 110:
        step += 1
        clock.go(pace)
        if agreement.is_due(step):
            asked.append(step)
        agreement.maxima(step, 0)
    assert fewest <= len(asked) <= most  # in 10 seconds
    assert pace > 0.1 or asked[:5] == [1, 2, 4, 8, 16]


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


class _Two(World):
    """The world of rank 0 of two ranks, where the other has no wishes."""

    def maxima(self, *values: int) -> list[int]:
        return list(values)


def test_of_several_ranks_none_waits_long_for_the_next_agreement_where_steps_become_slow() -> None:
    clock = Clock()
    agreement, asked = Agreement(_Two(0, 2, 0, ALONE.device), clock), []
    for step in range(1, 3000):
        clock.go(0.004 if step <= 2000 else 2.0)
        if agreement.is_due(step):
            asked.append(clock.now)
        agreement.maxima(step, 0)
    assert max(later - earlier for earlier, later in itertools.pairwise(asked)) <= 2.0 * MOST_STEPS


WAIT = """
import hashlib, subprocess, sys, time
from karat_scale.training.agreement import StopSignals
signals = StopSignals().install()
compiler = subprocess.Popen([sys.executable, "-c", "import sys; print('at work', flush=True); sys.stdin.read()"])
print("ready", flush=True)
while compiler.poll() is None:
    time.sleep(0.01)
    if signals.received:
        name, signals.received = signals.received.name, None  # before the test hears of it and sends the next one
        print(name, flush=True)
print(compiler.returncode, flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes in a library
"""


def test_signals_are_remembered_spare_a_compiler_and_a_second_ctrl_c_quits_in_a_slow_operation() -> None:
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", WAIT], stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    assert {process.stdout.readline(), process.stdout.readline()} == {"ready\n", "at work\n"}
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP):
        process.send_signal(number)
        assert process.stdout.readline() == f"{number.name}\n"
    os.killpg(process.pid, signal.SIGUSR2)
    assert process.stdout.readline() == "SIGUSR2\n"
    process.stdin.close()  # the compiler has nothing more to do
    assert process.stdout.readline() == "0\n"
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)  # is answered although another signal came first
    told = "\nstopping: the state is saved first; Ctrl-C again quits at once\n"
    assert "".join(process.stderr.readline() for _ in range(2)) == told
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130


FORK = """
import os, signal, threading, time
from karat_scale.data.loading.workers import start_worker
from karat_scale.training.agreement import StopSignals
os.register_at_fork(after_in_child=lambda: time.sleep(0.5))
signals = StopSignals().install()
threading.Timer(0.2, os.killpg, (0, signal.SIGINT)).start()
start_worker(0, abs, 0).join()
while signals.received is None:
    time.sleep(0.01)
print(signals.received.name)
"""


def test_a_worker_that_only_begins_does_not_tell_of_ctrl_c_a_second_time() -> None:
    assert output_of(sys.executable, "-c", FORK, start_new_session=True, timeout=60) == "SIGINT\n"


UNREAD = """
import os, signal
from karat_scale.training import agreement
reader, writer = os.pipe()
os.close(reader)
os.dup2(writer, 2)  # as a terminal that was closed
class Gone:
    is_gone = True
agreement.LAUNCHER = Gone
signals = agreement.StopSignals()
signals._stop_with_launcher()
signals._remember(signal.SIGINT)
print(signals.received.name, flush=True)
signals._remember(signal.SIGINT)
"""


def test_a_rank_whose_messages_nobody_reads_stops_all_the_same() -> None:
    done = subprocess.run([sys.executable, "-c", UNREAD], stdout=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stdout) == (130, "SIGTERM\n")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_ranks_stop_with_a_checkpoint_when_their_launcher_is_killed(recipe_file, tmp_path) -> None:
    run = tmp_path / "run"
    process = start_torchrun(recipe_file, run, "train.epochs=5000", "checkpoint.every_steps=4")
    wait_for_checkpoint(run, 4, process)
    ranks = psutil.Process(process.pid).children()
    assert len(ranks) == 2
    os.kill(process.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(ranks, timeout=60)
    for rank in alive:
        rank.kill()
    output, _ = process.communicate()
    assert not alive, output
    assert "the launcher has ended; this rank stops, too" in output  # of one rank; the other may stop sooner
    assert "Traceback" not in output
    assert summary(run)["exit"] == 75
    steps = summary(run)["steps"]
    karat_done("train", str(recipe_file), f"run.dir={run}", "train.epochs=5000", f"train.max_steps={steps}")
