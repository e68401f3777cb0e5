import gc
import io
import os
import random
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from karat_scale.data.backends import open_backend
from karat_scale.data.dali_pipeline import QUEUE_DEPTH, DaliDecoder
from karat_scale.data.plan import BatchSlice, EvalPlan, TrainPlan
from karat_scale.data.row_reader import RowReader
from karat_scale.data.shard_writer import EncodedSample
from karat_scale.errors import DataError
from karat_scale.recipe import AugmentConfig
from tests.conftest import events, karat, summary
from tests.data.backends.helpers import contents
from tests.data.conftest import encode, photo
from tests.train.conftest import equal
from tests.train.runs import STEPS, final_tensors, kill_all, losses, start, wait_for_checkpoint

pytest.importorskip("nvidia.dali", reason="DALI is not installed: pip install 'karat-scale[dali]'")

SIZE = 16


@pytest.fixture
def dali(data_config):
    """Opens the backend over a directory, by default with one thread; closes it at the end."""
    opened = []

    def make(directory, augment=None, seed=5, size=SIZE, **fields):
        config = data_config(directory, **{"backend": "dali", "workers": 1, **fields})
        opened.append(open_backend(config, augment or AugmentConfig(), size, 3, seed))
        return opened[-1]

    yield make
    for backend in opened:
        backend.close()


@pytest.fixture
def webdataset(data_config):
    """What DALI's batches are compared with: the same shards, decoded by torchvision."""

    def make(directory, augment=None, seed=5, size=SIZE, **fields):
        config = data_config(directory, **{"decoder": "torchvision", **fields})
        return open_backend(config, augment or AugmentConfig(), size, 3, seed)

    return make


def noise(number: int, size: int = 64) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)


def broken(number: int) -> EncodedSample:
    return EncodedSample(f"broken-{number}", "jpg", encode(noise(number))[:-400], number % 3)


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("order", ["full", "block"])
def test_batches_are_those_of_webdataset_and_torchvision_to_the_bit(make_shards, dali, webdataset, workers, order):
    directory = make_shards()
    policy = {"order": order, "block_samples": 4, "window_blocks": 2}
    seen = []
    for backend in (dali(directory, workers=workers, **policy), webdataset(directory, **policy)):
        # The paper's whole augmentation, over an epoch's end.
        plan = TrainPlan(5, backend.num_train, 12, 6, 0, 1, order, 4, 2)
        train = contents(backend.train_batches(plan.slices(1, 7)))
        seen.append((train, contents(backend.eval_batches(EvalPlan(backend.num_val, 4, 0, 1).slices()))))
    assert [len(part) for part in seen[0]] == [12, 3]
    assert seen[0] == seen[1]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_pixels_are_pillows_within_half_a_grey_level_on_average(make_shards, dali, webdataset, interpolation):
    samples = [EncodedSample(f"{i}", "jpg", encode(photo(i, 90 + i, 80), quality=95), 0) for i in range(12)]
    augment = AugmentConfig(color_jitter=0, randaugment="", interpolation=interpolation)
    directory = make_shards(train=samples, val=samples)
    ours, pillow = dali(directory, augment, size=48), webdataset(directory, augment, size=48, decoder="pillow")
    slices = [BatchSlice(0, 0, np.arange(12))]
    (one,), (two,) = ours.train_batches(slices), pillow.train_batches(slices)
    assert one.draws == two.draws
    assert (one.images.int() - two.images).abs().float().mean(dim=(1, 2, 3)).max() < 0.5
    (one,), (two,) = ours.eval_batches(slices), pillow.eval_batches(slices)
    assert torch.equal(one.images, two.images)


def odd_samples() -> Iterator[EncodedSample]:
    pixels = photo(3, 50, 40)
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    trailing = encode(pixels, quality=95) + b"\0\0"
    variants = {
        "rotated": encode(pixels, quality=95, exif=exif),
        "grey": encode(np.asarray(image.convert("L")), quality=95),
        "cmyk": encode_image(image.convert("CMYK"), "JPEG"),
        "progressive": encode(pixels, progressive=True),
        "png": encode(pixels, "PNG"),
        "palette": encode_image(image.convert("P"), "PNG"),
        "alpha": encode_image(image.convert("RGBA"), "PNG"),
        "trailing": trailing,
        "thin": encode(pixels[:1]),
        "one pixel": encode(pixels[:1, :1]),
        "subsampled": encode(pixels, subsampling=0),
    }
    for name, data in variants.items():
        yield EncodedSample(name, "jpg", data, 0)


