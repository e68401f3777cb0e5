import os
import random
import threading

import numpy as np
import pytest
import torch

from karat_scale.data.backends import ImageSpec, open_backend
from karat_scale.data.plan import BatchSlice, EvalPlan, TrainPlan
from karat_scale.recipe import AugmentConfig
from tests.conftest import events, karat, summary
from tests.data.backends.helpers import CROP_AND_FLIP, SIZE, children, contents, wait_until
from tests.data.betons import make_betons, need_ffcv


def test_samples_draws_and_pixels_are_those_of_the_shards(betons, data_config):
    directory, config = betons()
    shards = data_config(directory.parent / "shards", decoder="pillow")
    seen = []
    for data in (shards, config(decoder="pillow"), config()):
        backend = open_backend(ImageSpec(data, AugmentConfig(), SIZE, 3, 5))
        plan = TrainPlan(5, backend.num_train, 12, 6, 0, 1)
        train = list(backend.train_batches(plan.slices(1, 7)))
        val = list(backend.eval_batches(EvalPlan(backend.num_val, 4, 0, 1).slices()))
        seen.append((backend.classes, train, val))
    reference, same_decoder, own_decoder = seen
    for other in (same_decoder, own_decoder):
        assert other[0] == reference[0]
        for ours, theirs in zip(other[1] + other[2], reference[1] + reference[2], strict=True):
            assert (ours.epoch, ours.batch, ours.draws) == (theirs.epoch, theirs.batch, theirs.draws)
            assert ours.sample_ids.tolist() == theirs.sample_ids.tolist()
            assert ours.labels.tolist() == theirs.labels.tolist()
            assert ours.valid.tolist() == theirs.valid.tolist()
    assert contents(same_decoder[1] + same_decoder[2]) == contents(reference[1] + reference[2])


def differences(ours, theirs) -> np.ndarray:
    """The mean difference of each image."""
    return np.concatenate(
        [(a.images.int() - b.images.int()).abs().float().mean((1, 2, 3)) for a, b in zip(ours, theirs, strict=True)]
    )


def test_pixels_of_photos_are_within_the_stated_tolerance_of_pillow(sample_data, tmp_path, data_config):
    """docs/data.md states it: on average 1.5 of 255, in no image more than 3."""
    need_ffcv()
    import tarfile

    with tarfile.open(sample_data / "imagenet_sample_1000.tar") as tar:
        for _ in range(40):
            member = tar.next()
            for split in ("train", "val"):
                path = tmp_path / "photos" / split / member.name
                path.parent.mkdir(parents=True)
                path.write_bytes(tar.extractfile(member).read())
    directory = make_betons(tmp_path / "photos")
    seen = []
    for decoder in ("auto", "pillow"):
        backend = open_backend(
            ImageSpec(data_config(directory, backend="ffcv", decoder=decoder), CROP_AND_FLIP, 224, 40, 0)
        )
        train = list(backend.train_batches(TrainPlan(0, 40, 40, 40, 0, 1).slices(0, 1)))
        seen.append((train, list(backend.eval_batches(EvalPlan(40, 40, 0, 1).slices()))))
    for ours, theirs in zip(*seen, strict=True):
        found = differences(ours, theirs)
        assert 0 < found.mean() < 1.5
        assert found.max() < 3


def test_batches_are_the_same_for_any_number_of_workers(betons):
    _, config = betons()
    seen = []
    # FFCV's Loader raises for more workers than cores.
    for workers in (0, 1, (os.cpu_count() or 1) + 1):
        backend = open_backend(ImageSpec(config(workers=workers), AugmentConfig(), SIZE, 3, 5))
        plan = TrainPlan(5, backend.num_train, 12, 6, 0, 1)
        train = contents(backend.train_batches(plan.slices(1, 7)))
        val = contents(backend.eval_batches(EvalPlan(backend.num_val, 4, 0, 1).slices()))
        seen.append((train, val))
        backend.close()
    assert len(seen[0][0]) == 12
    assert seen[0] == seen[1] == seen[2]


def test_ranks_and_resumes_give_the_same_samples(betons):
    _, config = betons()
    backend = open_backend(ImageSpec(config(), AugmentConfig(), SIZE, 3, 5))
    whole = list(backend.train_batches(TrainPlan(5, 40, 12, 12, 0, 1).slices(0, 5)))
    ranks = [list(backend.train_batches(TrainPlan(5, 40, 12, 3, rank, 2).slices(2, 5))) for rank in (0, 1)]
    for step in range(2, 5):
        parts = [batch for rank in ranks for batch in rank[2 * (step - 2) : 2 * (step - 2) + 2]]
        assert torch.equal(torch.cat([part.images for part in parts]), whole[step].images)
        assert torch.equal(torch.cat([part.sample_ids for part in parts]), whole[step].sample_ids)
        assert tuple(draw for part in parts for draw in part.draws) == whole[step].draws


