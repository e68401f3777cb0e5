"""Tests of what workers do when they, their trainer or all of them are signalled or killed."""

import ctypes
import gc
import itertools
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest
import torch

from karat_scale.data.backends import ImageSpec, open_backend
from karat_scale.data.loading import workers as loading
from karat_scale.data.loading.workers import OrderedResults, kill_workers, start_worker
from karat_scale.data.plan import BatchSlice, TrainPlan
from karat_scale.foundation.errors import DataError, RecipeError
from karat_scale.foundation.machine import STOP_SIGNALS
from karat_scale.recipe import AugmentConfig, DataConfig
from tests.compilers import needs_c_compiler
from tests.conftest import run_to_end, wait_until
from tests.data.backends.helpers import all_ended_since, children, running
from tests.warm import PROCESSES


@pytest.fixture
def begun(opened, make_shards, cheap_augment):
    """Return a function that starts a backend; it returns the backend, its batches after the first, and its workers."""

    def begin(workers):
        before = children()
        backend = opened(make_shards(), cheap_augment, workers=workers)
        batches = backend.train_batches(TrainPlan(0, 40, 8, 8, 0, 1).slices(0, 10**6))
        next(batches)
        return backend, batches, children() - before

    return begin


def test_a_worker_that_nothing_ends_does_not_keep_its_trainer(monkeypatch):
    worker = start_worker(0, time.sleep, 600)
    with monkeypatch.context() as patch:  # as in a system call on a dead mount
        patch.setattr(type(worker._popen), "_send_signal", lambda *_: None)
        kill_workers([worker], os.getpid())
    assert worker.is_alive()
    assert worker not in multiprocessing.active_children()  # Python waits for these at its end
    worker.kill()
    worker.join()


# It acts like a thread of gloo, which has no state in Python until it frees a tensor that Python knows.
FOREIGN_THREAD = """
typedef struct _ts state;
extern state *PyThreadState_New(void *);
extern void PyThreadState_Delete(state *);
void come_and_go(void *interpreter, volatile int *ended) {
    for (volatile unsigned pause = 0; !*ended; ++pause)
        if (pause % 1000 == 0) PyThreadState_Delete(PyThreadState_New(interpreter));
}
"""


@needs_c_compiler
def test_a_worker_that_hangs_in_its_fork_is_replaced(monkeypatch, tmp_path):
    (tmp_path / "foreign.c").write_text(FOREIGN_THREAD)
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", tmp_path / "foreign.so", tmp_path / "foreign.c"], check=True)
    come_and_go = ctypes.CDLL(str(tmp_path / "foreign.so")).come_and_go
    interpreter = ctypes.pythonapi.PyInterpreterState_Get
    interpreter.restype = ctypes.c_void_p
    ended = ctypes.c_int(0)
    thread = threading.Thread(target=come_and_go, args=(ctypes.c_void_p(interpreter()), ctypes.byref(ended)))
    hung: list[ForkProcess] = []
    monkeypatch.setattr(loading, "_PATIENCE", (0.3,) * 100)
    monkeypatch.setattr(ForkProcess, "kill", lambda process: (hung.append(process), BaseProcess.kill(process)))
    thread.start()
    try:
        for _ in range(1000):
            results = OrderedResults(abs, range(9), 1, 2, 60.0, str)
            if hung:
                break
        else:
            pytest.skip("this Python's forks do not hang")
    finally:
        ended.value = 1
        thread.join()
    assert list(results) == list(range(9))


