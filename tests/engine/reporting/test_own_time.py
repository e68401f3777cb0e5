import pytest
import torch

from karat_scale.engine.reporting.interval import MOST_WAITING, OwnTime
from tests.clock import Clock
from tests.streams import Streams, streams

__all__ = ["streams"]


def test_data_and_forward_passes_add_up_until_they_are_taken() -> None:
    clock = Clock()
    own_time = OwnTime(torch.device("cpu"), clock)
    with own_time.data():
        clock.go(2.0)
    clock.go(5.0)  # waiting for others is not its own
    with own_time.forward():
        clock.go(1.0)
    assert own_time.take() == 3.0
    assert own_time.take() == 0.0


def test_a_gpus_forward_passes_are_read_when_they_are_taken(streams: Streams) -> None:
    clock = Clock()
    own_time = OwnTime(torch.device("cuda"), clock)
    for _ in range(3):
        with own_time.forward():
            clock.go(7.0)  # the host's clock does not matter
            streams.notes.append("work")
    assert not any("waits" in note for note in streams.notes)
    assert own_time.take() == pytest.approx(3 * 2 / 1e3)  # the events are two notes apart, in milliseconds
    assert streams.notes.count("host waits for compute") == 3
    assert own_time.take() == 0.0


@pytest.mark.parametrize("is_done", [True, False])
def test_passes_that_are_done_do_not_pile_up(streams: Streams, is_done: bool) -> None:
    own_time = OwnTime(torch.device("cuda"), Clock())
    streams.is_done = is_done
    passes = 10 * MOST_WAITING
    for _ in range(passes):
        with own_time.forward():
            pass
    assert (len(own_time._waiting) <= MOST_WAITING) == is_done
    assert not any("waits" in note for note in streams.notes)
    assert own_time.take() == pytest.approx(passes / 1e3)
