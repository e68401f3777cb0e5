"""Tests of what all backends do alike, whatever library reads and decodes.

The libraries' own readers behave differently. FFCV's pads with duplicates, and DALI's varies an epoch's length.
webdataset's gives each rank the same shards in each epoch. It gives ranks epochs of different lengths, and workers
without a shard no samples. FFCV's and webdataset's refuse other orders under several ranks. FFCV's batches are views of
a ring buffer, and its Loader changes torch's threads and draws from global generators.
"""

import contextlib
import os
import random
import threading
from functools import partial

import numpy as np
import pytest
import torch

from karat_scale.data.backends import ImageSpec, open_backend
from karat_scale.data.plan import PADDING, BatchSlice, EvalPlan, TrainPlan
from karat_scale.foundation.errors import DataError
from karat_scale.recipe import AugmentConfig
from tests.conftest import ROOT, karat_environment, wait_until
from tests.data.backends.helpers import SIZE, all_ended_since, broken, children, contents, flip
from tests.data.betons import make_betons
from tests.training.runs import assert_a_kill_changes_nothing
from tests.warm import run_code

SAMPLES, SHARDS = 43, 6  # the last one holds three
WORLD, EPOCHS, WORKERS = 3, 2, 7  # more workers than shards, and than cores


@pytest.fixture(params=["webdataset", "ffcv", "dali"])
def backend(request) -> str:
    if request.param == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed: pip install -e '.[dali]'")
    return request.param


@pytest.fixture
def lay_out(backend, make_shards, opened):
    """Return a function that writes samples as the backend reads them.

    It returns their directory, and a function that opens the backend over it.
    """

    def make(train=None, val=None):
        directory = make_shards(train, val)
        if backend == "ffcv":
            directory = make_betons(directory)
        return directory, partial(opened, directory, backend=backend)

    return make


