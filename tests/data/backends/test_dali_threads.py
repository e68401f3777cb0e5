"""The dali backend's threads, memory and whole runs."""

import gc
from pathlib import Path

import numpy as np
import psutil
import pytest

from karat_scale.data.backends.dali_pipeline import QUEUE_DEPTH
from karat_scale.data.plan import BatchSlice, EvalPlan, TrainPlan
from tests.data.backends.helpers import hollow, wait_until
from tests.training.runs import assert_a_kill_changes_nothing


def tasks() -> int:
    return psutil.Process().num_threads()


def test_no_more_batches_are_made_than_asked_for(make_shards, dali):
    # How many batches the reader has asked for, how many were fed, and by how many these were ahead at most.
    asked, fed, ahead = 0, 0, 0

    def slices():
        nonlocal fed, ahead
        for number in range(1000):
            fed, ahead = number + 1, max(ahead, number + 1 - asked)
            yield BatchSlice(0, number, np.arange(2))

    batches = dali(make_shards(), prefetch=3).train_batches(slices())
    for asked in range(1, 10):
        next(batches)
        wait_until(lambda wanted=asked + 3: fed >= wanted)
    assert ahead <= 1 + 3 + QUEUE_DEPTH  # a batch that is taken makes room before it is counted here


def test_closing_and_forgetting_end_the_threads_and_the_iterators(make_shards, dali, cheap_augment):
    directory = make_shards()
    list(dali(directory, cheap_augment, workers=3).train_batches(TrainPlan(0, 40, 8, 8, 0, 1).slices(0, 2)))
    gc.collect()
    before, files = tasks(), psutil.Process().num_fds()
    backend = dali(directory, cheap_augment, workers=3)
    batches = backend.train_batches(TrainPlan(0, 40, 8, 8, 0, 1).slices(0, 10**6))
    next(batches)
    forgotten = backend.eval_batches(EvalPlan(11, 2, 0, 1).slices())
    next(forgotten)
    assert tasks() > before
    del forgotten
    backend.close()
    gc.collect()
    assert next(batches, None) is None
    wait_until(lambda: tasks() <= before and psutil.Process().num_fds() <= files)


def resident_mb() -> float:
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:"))) / 1e3


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_killed_run_resumes_to_the_bits_of_an_uninterrupted_one(recipe_file: Path, tmp_path: Path) -> None:
    assert_a_kill_changes_nothing(recipe_file, tmp_path, "data.backend=dali")


def test_a_hundred_bad_batches_leave_nothing_behind(make_shards, make_sample, dali, cheap_augment):
    samples = [make_sample(i) for i in range(8)]
    samples[1] = hollow(1)
    backend = dali(make_shards(train=samples), cheap_augment, on_bad_sample="skip")
    slices = [BatchSlice(epoch, number, np.arange(2)) for epoch in range(2) for number in range(60)]
    after = []
    for number, batch in enumerate(backend.train_batches(slices)):
        assert batch.sample_ids.tolist() == [0, 2]
        if number in (20, 119):
            after.append((resident_mb(), tasks(), psutil.Process().num_fds()))
    (memory, threads_then, files), (memory_now, threads_now, files_now) = after
    # A pipeline that stayed would hold more than 10 MB; the tests before this one may give back or take a little.
    assert memory_now - memory < 100
    assert threads_now <= threads_then + 4  # one pipeline's, which may be on its way out
    assert files_now <= files
