"""Tests of a stream's batches: they depend on the lanes alone, and a silent source and bad samples are reported."""

import os
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import torch

from karat_scale.data.backends import Backend
from karat_scale.data.batch import Batch
from karat_scale.data.plan import TrainPlan
from karat_scale.data.streams import StreamProgress
from karat_scale.foundation.errors import DataError
from tests.conftest import wait_until
from tests.data.backends.helpers import SIZE, all_ended_since, children, contents
from tests.data.tars import image, sample, write_tar

ENDLESS = """
import io, itertools, sys, tarfile
with tarfile.open(fileobj=sys.stdout.buffer, mode="w|") as tar:
    for number in itertools.count():
        for suffix, data in (("jpg", open(sys.argv[1], "rb").read()), ("cls", b"1")):
            member = tarfile.TarInfo(f"s{number}.{suffix}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
"""


@pytest.fixture
def streamed(opened, stream_config) -> Callable[..., Backend]:
    return lambda stream, **fields: opened(stream_config(stream, **fields))


def plan(rank: int = 0, ranks: int = 1, lanes: int = 1) -> TrainPlan:
    return TrainPlan(5, 24, 4 * ranks, 2, rank, ranks, "stream", lanes=lanes)


def train(backend, steps: int, **sizes: int) -> list[Batch]:
    return list(backend.train_batches(plan(**sizes).slices(0, steps)))


def test_a_worker_gives_what_the_trainer_itself_reads(streamed, tars: Path) -> None:
    found = [train(streamed(f"pipe:cat {tars}/{{0..3}}.tar", workers=workers), 14) for workers in (0, 1)]
    assert contents(found[0]) == contents(found[1])
    assert [batch.streamed for batch in found[0]] == [batch.streamed for batch in found[1]]
    assert found[0][0].digest == found[1][0].digest is not None


def test_batches_hold_what_they_say(streamed, tars: Path) -> None:
    backend = streamed(f"{tars}/{{0..3}}.tar")
    assert (backend.num_train, backend.num_val, backend.classes) == (24, 11, ("ant", "bee", "cat"))
    for batch in train(backend, 3):
        assert (batch.images.shape, batch.images.dtype) == ((2, 3, SIZE, SIZE), torch.uint8)
        keys = [key for key, _ in batch.streamed.sources]
        assert batch.labels.tolist() == [int(key[1:]) % 3 for key in keys]
        assert all(shard.startswith(str(tars)) for _, shard in batch.streamed.sources)


def test_classes_that_the_evaluation_lacks_are_those_of_its_own_split(opened, make_shards, data_config, make_sample):
    directory = make_shards(val=[make_sample(3 * number) for number in range(4)])
    stream = {"order": "stream", "stream": "a.tar", "stream_samples": 8}
    missing = "2 of 3 classes without validation images: bee, cat; top-1 is over the others"
    assert opened(data_config(directory, **stream)).notices == [missing]


def test_a_sample_is_augmented_anew_in_each_cycle(streamed, tars: Path) -> None:
    draws: dict[str, list[object]] = {}
    for batch in train(streamed(f"{tars}/2.tar"), 2):
        for (key, _), draw in zip(batch.streamed.sources, batch.draws, strict=True):
            draws.setdefault(key, []).append(draw)
    assert sum(map(len, draws.values())) == 8
    for drawn in draws.values():
        assert all(one != other for one, other in pairwise(drawn))


@pytest.mark.parametrize("lanes", [1, 2])
def test_ranks_and_workers_resume_exactly_and_read_each_sample_once(streamed, tars: Path, lanes: int) -> None:
    """Samples that were prefetched but not trained on are read again: a resume begins after the last noted batch."""
    for rank in range(2):
        backend = streamed(f"{tars}/{{0..3}}.tar", workers=lanes, prefetch=3)
        sizes = {"rank": rank, "ranks": 2, "lanes": lanes}
        whole = train(backend, 12, **sizes)
        progress = StreamProgress(rank, 2, lanes, 4)
        for batch in whole[: 2 * 5]:
            progress.note(batch)
        rest = backend.train_batches(progress.from_here(plan(**sizes).slices(5, 12)))
        assert contents(rest) == contents(whole[2 * 5 :])