@pytest.mark.parametrize("stopped", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_closing_ends_the_workers_and_the_iterators(begun, stopped):
    backend, batches, workers = begun(2)
    assert len(workers) == 2
    if stopped:
        os.kill(min(workers), signal.SIGSTOP)
    backend.close()
    wait_until(lambda: not any(map(running, workers)))
    assert next(batches, None) is None


def test_a_killed_worker_is_one_clear_error(begun):
    _, batches, (worker,) = begun(1)
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(DataError, match=r"a data worker died .*lower data.workers"):
        for _ in batches:
            pass


class Finalized:
    """An object that only the garbage collector frees, and that notes in which process this happened."""

    def __init__(self) -> None:
        self.itself, self.found_in = self, FOUND_IN

    def __del__(self) -> None:
        self.found_in.append(os.getpid())


FOUND_IN: list[int] = []


def collected(part: BatchSlice) -> int:
    gc.collect()
    return len(FOUND_IN)


def test_a_worker_does_not_finalize_objects_of_the_trainer():
    """Before the fix, a worker that finalized an object of a library with its own threads ended by SIGSEGV.

    The fork does not have these threads.
    """
    gc.collect()
    gc.disable()
    try:
        Finalized()
        results = OrderedResults(collected, TrainPlan(0, 40, 8, 8, 0, 1).slices(0, 10), 1, 2, 60.0, str)
        assert next(results) == 0
        results.close()
    finally:
        gc.enable()
    gc.collect()
    assert os.getpid() in FOUND_IN


def test_a_small_part_of_a_tensor_is_sent_without_the_rest() -> None:
    whole = torch.arange(10**6)
    sent = loading._answer(lambda part: [whole[part:5], {"y": torch.eye(2).to_sparse()}], 3)
    assert len(sent) < 10_000
    part, others = pickle.loads(sent)
    assert part.tolist() == [3, 4]
    assert torch.equal(others["y"].to_dense(), torch.eye(2))


def test_a_child_that_hangs_or_is_interrupted_before_it_begins_is_left_behind_by_nothing(monkeypatch) -> None:
    before = children()
    monkeypatch.setattr(loading, "_PATIENCE", ())
    with pytest.raises(DataError, match=r"data.workers = 1: .* hung before its first line\); start again"):
        OrderedResults(abs, range(9), 1, 2, 60.0, str)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loading, "_PATIENCE", (60.0,))
    monkeypatch.setattr(loading.connection, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loading.start_worker(0, time.sleep, 60)
    wait_until(lambda: all_ended_since(before))


def die(part: BatchSlice) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("is_closed", [True, False])
def test_a_worker_that_dies_at_work_does_not_hang_the_trainer(is_closed: bool):
    before = children()
    slices = TrainPlan(0, 40, 8, 8, 0, 1).slices(0, 10)
    results = OrderedResults(die, slices, 1, 2, 60.0, lambda workers: "nowhere")
    if is_closed:
        with pytest.raises(DataError, match=r"a data worker died \(exit code -9\)"):
            next(results)
    else:
        wait_until(lambda: any(psutil.Process(child).status() == "zombie" for child in children() - before))
        del results
    wait_until(lambda: all_ended_since(before))


class UnsendableError(Exception):
    def __init__(self, reason: str, number: int) -> None:
        super().__init__(f"{reason} {number}")


@pytest.mark.parametrize(
    ("error", "type_", "text"), [(KeyError("a"), KeyError, "^'a'$"), (UnsendableError("odd", 3), RuntimeError, "odd 3")]
)
def test_an_error_in_a_worker_is_raised_with_its_stack_after_the_results_before_it(
    error: Exception, type_: type, text: str
):
    def work(number: int) -> int:
        if number == 3:
            raise error
        return number

    results = OrderedResults(work, range(9), 2, 2, 60.0, str)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(type_, match=text) as caught:
        next(results)
    assert "in work" in str(caught.value.__cause__)
    assert next(results, None) is None


@pytest.mark.timeout(60)
def test_neither_long_slices_nor_long_results_keep_a_worker_from_working_ahead(tmp_path: Path) -> None:
    """The slices and the results are longer than what a pipe holds, and still four are made ahead."""

    def work(part: bytes) -> bytes:
        with (tmp_path / "made").open("ab") as made:
            made.write(b"1")
        return part

    results = OrderedResults(work, itertools.repeat(bytes(10**6)), 1, 4, 60.0, str)
    wait_until(lambda: (tmp_path / "made").exists() and (tmp_path / "made").stat().st_size == 4)
    assert [len(part) for part in itertools.islice(results, 9)] == [10**6] * 9


def test_far_more_workers_than_cores_of_the_control_group_are_refused_before_one_is_forked(monkeypatch):
    before = children()
    with pytest.raises(RecipeError, match=r"data.workers = 5000 processes for each rank, .* at most \d+$"):
        OrderedResults(abs, range(9), 5000, 1, 30.0, str)
    wait_until(lambda: all_ended_since(before))
    monkeypatch.setattr(loading, "usable_cores", lambda: 1)  # as under a quota of one core
    loading.check_worker_count(36)
    with pytest.raises(RecipeError, match=r"data.workers = 37 processes .* here are 1; use about 1, at most 36"):
        loading.check_worker_count(37)


def train_until_told(directory: str, line: Connection) -> None:
    """Train with two workers, and report each signal through `line`."""
    os.setpgid(0, 0)
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: line.send("signal"))
    spec = ImageSpec(DataConfig(path=directory, workers=2), AugmentConfig(), 16, 3, 0)
    batches = open_backend(spec).train_batches(TrainPlan(0, 40, 8, 8, 0, 1).slices(0, 400))
    next(batches)
    line.send(sorted(children()))
    line.recv()
    line.send(sum(1 for _ in itertools.islice(batches, 40)))
    line.recv()