@pytest.mark.parametrize("order", ["full", "block"])
def test_each_epoch_is_every_sample_once_in_equal_parts(lay_out, make_sample, order):
    policy = {"order": order, "block_samples": 4, "window_blocks": 2}
    _, open_it = lay_out(train=[make_sample(i) for i in range(SAMPLES)])

    def epochs(backend, rank: int, world: int):
        plan = TrainPlan(5, SAMPLES, 12, 12 // world, rank, world, **policy)
        batches = list(backend.train_batches(plan.slices(0, EPOCHS * plan.steps_per_epoch)))
        return plan, [[batch for batch in batches if batch.epoch == epoch] for epoch in range(EPOCHS)]

    plan, whole = epochs(open_it(workers=WORKERS, **policy), 0, 1)
    backend = open_it(**policy)
    ranks = [epochs(backend, rank, WORLD)[1] for rank in range(WORLD)]
    for epoch in range(EPOCHS):
        assert [len(rank[epoch]) for rank in ranks] == [len(whole[epoch])] * WORLD == [3] * WORLD
        seen = torch.cat([batch.sample_ids for batch in whole[epoch]]).tolist()
        assert len(set(seen)) == 36
        assert seen == plan.epoch_order(epoch)[:36].tolist()
        for step, together in enumerate(whole[epoch]):
            parts = [rank[epoch][step] for rank in ranks]
            assert torch.equal(torch.cat([part.sample_ids for part in parts]), together.sample_ids)
            assert torch.equal(torch.cat([part.labels for part in parts]), together.labels)
            assert torch.equal(torch.cat([part.images for part in parts]), together.images)
            assert tuple(draw for part in parts for draw in part.draws) == together.draws
    for rank in ranks:
        first, second = ({int(i) for batch in epoch for i in batch.sample_ids} for epoch in rank)
        assert first != second
        # More shards than a rank's share of them.
        assert len({i // 8 for i in first | second}) > SHARDS // WORLD
    assert contents(backend.train_batches(plan.slices(2, 6))) == contents([*whole[0], *whole[1]][2:])


def test_evaluation_has_equal_parts_and_counts_each_image_once(lay_out):
    _, open_it = lay_out()
    ids, backend = [], open_it(workers=1)
    for rank in range(WORLD):
        batches = list(backend.eval_batches(EvalPlan(11, 3, rank, WORLD).slices()))
        assert len(batches) == 2
        for batch in batches:
            ids += batch.sample_ids[batch.valid].tolist()
            assert not batch.images[~batch.valid].any()
            assert not batch.labels[~batch.valid].any()
    assert sorted(ids) == list(range(11))


def test_batches_hold_what_they_say_and_stay_as_they_are(lay_out, make_sample):
    _, open_it = lay_out()
    backend = open_it(workers=1)
    assert (backend.num_train, backend.num_val, backend.num_classes) == (40, 11, 3)
    assert backend.classes == ("ant", "bee", "cat")
    batches, copies = [], []
    for batch in backend.train_batches(TrainPlan(0, 40, 8, 8, 0, 1).slices(0, 20)):
        batches.append(batch)
        copies.append(batch.images.clone())
    assert all(torch.equal(batch.images, copy) for batch, copy in zip(batches, copies, strict=True))
    for batch in batches[:2]:
        assert (batch.images.shape, batch.images.dtype) == ((8, 3, SIZE, SIZE), torch.uint8)
        assert batch.images.is_contiguous()
        assert batch.labels.dtype == batch.sample_ids.dtype == torch.int64
        assert batch.labels.tolist() == [make_sample(i).label for i in batch.sample_ids.tolist()]
        assert batch.valid.all()


@pytest.mark.parametrize("workers", [0, 1])
def test_the_trainer_process_stays_as_it_is(lay_out, workers):
    _, open_it = lay_out()

    def state():
        generators = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        return torch.get_num_threads(), *generators

    before, others = state(), {*threading.enumerate()}
    backends = [open_it(workers=workers) for _ in range(2)]
    readers = [backend.train_batches(TrainPlan(0, 40, 8, 8, 0, 1).slices(0, 5)) for backend in backends]
    for one, two in zip(*readers, strict=True):
        assert torch.equal(one.images, two.images)
    for backend in backends:
        backend.close()
    assert state() == before
    wait_until(lambda: {*threading.enumerate()} <= others)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_bad_sample_stops_with_its_place_after_the_batches_before_it(backend, lay_out, make_sample, workers):
    samples = [make_sample(i) for i in range(10)]
    samples[6] = broken(6)
    _, open_it = lay_out(train=samples)
    slices = [BatchSlice(0, t, np.arange(2 * t, 2 * t + 2)) for t in range(5)]
    batches = open_it(workers=workers).train_batches(slices)
    assert [next(batches).batch for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError) as caught:
        next(batches)
    shard = "train.beton" if backend == "ffcv" else "train-000000.tar"
    message = str(caught.value)
    assert message.startswith(f"sample broken-6 in {shard} cannot be decoded: ")
    assert "truncated" in message
    assert message.endswith("such images: add data.on_bad_sample=skip")
    assert "\n" not in message
    assert next(batches, None) is None


@pytest.mark.parametrize("workers", [0, 1])
def test_skipping_takes_the_next_sample_that_decodes(backend, lay_out, make_sample, workers):
    samples = [make_sample(i) for i in range(10)]
    samples[4], samples[8], samples[9] = broken(4), broken(8), broken(9)
    _, open_it = lay_out(samples, samples)
    backend_ = open_it(workers=workers, on_bad_sample="skip")
    (batch,) = backend_.train_batches([BatchSlice(0, 0, np.arange(10))])
    assert batch.sample_ids.tolist() == [0, 1, 2, 3, 5, 5, 6, 7, 0, 0]
    assert batch.valid.all()
    assert torch.equal(batch.images[4], batch.images[5])
    assert torch.equal(batch.images[8], batch.images[0])
    assert batch.labels[4] == make_sample(5).label
    assert [bad.sample_id for bad in batch.bad] == [4, 8, 9, 9]
    shards = ["train.beton"] * 2 if backend == "ffcv" else ["train-000000.tar", "train-000001.tar"]
    assert [(bad.key, bad.shard) for bad in batch.bad[:2]] == list(zip(["broken-4", "broken-8"], shards, strict=True))
    (batch,) = backend_.eval_batches([BatchSlice(0, 0, np.array([*range(10), PADDING]))])
    assert batch.sample_ids.tolist() == [*range(10), PADDING]
    assert [i for i in range(11) if not batch.valid[i]] == [4, 8, 9, 10]
    assert [bad.key for bad in batch.bad] == ["broken-4", "broken-8", "broken-9"]


def test_skipping_ends_when_nothing_decodes_and_too_many_pixels_are_refused_by_the_header(lay_out):
    _, open_it = lay_out(train=[broken(i) for i in range(4)])
    with pytest.raises(DataError, match="and no other image can replace it"):
        next(open_it(on_bad_sample="skip").train_batches([BatchSlice(0, 0, np.arange(2))]))
    with pytest.raises(DataError, match=r"broken-\d .* 32 x 32 pixels, more than data\.max_pixels = 1000"):
        next(open_it(max_pixels=1000).train_batches([BatchSlice(0, 0, np.arange(2))]))


@pytest.mark.parametrize("backend", ["webdataset", "dali"], indirect=True)
def test_a_changed_shard_is_an_error_even_when_skipping(lay_out):
    directory, open_it = lay_out()
    backend = open_it(workers=1, on_bad_sample="skip")
    flip(directory / "train-000003.tar", 1700)
    with pytest.raises(DataError, match=r"train-000003.tar has changed since its index"):
        list(backend.train_batches(TrainPlan(0, 40, 40, 20, 0, 1).slices(0, 1)))


def test_a_file_system_that_stalls_is_an_error_that_names_the_file(backend, lay_out, capfd):
    directory, open_it = lay_out()
    before = children()
    opened = open_it(workers=2, timeout=1)
    path = directory / ("train.beton" if backend == "ffcv" else "train-000000.tar")
    path.unlink()
    os.mkfifo(path)  # opening it waits, as a dead server's file does
    batches = opened.train_batches(BatchSlice(0, t, np.arange(8 * t, 8 * t + 8)) for t in range(5))
    with pytest.raises(DataError) as caught:
        next(batches)
    reader = "reading" if backend == "dali" else "worker 0 at"
    assert str(caught.value).startswith(f"no batch came for data.timeout = 1 s: {reader} sample 0 in {path}")
    assert next(batches, None) is None
    if backend != "dali":  # DALI reads in threads
        stack = capfd.readouterr().err
        assert "(most recent call first)" in stack
        assert "in _serve" in stack
    opened.close()
    wait_until(lambda: all_ended_since(before))
    with contextlib.suppress(OSError):  # release threads that wait
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))


@pytest.mark.parametrize("order", ["full", "block"])
def test_folder_and_shards_train_alike(image_folder, shards, data_config, order):
    def batches(directory, backend, workers):
        config = data_config(directory, backend=backend, workers=workers, order=order, block_samples=5, window_blocks=3)
        opened = open_backend(ImageSpec(config, AugmentConfig(erasing=0.3), 16, 4, 5))
        plan = TrainPlan(5, opened.num_train, 12, 6, 0, 1, order, 5, 3)
        train = contents(opened.train_batches(plan.slices(2, 8)))
        val = contents(opened.eval_batches(EvalPlan(opened.num_val, 5, 0, 1).slices()))
        opened.close()
        return train + val

    from_folder = batches(image_folder, "folder", 1)
    assert len(from_folder) == 18
    assert from_folder == batches(shards, "webdataset", 0)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("backend", ["ffcv", "dali"], indirect=True)
def test_a_killed_run_resumes_to_the_bits_of_an_uninterrupted_one(backend, recipe_file, shards, tmp_path):
    directory = make_betons(shards) if backend == "ffcv" else shards
    assert_a_kill_changes_nothing(recipe_file, tmp_path, f"data.backend={backend}", f"data.path={directory}")


# The libraries of the extras are missing: none is imported before it is needed, and one line names what to install.
WITHOUT = """
import sys
import karat_scale.data.backends.gpu_decoders, karat_scale.data.backends.images
assert not any(name.partition(".")[0] in ("nvidia", "ffcv") for name in sys.modules)
sys.modules["nvidia.dali"] = sys.modules["ffcv"] = None  # as Python has it where the import fails

from karat_scale.data.backends import ImageSpec, open_backend
from karat_scale.data.plan import EvalPlan
from karat_scale.foundation.errors import RecipeError
from karat_scale.recipe import AugmentConfig, DataConfig

def opened(backend, path, **fields):
    data = DataConfig(backend=backend, path=path, workers=0, **fields)
    return open_backend(ImageSpec(data, AugmentConfig(), 16, 3, 0))

for backend in ("dali", "ffcv"):
    try:
        opened(backend, sys.argv[1])
    except RecipeError as error:
        print(error)
for path in sys.argv[2:]:
    batches = opened("ffcv", path, decoder="pillow").eval_batches(EvalPlan(11, 4, 0, 1).slices())
    print(sum(int(batch.valid.sum()) for batch in batches))
"""


def test_the_error_says_what_to_install_and_another_decoder_reads_betons(betons):
    done = run_code(WITHOUT, *2 * [betons()], environments=[karat_environment()], directory=ROOT)
    assert done.returncode == 0, done.stderr
    dali, ffcv, counted = done.stdout.splitlines()
    assert dali.startswith("data.backend = dali needs DALI (")
    assert dali.endswith(": pip install -e '.[dali]'")
    assert ffcv.startswith("FFCV cannot be imported (")
    assert "; apt-get install libopencv-dev libturbojpeg0-dev pkg-config g++, then in the clone: pip install" in ffcv
    assert counted == "11"


def test_hashes_that_a_folder_does_not_have_are_told(opened, image_folder) -> None:
    (notice,) = opened(image_folder, classes=4, backend="folder", verify="hash").notices
    assert notice == "data.verify=hash has no effect: no hashes of image files are known"