def encode_image(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def test_odd_images_are_read_as_elsewhere(make_shards, dali, webdataset):
    samples = list(odd_samples())
    directory = make_shards(train=samples, val=samples)
    slices = [BatchSlice(epoch, 0, np.arange(len(samples))) for epoch in range(3)]
    one, two = dali(directory), webdataset(directory)
    assert contents(one.train_batches(slices)) == contents(two.train_batches(slices))
    assert contents(one.eval_batches(slices)) == contents(two.eval_batches(slices))


def test_the_odd_set_is_read_as_elsewhere(sample_data, make_shards, dali, webdataset):
    with tarfile.open(sample_data / "odd_jpegs.tar") as tar:
        members = [member for member in tar.getmembers() if member.isfile()]
        samples = [
            EncodedSample(f"{i:02d}", "jpg", tar.extractfile(member).read(), i % 3) for i, member in enumerate(members)
        ]
    directory = make_shards(train=samples, val=samples)
    slices = [BatchSlice(0, start, np.arange(start, start + 3)) for start in range(0, len(samples), 3)]
    one, two = dali(directory, on_bad_sample="skip"), webdataset(directory, on_bad_sample="skip")
    train = contents(one.train_batches(slices))
    assert train == contents(two.train_batches(slices))
    assert contents(one.eval_batches(slices)) == contents(two.eval_batches(slices))
    bad = {sample.key for batch in train for sample in batch[-1]}
    assert bad == {
        f"{i:02d}" for i, member in enumerate(members) if "truncated_jpeg" in member.name or "hdr" in member.name
    }


def test_ranks_and_resumes_give_the_same_samples(make_shards, dali):
    backend = dali(make_shards())
    whole = list(backend.train_batches(TrainPlan(5, 40, 12, 12, 0, 1).slices(0, 5)))
    ranks = [list(backend.train_batches(TrainPlan(5, 40, 12, 3, rank, 2).slices(2, 5))) for rank in (0, 1)]
    for step in range(2, 5):
        parts = [batch for rank in ranks for batch in rank[2 * (step - 2) : 2 * (step - 2) + 2]]
        assert torch.equal(torch.cat([part.images for part in parts]), whole[step].images)
        assert torch.equal(torch.cat([part.labels for part in parts]), whole[step].labels)


def test_batches_hold_what_they_say(make_shards, make_sample, dali, cheap_augment):
    backend = dali(make_shards(), cheap_augment)
    assert (backend.num_train, backend.num_val, backend.num_classes) == (40, 11, 3)
    assert backend.classes == ("ant", "bee", "cat")
    batch = next(backend.train_batches(TrainPlan(0, 40, 8, 8, 0, 1).slices(0, 1)))
    assert (batch.images.shape, batch.images.dtype) == ((8, 3, SIZE, SIZE), torch.uint8)
    assert batch.images.is_contiguous()
    assert batch.labels.dtype == batch.sample_ids.dtype == torch.int64
    assert batch.labels.tolist() == [make_sample(i).label for i in batch.sample_ids.tolist()]
    assert batch.valid.all()


def test_batches_stay_as_they_are_when_later_ones_come(make_shards, dali, cheap_augment):
    backend = dali(make_shards(), cheap_augment)
    batches = backend.train_batches(TrainPlan(0, 40, 8, 8, 0, 1).slices(0, 20))
    first = next(batches)
    before = first.images.clone()
    list(batches)
    assert torch.equal(first.images, before)


def test_global_generators_and_threads_stay_as_they_are(make_shards, dali):
    backend = dali(make_shards(), workers=2)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    threads = torch.get_num_threads()
    list(backend.train_batches(TrainPlan(0, 40, 8, 8, 0, 1).slices(0, 2)))
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert torch.get_num_threads() == threads


def test_evaluation_counts_each_image_once_on_three_ranks(make_shards, dali, cheap_augment):
    backend = dali(make_shards(), cheap_augment)
    ids = []
    for rank in range(3):
        for batch in backend.eval_batches(EvalPlan(11, 3, rank, 3).slices()):
            ids += batch.sample_ids[batch.valid].tolist()
            assert not batch.images[~batch.valid].any()
            assert not batch.labels[~batch.valid].any()
    assert sorted(ids) == list(range(11))


def test_a_batch_of_padding_alone_is_zeros(make_shards, dali):
    (batch,) = dali(make_shards()).eval_batches([BatchSlice(0, 0, np.array([-1, -1]))])
    assert not batch.images.any()
    assert not batch.valid.any()


def test_a_bad_sample_stops_with_its_path_after_the_batches_before_it(make_shards, make_sample, dali, cheap_augment):
    samples = [make_sample(i) for i in range(10)]
    samples[6] = broken(6)
    backend = dali(make_shards(train=samples), cheap_augment)
    batches = backend.train_batches(BatchSlice(0, t, np.arange(2 * t, 2 * t + 2)) for t in range(5))
    assert [next(batches).batch for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError) as caught:
        next(batches)
    message = str(caught.value)
    assert message.startswith("sample broken-6 in train-000000.tar cannot be decoded: ")
    assert "truncated" in message
    assert message.endswith("set data.on_bad_sample=skip, or remove the image and make the shards again")
    assert next(batches, None) is None


def hollow(number: int) -> EncodedSample:
    """A JPEG whose ends are in place and whose middle is not: only decoding shows it."""
    data = encode(noise(number))
    start = data.index(b"\xff\xda") + 2  # of the scan, whose header is spoilt
    return EncodedSample(f"hollow-{number}", "jpg", data[:start] + b"\0\2" + data[start + 2 :], number % 3)


def damaged(number: int) -> EncodedSample:
    """A JPEG with bytes changed, cut out or zeroed, anywhere."""
    rng = np.random.default_rng(number)
    data = bytearray(encode(noise(number), quality=90))
    at = int(rng.integers(2, len(data) - 300))
    if number % 3 == 0:
        del data[at : at + 200]
    elif number % 3 == 1:
        data[at : at + 200] = bytes(200)
    else:
        for place in rng.integers(2, len(data) - 2, 4).tolist():
            data[place] = int(rng.integers(200, 256))
    return EncodedSample(f"damaged-{number}", "jpg", bytes(data), 0)


def test_damage_is_judged_as_elsewhere_and_looks_the_same(make_shards, dali, webdataset):
    samples = [damaged(number) for number in range(60)]
    directory = make_shards(train=samples, val=samples)
    slices = [BatchSlice(0, number, np.array([number])) for number in range(60)]
    one, two = dali(directory, on_bad_sample="skip"), webdataset(directory, on_bad_sample="skip")
    train = contents(one.train_batches(slices))
    assert train == contents(two.train_batches(slices))
    assert 0 < sum(len(batch[-1]) > 0 for batch in train) < 60
    assert contents(one.eval_batches(slices)) == contents(two.eval_batches(slices))


@pytest.mark.parametrize("spoil", [broken, hollow])
def test_skipping_takes_the_next_sample_that_decodes(make_shards, make_sample, dali, webdataset, spoil):
    samples = [make_sample(i) for i in range(10)]
    samples[4], samples[8], samples[9] = spoil(4), spoil(8), spoil(9)
    directory = make_shards(train=samples, val=samples)
    slices = [BatchSlice(0, t, np.arange(2 * t, 2 * t + 2)) for t in range(5)]
    slices += [BatchSlice(0, 5, np.arange(10))]
    one, two = dali(directory, on_bad_sample="skip"), webdataset(directory, on_bad_sample="skip")
    train = list(one.train_batches(slices))
    assert contents(train) == contents(two.train_batches(slices))
    assert train[5].sample_ids.tolist() == [0, 1, 2, 3, 5, 5, 6, 7, 0, 0]
    assert [bad.sample_id for bad in train[5].bad] == [4, 8, 9, 9]
    evaluated = list(one.eval_batches(slices))
    assert contents(evaluated) == contents(two.eval_batches(slices))
    assert [i for i in range(10) if not evaluated[5].valid[i]] == [4, 8, 9]


def test_a_bomb_is_refused_by_its_header(make_shards, make_sample, dali, cheap_augment):
    samples = [make_sample(i) for i in range(3)]
    samples[1] = EncodedSample("bomb", "jpg", encode(np.zeros((300, 300, 3), dtype=np.uint8)), 0)
    backend = dali(make_shards(train=samples), cheap_augment, max_pixels=89_999)
    with pytest.raises(DataError, match=r"bomb in train-000000.tar .* 300 x 300 pixels, more than data.max_pixels"):
        next(backend.train_batches([BatchSlice(0, 0, np.arange(3))]))


def test_batches_that_dali_finishes_hold_the_same_samples(make_shards, dali, webdataset, cheap_augment):
    # As on a GPU, but on the CPU: DALI resizes and flips, and rows that it was not given are put in.
    samples = list(odd_samples())
    directory = make_shards(train=samples, val=samples)
    backend, other = dali(directory, cheap_augment), webdataset(directory, cheap_augment)
    slices = [BatchSlice(2, 0, np.array([*range(len(samples)), -1]))]
    for way, split, expected in (
        (backend._train_pass, backend._train, other.train_batches([BatchSlice(2, 0, slices[0].sample_ids[:-1])])),
        (backend._eval_pass, backend._val, other.eval_batches(slices)),
    ):
        reader = RowReader(split, backend._decoder, way.choose, 10**6, 1)
        finishing = DaliDecoder(1, cheap_augment.interpolation, size=SIZE)
        (one,), (two,) = backend._batches(slices, reader, finishing, way, split), expected
        assert one.draws == two.draws
        assert not one.images[-1].any()
        difference = (one.images[: len(two.images)].int() - two.images).abs().float().mean(dim=(1, 2, 3))
        assert difference.max() < 0.5
        by_pillow = [i for i, sample in enumerate(samples) if sample.key in ("png", "cmyk", "palette", "alpha")]
        assert not difference[by_pillow].any()


def test_a_changed_shard_is_an_error_even_when_skipping(make_shards, dali, cheap_augment):
    directory = make_shards()
    backend = dali(directory, cheap_augment, on_bad_sample="skip")
    path = directory / "train-000003.tar"
    data = bytearray(path.read_bytes())
    data[1700] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"train-000003.tar has changed since its index"):
        list(backend.train_batches(TrainPlan(0, 40, 40, 20, 0, 1).slices(0, 1)))