def is_prepared(pid: int) -> bool:
    """Return whether a worker blocks SIGTERM, which it does after it has set up the other signals."""
    blocked = re.search(r"SigBlk:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return blocked is not None and bool(int(blocked[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.multiprocess
def test_workers_ignore_signals_to_the_process_group_and_exit_when_the_parent_is_killed(make_shards):
    line, theirs = PROCESSES.Pipe()
    process = PROCESSES.Process(target=train_until_told, args=(str(make_shards()), theirs))
    process.start()
    workers = line.recv()
    assert len(workers) == 2
    wait_until(lambda: all(map(is_prepared, workers)))  # only one of them has made the first batch
    for number in STOP_SIGNALS:
        os.killpg(process.pid, number)
        assert line.recv() == "signal"
    line.send("go on")
    assert line.recv() == 40
    assert all(running(pid) for pid in workers)
    os.kill(workers[0], signal.SIGSTOP)  # a stopped worker must end, too
    process.kill()
    process.join()
    wait_until(lambda: not any(running(pid) for pid in workers))


def test_a_worker_whose_trainer_died_before_it_looked_leaves() -> None:
    gone = multiprocessing.get_context("fork").Process(target=int)
    gone.start()
    gone.join()
    assert gone.pid is not None
    _ours, theirs = multiprocessing.Pipe(duplex=False)
    told = gone.pid, True, 0, theirs, time.sleep, 60
    worker = multiprocessing.get_context("fork").Process(target=loading._run, args=told)
    worker.start()
    worker.join(30)
    assert worker.exitcode == 0


FOUR = """
    from karat_scale.data.loading.workers import OrderedResults
    from karat_scale.foundation.machine import usable_cores

    print(list(OrderedResults(abs, [-1, -2, -3, -4], usable_cores() + 1, 1, 30.0, str)))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="another view of /dev/shm needs root")
def test_workers_need_no_dev_shm_and_say_nothing_of_their_number() -> None:
    """Workers print nothing if there are more of them than cores, because `karat doctor` reports that."""
    mount = 'mount -t tmpfs -o ro tmpfs /dev/shm && exec "$0" -c "$1"'
    done = run_to_end("unshare", "-m", "sh", "-c", mount, sys.executable, textwrap.dedent(FOUR))
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip("this machine allows no mount of one's own")
    assert (done.stdout, done.stderr) == ("[1, 2, 3, 4]\n", "")
