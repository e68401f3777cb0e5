"""The folder backend gives the batches that its shards give, and names what a worker hangs on."""

import time

import psutil
import pytest
import torch

from karat_scale.data.backends import ImageSpec, open_backend
from karat_scale.data.plan import EvalPlan, TrainPlan
from karat_scale.data.shards import folder
from karat_scale.foundation.errors import DataError
from karat_scale.recipe import AugmentConfig


@pytest.mark.parametrize("order", ["full", "block"])
def test_folder_and_shards_train_alike(image_folder, shards, data_config, order):
    def batches(directory, backend, workers):
        config = data_config(directory, backend=backend, workers=workers, order=order, block_samples=5, window_blocks=3)
        opened = open_backend(ImageSpec(config, AugmentConfig(erasing=0.3), 16, 4, 5))
        plan = TrainPlan(5, opened.num_train, 12, 6, 0, 1, order, 5, 3)
        train = list(opened.train_batches(plan.slices(2, 8)))
        val = list(opened.eval_batches(EvalPlan(opened.num_val, 5, 0, 1).slices()))
        opened.close()
        return train + val

    from_folder = batches(image_folder, "folder", 1)
    from_shards = batches(shards, "webdataset", 0)
    assert len(from_folder) == len(from_shards) == 18
    for one, two in zip(from_folder, from_shards, strict=True):
        assert one.draws == two.draws
        for field in ("images", "labels", "sample_ids", "valid"):
            assert torch.equal(getattr(one, field), getattr(two, field)), field
    assert all(len(batch.draws) == 6 for batch in from_folder[:12])


def test_a_file_system_that_stalls_is_an_error_that_names_the_file(tmp_path, data_config, capfd, monkeypatch):
    for split in ("train", "val"):
        (tmp_path / split / "ant").mkdir(parents=True)
        (tmp_path / split / "ant" / "stuck.jpg").touch()
    monkeypatch.setattr(folder, "read_image", lambda _: time.sleep(600))  # as a file of a dead server does
    before = set(psutil.Process().children())
    config = data_config(tmp_path, backend="folder", workers=1, timeout=1)
    backend = open_backend(ImageSpec(config, AugmentConfig(), 16, 2, 0))
    with pytest.raises(DataError) as caught:
        next(backend.train_batches(TrainPlan(0, 1, 1, 1, 0, 1).slices(0, 1)))
    path = tmp_path / "train" / "ant" / "stuck.jpg"
    assert f"no batch came for data.timeout = 1 s: worker 0 at sample 0 in {path};" in str(caught.value)
    stack = capfd.readouterr().err  # of the worker
    assert "(most recent call first)" in stack
    assert "in _serve" in stack
    assert not [p for p in psutil.Process().children() if p not in before and p.status() != psutil.STATUS_ZOMBIE]
