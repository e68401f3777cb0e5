import os
import threading

import pytest

from karat_scale.data.backends import ImageSpec, open_backend
from karat_scale.data.shards.shard_format import unused_classes
from karat_scale.foundation.errors import DataError
from karat_scale.recipe import AugmentConfig


@pytest.mark.parametrize("backend", ["folder", "webdataset", "ffcv", "dali"])
def test_a_path_that_does_not_answer_is_an_error_in_time(tmp_path, data_config, backend):
    path = tmp_path / "dead"
    os.mkfifo(path)  # opening it waits, as a dead server's directory does
    with pytest.raises(DataError, match=rf"^data.path = {path} did not answer for data.timeout = 0.2 s; check its"):
        open_backend(ImageSpec(data_config(path, backend=backend, timeout=0.2), AugmentConfig(), 16, 3, 0))
    os.close(os.open(path, os.O_WRONLY))
    for thread in threading.enumerate():
        if thread.name == "karat-ask":
            thread.join(5)
            assert not thread.is_alive()


def test_a_path_that_is_missing_is_told_at_once(tmp_path, data_config):
    with pytest.raises(DataError, match=r"nowhere is not a directory"):
        open_backend(ImageSpec(data_config(tmp_path / "nowhere", timeout=300), AugmentConfig(), 16, 3, 0))


def test_classes_that_are_never_seen_are_told():
    assert unused_classes(4, 4) == ""
    assert "the data has 4 classes, but model.num_classes = 5" in unused_classes(4, 5)