def test_a_silent_source_is_named_in_time_and_nothing_is_left(streamed, tars: Path) -> None:
    before = children()
    seconds = str(10**6 + os.getpid())
    command = f"cat {tars}/0.tar; sleep {seconds}"
    backend = streamed(f"pipe:{command}", workers=1, timeout=1.5)
    said = r"no batch came for data.timeout = 1.5 s: worker 0 reads pipe:cat .*sleep 1"
    with pytest.raises(DataError, match=said):
        train(backend, 50)
    wait_until(lambda: all_ended_since(before))
    wait_until(lambda: not [p for p in psutil.process_iter(["cmdline"]) if seconds in (p.info["cmdline"] or [])])


def test_an_endless_command_goes_on(streamed, tmp_path: Path) -> None:
    (tmp_path / "endless.py").write_text(ENDLESS)
    (tmp_path / "a.jpg").write_bytes(image(3))
    backend = streamed(f"pipe:python3 {tmp_path}/endless.py {tmp_path}/a.jpg", workers=1, prefetch=1)
    found = train(backend, 30)
    assert [batch.streamed.place.entry for batch in found] == [0] * 60
    assert len({key for batch in found for key, _ in batch.streamed.sources}) == 120


def test_a_named_pipe_is_read(streamed, tars: Path, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    subprocess.run(["mkfifo", str(fifo)], check=True)
    with subprocess.Popen(["sh", "-c", f"cat {tars}/1.tar > {fifo}"]) as writer:
        found = train(streamed(fifo, workers=1, prefetch=1), 1)
        assert sum(len(batch.labels) for batch in found) == 4
        writer.kill()


def bad_tar(path: Path) -> str:
    members = [*sample(0, 0), ("u.jpg", image(1)), ("n.cls", b"1"), *sample(2, 1), *sample(2, 1), *sample(3, 2)]
    members += [("b.jpg", image(4)[:200]), ("b.cls", b"0"), *sample(5, 1)]
    write_tar(path / "bad.tar", members)
    return str(path / "bad.tar")


def test_bad_samples_are_replaced_and_told_of(streamed, tmp_path: Path) -> None:
    found = train(streamed(bad_tar(tmp_path), on_bad_sample="skip", stream_buffer=1), 2)
    keys = [key for batch in found for key, _ in batch.streamed.sources]
    assert keys == ["s0", "s3", "s5", "s0", "s3", "s5", "s0", "s3"]
    told = [str(bad) for batch in found for bad in batch.bad]
    assert len(told) == 8 + 3
    for part in (
        "sample u in {} cannot be used: no label: .cls is missing",
        "sample n in {} cannot be used: no image (jpg, jpeg, png, webp)",
        "sample s2 in {} cannot be used: a suffix occurs twice",
        "sample b in {} cannot be decoded: ",
    ):
        assert any(line.startswith(part.format(tmp_path / "bad.tar")) for line in told), part


def test_a_bad_sample_and_labels_that_are_all_wrong_stop_the_run(streamed, tmp_path: Path) -> None:
    said = r"sample u in .*bad.tar cannot be used: no label: .cls is missing; remove it .* data.on_bad_sample=skip"
    with pytest.raises(DataError, match=said):
        train(streamed(bad_tar(tmp_path), stream_buffer=1), 2)
    write_tar(tmp_path / "a.tar", [member for number in range(7) for member in sample(number, 77)])
    with pytest.raises(DataError, match=r"its label is 77, but data.path has 3 classes, and no other image can"):
        train(streamed(tmp_path / "a.tar", on_bad_sample="skip"), 1)
