"""Batches come to the device in order and ahead of need, and an error comes after the batches before it."""

import gc
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager

import pytest
import torch

from karat_scale.data.batch import Batch
from karat_scale.data.loading import device_feed
from karat_scale.data.loading.device_feed import LAUNCHED_AHEAD, DeviceFeed, RunAhead
from karat_scale.foundation.errors import DataError
from tests.conftest import wait_until
from tests.streams import Streams, streams

__all__ = ["streams"]
CPU, EMULATED = torch.device("cpu"), torch.device("meta")


def batch(number: int) -> Batch:
    return Batch(*(torch.tensor([number]) for _ in range(4)), batch=number)


class Source:
    """Yields batches 0 .. count - 1, then raises the error if there is one. `made` has the batches so far.

    A reader counts in `asked` the batches that it has asked for. `ahead` is how many more than these were made at most.
    """

    def __init__(self, count: int, error: Exception | None = None) -> None:
        self.made: list[Batch] = []
        self.asked = self.ahead = 0
        self.ended = threading.Event()
        self._count, self._error = count, error

    def __iter__(self) -> Generator[Batch, None, None]:
        try:
            for number in range(self._count):
                self.made.append(batch(number))
                self.ahead = max(self.ahead, len(self.made) - self.asked)
                yield self.made[-1]
            if self._error:
                raise self._error
        finally:
            self.ended.set()


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
    assert first.sample_ids.tolist() == [0]  # these stay on the host
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
    streams.notes.clear()
    there = Batch(batch(0).images.to("meta"), *(torch.tensor([0]) for _ in range(3)))
    assert next(DeviceFeed([there], EMULATED)).images is there.images
    assert streams.notes.count("pin") == 2  # not what is on the device already


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


@pytest.mark.parametrize("device", [CPU, EMULATED, None])
@pytest.mark.parametrize("error", [DataError("bad"), RuntimeError("odd")])
def test_an_error_comes_after_the_batches_before_it(streams: Streams, device: torch.device | None, error) -> None:
    source = Source(2, error)
    feed = DeviceFeed(source, device) if device else RunAhead(iter(source), 5, 10.0, str)
    numbers = []
    for _ in range(2):
        numbers.append(next(feed).batch)
        if device:
            feed.fetch_ahead()
    assert numbers == [0, 1]
    with pytest.raises(type(error)) as caught:
        next(feed)
    assert caught.value is error
    assert next(feed, None) is None


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


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "karat-ahead"]


def test_batches_come_in_order_and_no_more_than_asked_are_made_ahead():
    source = Source(20)
    ahead = RunAhead(iter(source), 3, 10.0, str)
    wait_until(lambda: len(source.made) == 3)
    numbers = []
    for source.asked in range(1, 21):
        numbers.append(next(ahead).batch)
    assert numbers == list(range(20))
    assert source.ended.wait(60)
    assert source.ahead == 3
    assert next(ahead, None) is None


def test_closing_and_forgetting_end_the_thread():
    before = threads()
    for end in (RunAhead.close, lambda ahead: None):
        source = Source(10**9)
        ahead = RunAhead(iter(source), 2, 10.0, str)
        next(ahead)
        end(ahead)
        del ahead
        gc.collect()
        assert source.ended.wait(60)
    assert threads() == before


@pytest.mark.timeout(60)
def test_a_batch_that_does_not_come_is_an_error_that_says_what_is_waited_for(monkeypatch):
    monkeypatch.setattr(device_feed, "CLOSE_SECONDS", None)  # waiting for the thread would never end
    held = threading.Event()

    def batches():
        yield batch(0)
        held.wait()

    ahead = RunAhead(batches(), 2, 0.2, lambda: "reading sample 7 in a.tar")
    wait_until(lambda: not ahead._made.empty())
    next(ahead)
    with pytest.raises(DataError, match=r"^no batch came for data.timeout = 0.2 s: reading sample 7 in a.tar \(raise"):
        next(ahead)
    ahead.close()
    assert next(ahead, None) is None
    held.set()
