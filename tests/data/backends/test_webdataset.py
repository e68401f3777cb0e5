import os
import random
import time

import numpy as np
import pytest
import torch

from karat_scale.data.backends import ImageSpec, open_backend
from karat_scale.data.plan import BatchSlice, EvalPlan, TrainPlan
from karat_scale.data.shards.shard_writer import EncodedSample
from karat_scale.foundation.errors import DataError
from karat_scale.recipe import AugmentConfig
from tests.data.backends.helpers import SIZE, broken, children, contents, wait_until


def test_batches_are_the_same_for_any_number_of_workers(make_shards, data_config):
    directory = make_shards()
    seen = []
    for workers in (0, 1, 2):
        # The paper's whole augmentation, over an epoch's end.
        backend = open_backend(ImageSpec(data_config(directory, workers=workers), AugmentConfig(), SIZE, 3, 5))
        plan = TrainPlan(5, backend.num_train, 12, 6, 0, 1)
        train = contents(backend.train_batches(plan.slices(1, 7)))
        val = contents(backend.eval_batches(EvalPlan(backend.num_val, 4, 0, 1).slices()))
        seen.append((train, val))
        backend.close()
    assert len(seen[0][0]) == 12
    assert len(seen[0][1]) == 3
    assert seen[0] == seen[1] == seen[2]


def test_ranks_and_resumes_give_the_same_samples(make_shards, data_config):
    backend = open_backend(ImageSpec(data_config(make_shards()), AugmentConfig(), SIZE, 3, 5))
    whole = list(backend.train_batches(TrainPlan(5, 40, 12, 12, 0, 1).slices(0, 5)))
    ranks = [list(backend.train_batches(TrainPlan(5, 40, 12, 3, rank, 2).slices(2, 5))) for rank in (0, 1)]
    for step in range(2, 5):
        parts = [batch for rank in ranks for batch in rank[2 * (step - 2) : 2 * (step - 2) + 2]]
        assert torch.equal(torch.cat([part.images for part in parts]), whole[step].images)
        assert torch.equal(torch.cat([part.labels for part in parts]), whole[step].labels)


def test_batches_hold_what_they_say(make_shards, make_sample, data_config, cheap_augment):
    backend = open_backend(ImageSpec(data_config(make_shards()), cheap_augment, SIZE, 3, 0))
    assert (backend.num_train, backend.num_val, backend.num_classes) == (40, 11, 3)
    assert backend.classes == ("ant", "bee", "cat")
    batch = next(backend.train_batches(TrainPlan(0, 40, 8, 8, 0, 1).slices(0, 1)))
    assert (batch.images.shape, batch.images.dtype) == ((8, 3, SIZE, SIZE), torch.uint8)
    assert batch.images.is_contiguous()
    assert batch.labels.dtype == batch.sample_ids.dtype == torch.int64
    assert batch.labels.tolist() == [make_sample(i).label for i in batch.sample_ids.tolist()]
    assert batch.valid.all()
    assert torch.equal(batch.to("cpu").images, batch.images)


def test_each_epoch_augments_anew(make_shards, data_config, cheap_augment):
    backend = open_backend(ImageSpec(data_config(make_shards()), cheap_augment, SIZE, 3, 0))
    ids = np.arange(4)
    one, two = backend.train_batches([BatchSlice(0, 0, ids), BatchSlice(1, 0, ids)])
    assert not torch.equal(one.images, two.images)


@pytest.mark.parametrize("workers", [0, 1])
def test_global_generators_stay_as_they_are(make_shards, data_config, workers):
    backend = open_backend(ImageSpec(data_config(make_shards(), workers=workers), AugmentConfig(), SIZE, 3, 0))
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    list(backend.train_batches(TrainPlan(0, 40, 8, 8, 0, 1).slices(0, 2)))
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


def test_evaluation_counts_each_image_once_on_three_ranks(make_shards, data_config, cheap_augment):
    backend = open_backend(ImageSpec(data_config(make_shards()), cheap_augment, SIZE, 3, 0))
    ids = []
    for rank in range(3):
        for batch in backend.eval_batches(EvalPlan(11, 3, rank, 3).slices()):
            ids += batch.sample_ids[batch.valid].tolist()
            assert not batch.images[~batch.valid].any()
            assert not batch.labels[~batch.valid].any()
    assert sorted(ids) == list(range(11))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_sample_stops_with_its_path(make_shards, make_sample, data_config, cheap_augment, workers):
    samples = [make_sample(i) for i in range(10)]
    samples[4] = broken(4)
    backend = open_backend(
        ImageSpec(data_config(make_shards(train=samples), workers=workers), cheap_augment, SIZE, 3, 0)
    )
    with pytest.raises(DataError) as caught:
        list(backend.train_batches(TrainPlan(0, 10, 10, 5, 0, 1).slices(0, 1)))
    message = str(caught.value)
    assert message.startswith("sample broken-4 in train-000000.tar cannot be decoded: ")
    assert "truncated" in message
    assert message.endswith("such images: add data.on_bad_sample=skip 'resume.allow=[data.on_bad_sample]'")
    assert "\n" not in message