def test_batches_stay_as_they_are_while_others_are_made(betons):
    """FFCV's own are views of a ring buffer."""
    _, config = betons()
    backend = open_backend(ImageSpec(config(), CROP_AND_FLIP, SIZE, 3, 0))
    batches, copies = [], []
    for batch in backend.train_batches(TrainPlan(0, 40, 8, 8, 0, 1).slices(0, 20)):
        batches.append(batch)
        copies.append(batch.images.clone())
    assert all(torch.equal(batch.images, copy) for batch, copy in zip(batches, copies, strict=True))
    assert len({batch.images.data_ptr() for batch in batches}) == 20
    assert (batches[0].images.shape, batches[0].images.dtype) == ((8, 3, SIZE, SIZE), torch.uint8)


def test_block_order_reads_ahead_and_gives_the_same_images(betons):
    _, config = betons()
    ids = [BatchSlice(0, 0, np.arange(40))]
    full, block = (
        list(open_backend(ImageSpec(config(**fields), CROP_AND_FLIP, SIZE, 3, 0)).train_batches(ids))
        for fields in ({}, {"order": "block", "block_samples": 7})
    )
    assert contents(full) == contents(block)


def test_evaluation_counts_each_image_once_on_three_ranks(betons):
    _, config = betons()
    backend = open_backend(ImageSpec(config(), CROP_AND_FLIP, SIZE, 3, 0))
    ids = []
    for rank in range(3):
        for batch in backend.eval_batches(EvalPlan(11, 3, rank, 3).slices()):
            ids += batch.sample_ids[batch.valid].tolist()
            assert not batch.images[~batch.valid].any()
            assert not batch.labels[~batch.valid].any()
    assert sorted(ids) == list(range(11))


def test_the_trainer_process_stays_as_it_is(betons):
    """FFCV's Loader changes torch's threads and draws from global generators; two of them crash."""
    _, config = betons()

    def state():
        threads = torch.get_num_threads(), threading.active_count()
        return threads, random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = state()
    backends = [open_backend(ImageSpec(config(workers=0), AugmentConfig(), SIZE, 3, 0)) for _ in range(2)]
    readers = [backend.train_batches(TrainPlan(0, 40, 8, 8, 0, 1).slices(0, 5)) for backend in backends]
    for one, two in zip(*readers, strict=True):
        assert torch.equal(one.images, two.images)
    for backend in backends:
        backend.close()
    assert state() == before


def test_closing_ends_the_workers_and_the_iterators(betons):
    _, config = betons()
    before = children()
    backend = open_backend(ImageSpec(config(workers=2), CROP_AND_FLIP, SIZE, 3, 0))
    batches = backend.train_batches(TrainPlan(0, 40, 8, 8, 0, 1).slices(0, 1000))
    next(batches)
    workers = children() - before
    assert len(workers) == 2
    backend.close()
    wait_until(lambda: not workers & children())
    assert next(batches, None) is None


def test_nothing_is_compiled_and_no_reader_of_ffcv_is_started(betons, monkeypatch):
    """FFCV's pipelines compile for 8 to 24 s before the first batch, and some hang while they do."""
    from ffcv.loader import Loader
    from numba.core.event import install_recorder

    monkeypatch.setattr(Loader, "__init__", None)  # which hangs
    _, config = betons()
    with install_recorder("numba:compile") as compiled:
        for decoder in ("auto", "pillow"):
            backend = open_backend(ImageSpec(config(decoder=decoder), AugmentConfig(), SIZE, 3, 0))
            assert len(list(backend.train_batches(TrainPlan(0, 40, 8, 8, 0, 1).slices(0, 2)))) == 2
    assert not compiled.buffer


@pytest.mark.slow
@pytest.mark.multiprocess
def test_training_from_betons_resumes_in_the_middle_of_an_epoch(recipe_file, shards):
    from tests.training.runs import STEPS, kill_all, losses, start, wait_for_checkpoint

    directory = make_betons(shards)
    fixed = ("data.backend=ffcv", f"data.path={directory}", "checkpoint.every_steps=1")
    whole, cut = recipe_file.parent / "whole", recipe_file.parent / "cut"
    done = karat("train", str(recipe_file), f"run.dir={whole}", *fixed)
    assert done.returncode == 0, done.stdout + done.stderr

    killed = start(recipe_file, cut, *fixed)
    wait_for_checkpoint(cut, 3, killed)
    kill_all(killed)
    resumed = karat("train", str(recipe_file), f"run.dir={cut}", *fixed)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    (resume,) = events(cut, "resume")
    assert 3 <= resume["step"] < STEPS
    assert losses(cut) == losses(whole)
    assert summary(cut)["data_digest"] == summary(whole)["data_digest"] != 0
