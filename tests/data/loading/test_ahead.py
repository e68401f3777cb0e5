import gc
import threading

import pytest
import torch

from karat_scale.data.batch import Batch
from karat_scale.data.loading.device_feed import RunAhead
from karat_scale.foundation.errors import DataError


def batch(number: int) -> Batch:
    return Batch(*(torch.tensor([number]) for _ in range(4)), batch=number)


class Source:
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
    source = Source(20)
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
def test_an_error_comes_after_the_batches_before_it(error):
    ahead = RunAhead(Source(2, error).batches(), 5, 10.0, str)
    assert [next(ahead).batch, next(ahead).batch] == [0, 1]
    with pytest.raises(type(error)) as caught:
        next(ahead)
    assert caught.value is error
    assert next(ahead, None) is None


def test_closing_and_forgetting_end_the_thread():
    before = threads()
    for end in (RunAhead.close, lambda ahead: None):
        source = Source(10**9)
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