@pytest.mark.parametrize("workers", [0, 1])
def test_skipping_takes_the_next_sample_that_decodes(make_shards, make_sample, data_config, cheap_augment, workers):
    samples = [make_sample(i) for i in range(10)]
    samples[4], samples[8], samples[9] = broken(4), broken(8), broken(9)
    config = data_config(make_shards(train=samples), workers=workers, on_bad_sample="skip")
    backend = open_backend(ImageSpec(config, cheap_augment, SIZE, 3, 0))
    (batch,) = backend.train_batches([BatchSlice(0, 0, np.arange(10))])
    assert batch.sample_ids.tolist() == [0, 1, 2, 3, 5, 5, 6, 7, 0, 0]
    assert batch.valid.all()
    assert torch.equal(batch.images[4], batch.images[5])
    assert torch.equal(batch.images[8], batch.images[0])
    assert batch.labels[4] == make_sample(5).label
    assert [bad.sample_id for bad in batch.bad] == [4, 8, 9, 9]
    assert (batch.bad[0].key, batch.bad[0].shard) == ("broken-4", "train-000000.tar")
    assert batch.bad[1].shard == "train-000001.tar"


def test_skipping_waits_for_nothing(make_shards, make_sample, data_config, cheap_augment, monkeypatch):
    """webdataset's own handler sleeps half a second at each bad sample."""
    monkeypatch.setattr(time, "sleep", None)
    samples = [make_sample(i) if i % 2 else broken(i) for i in range(10)]
    backend = open_backend(
        ImageSpec(data_config(make_shards(samples), on_bad_sample="skip"), cheap_augment, SIZE, 3, 0)
    )
    (batch,) = backend.train_batches([BatchSlice(0, 0, np.arange(10))])
    assert [bad.sample_id for bad in batch.bad] == [0, 2, 4, 6, 8]


def test_skipping_in_evaluation_leaves_the_sample_out(make_shards, make_sample, data_config, cheap_augment):
    samples = [make_sample(i) for i in range(5)]
    samples[2] = broken(2)
    config = data_config(make_shards(val=samples), on_bad_sample="skip")
    (batch,) = open_backend(ImageSpec(config, cheap_augment, SIZE, 3, 0)).eval_batches(EvalPlan(5, 6, 0, 1).slices())
    assert batch.sample_ids.tolist() == [0, 1, 2, 3, 4, -1]
    assert batch.valid.tolist() == [True, True, False, True, True, False]
    assert [bad.key for bad in batch.bad] == ["broken-2"]


def test_skipping_ends_when_nothing_decodes(make_shards, data_config, cheap_augment):
    config = data_config(make_shards(train=[broken(i) for i in range(4)]), on_bad_sample="skip")
    backend = open_backend(ImageSpec(config, cheap_augment, SIZE, 3, 0))
    with pytest.raises(DataError, match="nor can any that may replace it be used"):
        next(backend.train_batches([BatchSlice(0, 0, np.arange(2))]))


def test_a_changed_shard_is_an_error_even_when_skipping(make_shards, data_config, cheap_augment):
    directory = make_shards()
    config = data_config(directory, workers=1, on_bad_sample="skip")
    backend = open_backend(ImageSpec(config, cheap_augment, SIZE, 3, 0))
    path = directory / "train-000003.tar"
    data = bytearray(path.read_bytes())
    data[1700] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"train-000003.tar has changed since its index"):
        list(backend.train_batches(TrainPlan(0, 40, 40, 20, 0, 1).slices(0, 1)))


def test_a_file_system_that_stalls_is_an_error_that_names_the_shard(make_shards, data_config, cheap_augment):
    directory = make_shards()
    before = children()
    backend = open_backend(ImageSpec(data_config(directory, workers=2, timeout=1), cheap_augment, SIZE, 3, 0))
    path = directory / "train-000002.tar"
    path.unlink()
    os.mkfifo(path)  # opening it waits, as a dead server's file does
    batches = backend.train_batches(BatchSlice(0, t, np.arange(8 * t, 8 * t + 8)) for t in range(5))
    assert [next(batches).batch, next(batches).batch] == [0, 1]
    with pytest.raises(DataError) as caught:
        next(batches)
    assert str(caught.value).startswith("no batch came for data.timeout = 1 s: worker 0 at sample 16 in " + str(path))
    assert next(batches, None) is None
    backend.close()
    wait_until(lambda: not children() - before)


def test_imagenet_photos_become_batches(sample_data, tmp_path, data_config):
    import tarfile

    from karat_scale.data.shards.shard_format import DatasetRecord, SplitRecord, write_dataset_record
    from karat_scale.data.shards.shard_writer import write_shard

    with tarfile.open(sample_data / "imagenet_sample_1000.tar") as tar:
        members = [tar.next() for _ in range(24)]
        samples = [
            EncodedSample(f"{i:04d}", "jpg", tar.extractfile(member).read(), i) for i, member in enumerate(members)
        ]
    shard = write_shard(tmp_path, "train-000000", samples)
    record = DatasetRecord(classes=[str(i) for i in range(24)])
    record.splits["train"] = SplitRecord(samples=24, bytes=shard.bytes, shards=[shard])
    write_dataset_record(tmp_path, record)
    backend = open_backend(ImageSpec(data_config(tmp_path, val_split="train"), AugmentConfig(), 224, 1000, 0))
    (batch,) = backend.train_batches(TrainPlan(0, 24, 24, 24, 0, 1).slices(0, 1))
    assert batch.images.shape == (24, 3, 224, 224)
    (batch,) = backend.eval_batches(EvalPlan(24, 24, 0, 1).slices())
    assert batch.images.float().std(dim=(1, 2, 3)).min() > 10
