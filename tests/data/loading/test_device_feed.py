"""Batches come to the device in their order, ahead of need, and errors in their turn."""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from karat_scale.data.batch import Batch
from karat_scale.data.loading.device_feed import LAUNCHED_AHEAD, DeviceFeed, RunAhead
from karat_scale.foundation.errors import DataError
from tests.streams import Streams, streams

__all__ = ["streams"]
CPU, EMULATED = torch.device("cpu"), torch.device("meta")


def batch(number: int) -> Batch:
    return Batch(*(torch.tensor([number]) for _ in range(4)), batch=number)


class Source:
    """Batches 0 .. count - 1, then an error if there is one; counts what was asked for."""

    def __init__(self, count: int, error: Exception | None = None) -> None:
        self.made: list[Batch] = []
        self._count, self._error = count, error

    def __iter__(self) -> Iterator[Batch]:
        for number in range(self._count):
            self.made.append(batch(number))
            yield self.made[-1]
        if self._error:
            raise self._error


def test_a_cpu_is_handed_the_batches_themselves_when_it_asks() -> None:
    source = Source(3)
    feed = DeviceFeed(source, CPU)
    for number in range(3):
        feed.fetch_ahead()
        assert len(source.made) == number
        assert next(feed) is source.made[number]
    assert next(feed, None) is None


def test_the_next_batch_is_copied_while_the_device_works(streams: Streams) -> None:
    source = Source(2)
    feed = DeviceFeed(source, EMULATED)
    first = next(feed)
    assert first.images.device == first.labels.device == first.valid.device == EMULATED
    assert first.sample_ids.tolist() == [0]  # stay on the host
    streams.notes.clear()
    streams.notes.append("work on batch 0 is launched")
    feed.fetch_ahead()
    feed.fetch_ahead()
    streams.notes.append("next")
    assert next(feed).batch == 1
    copy = [*3 * ["pin"], "begin copies", "end copies", "event in copies"]
    assert streams.notes == [
        "work on batch 0 is launched",
        "event in compute",
        *copy,
        "next",
        "compute waits for copies",
        *3 * ["kept for compute"],
    ]
    assert next(feed, None) is None


def test_the_host_waits_only_when_it_is_too_far_ahead_of_the_device(streams: Streams) -> None:
    feed = DeviceFeed(Source(100), EMULATED)
    for _ in range(10):
        next(feed)
        feed.fetch_ahead()
    assert not [note for note in streams.notes if note.startswith("host")]
    streams.is_done = False
    streams.notes.clear()
    for _ in range(10):
        next(feed)
        feed.fetch_ahead()
    waits = [note for note in streams.notes if note in ("event in compute", "host waits for compute")]
    assert waits == 10 * ["event in compute", "host waits for compute"]
    streams.notes.clear()
    feed = DeviceFeed(Source(LAUNCHED_AHEAD), EMULATED)
    assert len(list(feed)) == LAUNCHED_AHEAD
    assert streams.notes.count("host waits for compute") == 1  # to learn that there are no more


@pytest.mark.parametrize("device", [CPU, EMULATED])
@pytest.mark.parametrize("error", [DataError("bad"), RuntimeError("odd")])
def test_an_error_comes_after_the_batches_before_it(streams: Streams, device: torch.device, error: Exception) -> None:
    feed = DeviceFeed(Source(2, error), device)
    numbers = []
    for _ in range(2):
        numbers.append(next(feed).batch)
        feed.fetch_ahead()
    assert numbers == [0, 1]
    with pytest.raises(type(error)) as caught:
        next(feed)
    assert caught.value is error
    assert next(feed, None) is None


def test_what_is_on_the_device_already_is_not_pinned(streams: Streams) -> None:
    made = batch(0)
    there = Batch(made.images.to("meta"), made.labels, made.sample_ids, made.valid)
    assert next(DeviceFeed([there], EMULATED)).images is there.images
    assert streams.notes.count("pin") == 2


@pytest.mark.parametrize("device", [CPU, EMULATED])
def test_waiting_for_data_is_told_apart_from_waiting_for_the_device(streams: Streams, device: torch.device) -> None:
    @contextmanager
    def waiting() -> Iterator[None]:
        streams.notes.append("wait")
        try:
            yield
        finally:
            streams.notes.append("got it")

    feed = DeviceFeed(Source(5), device, waiting)
    streams.is_done = False
    assert len([(one, feed.fetch_ahead()) for one in feed]) == 5
    inside = [streams.notes[at + 1] for at, note in enumerate(streams.notes) if note == "wait"]
    assert inside == 6 * ["got it"]


class Counted:
    """Batches 0 .. count - 1, then an error where there is one.

    `asked`: what the reader has asked for, which it counts itself; `ahead`: how many more than that were made at most.
    """

    def __init__(self, count: int, error: BaseException | None = None) -> None:
        self.count, self.error, self.ended = count, error, threading.Event()
        self.asked = self.ahead = 0
        self.made = threading.Semaphore(0)

    def batches(self):
        try:
            for number in range(self.count):
                self.ahead = max(self.ahead, number + 1 - self.asked)
                self.made.release()
                yield batch(number)
            if self.error:
                raise self.error
        finally:
            self.ended.set()


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "karat-ahead"]


def test_batches_come_in_order_and_no_more_than_asked_are_made_ahead():
    source = Counted(20)
    ahead = RunAhead(source.batches(), 3, 10.0, str)
    for _ in range(3):
        assert source.made.acquire(timeout=5)
    numbers = []
    for source.asked in range(1, 21):
        numbers.append(next(ahead).batch)
    assert numbers == list(range(20))
    assert source.ended.wait(5)
    assert source.ahead == 3
    assert next(ahead, None) is None


@pytest.mark.parametrize("error", [DataError("bad"), RuntimeError("odd")])
def test_an_error_of_the_thread_comes_after_the_batches_before_it(error):
    ahead = RunAhead(Counted(2, error).batches(), 5, 10.0, str)
    assert [next(ahead).batch, next(ahead).batch] == [0, 1]
    with pytest.raises(type(error)) as caught:
        next(ahead)
    assert caught.value is error
    assert next(ahead, None) is None


def test_closing_and_forgetting_end_the_thread():
    before = threads()
    for end in (RunAhead.close, lambda ahead: None):
        source = Counted(10**9)
        ahead = RunAhead(source.batches(), 2, 10.0, str)
        next(ahead)
        end(ahead)
        del ahead
        gc.collect()
        assert source.ended.wait(5)
    assert threads() == before


@pytest.mark.timeout(60)
def test_a_batch_that_does_not_come_is_an_error_that_says_what_is_waited_for(monkeypatch):
    monkeypatch.setattr(
        "karat_scale.data.loading.device_feed.CLOSE_SECONDS", None
    )  # who waits for the thread waits for ever
    held = threading.Event()

    def batches():
        yield batch(0)
        held.wait()

    ahead = RunAhead(batches(), 2, 0.2, lambda: "reading sample 7 in a.tar")
    next(ahead)
    with pytest.raises(DataError, match=r"^no batch came for data.timeout = 0.2 s: reading sample 7 in a.tar \(raise"):
        next(ahead)
    ahead.close()
    assert next(ahead, None) is None
    held.set()
