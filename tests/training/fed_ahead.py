"""Training with batches fetched ahead, as for a GPU, on the CPU."""

import pytest
import torch

from karat_scale.data.loading import device_feed
from karat_scale.training.tasks.classification import task
from tests.streams import Streams


class FeedAhead(device_feed.DeviceFeed):
    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self._copies = device_feed._Copies(torch.device("cpu"))


def feed_ahead(streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test ends."""
    del streams  # only to say that they must be there
    for module in (task, task):
        monkeypatch.setattr(module, "DeviceFeed", FeedAhead)