def tasks() -> int:
    return psutil.Process().num_threads()


def wait_until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_no_more_batches_are_made_than_asked_for(make_shards, dali):
    fed = []

    def slices():
        for number in range(1000):
            fed.append(number)
            yield BatchSlice(0, number, np.arange(2))

    batches = dali(make_shards(), prefetch=3).train_batches(slices())
    for taken in range(1, 10):
        next(batches)
        time.sleep(0.02)
        assert len(fed) <= taken + 3 + QUEUE_DEPTH


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


@pytest.mark.parametrize("workers", [1, 2])
def test_a_file_system_that_stalls_is_an_error_that_names_the_shard(make_shards, dali, workers):
    directory = make_shards()
    backend = dali(directory, workers=workers, timeout=1)
    path = directory / "train-000000.tar"
    path.unlink()
    os.mkfifo(path)  # opening it waits, as a dead server's file does
    begun = time.monotonic()
    with pytest.raises(DataError) as caught:
        next(backend.train_batches([BatchSlice(0, 0, np.arange(3))]))
    backend.close()
    assert time.monotonic() - begun < 20
    assert f"no batch came for data.timeout = 1 s: reading sample 0 in {path}" in str(caught.value)
    # Let go of those that wait.
    os.close(os.open(path, os.O_WRONLY))


def resident_mb() -> float:
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:"))) / 1e3


def test_ten_epochs_take_no_more_memory_than_three(make_shards, make_sample, dali):
    backend = dali(make_shards(), size=64)
    plan = TrainPlan(0, backend.num_train, 10, 10, 0, 1)
    after: list[float] = []
    for number, _ in enumerate(backend.train_batches(plan.slices(0, 10 * plan.steps_per_epoch)), start=1):
        if number % plan.steps_per_epoch == 0:
            after.append(resident_mb())
    # An epoch of decoded images is 0.5 MB: 3.4 MB more than at the third epoch if they stayed.
    assert len(after) == 10
    assert after[-1] - after[2] < 2.5, after


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
    assert memory_now - memory < 2.5
    assert threads_now <= threads_then + 4  # one pipeline's, which may be on its way out
    assert files_now <= files


@pytest.mark.multiprocess
def test_a_killed_run_resumes_to_the_bits_of_an_uninterrupted_one(recipe_file: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    overrides = ("data.backend=dali", "checkpoint.every_steps=1", "checkpoint.keep_last=2")
    done = karat("train", str(recipe_file), f"run.dir={whole}", *overrides)
    assert done.returncode == 0, done.stdout + done.stderr

    killed = start(recipe_file, cut, *overrides)
    wait_for_checkpoint(cut, 3, killed)
    kill_all(killed)
    resumed = karat("train", str(recipe_file), f"run.dir={cut}", *overrides)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr

    (resume,) = events(cut, "resume")
    assert 3 <= resume["step"] < STEPS
    assert losses(cut) == losses(whole)
    assert equal(final_tensors(cut), final_tensors(whole))
    assert summary(cut)["restarts"] == 1
