"""Nothing grows over ten epochs."""

import gc
import shutil
from pathlib import Path

import psutil
import pytest
import torch

from karat_scale.data.backends import ImageSpec, open_backend
from karat_scale.data.plan import TrainPlan
from karat_scale.recipe import AugmentConfig
from tests.data.betons import make_betons, need_ffcv

EPOCHS, SETTLED = 10, 3


def resident_mb() -> float:
    """Memory of this process and its workers that is no file's: pages of libraries come and go with other programs."""
    gc.collect()
    process = psutil.Process()
    lines = [
        line.split()
        for each in [process, *process.children(recursive=True)]
        for line in Path(f"/proc/{each.pid}/status").read_text().splitlines()
    ]
    return sum(int(line[1]) for line in lines if line[0] in ("RssAnon:", "RssShmem:")) / 1e3


# Each backend and each decoder once, and all of them together where the slow tests run.
SAMPLED = [("folder", "pillow"), ("webdataset", "auto"), ("ffcv", "auto")]
REST = [("folder", "auto"), ("webdataset", "pillow"), ("ffcv", "pillow")]


@pytest.mark.parametrize(
    ("backend", "decoder"), [*SAMPLED, *(pytest.param(*cell, marks=pytest.mark.slow) for cell in REST)]
)
def test_ten_epochs_take_no_more_memory_than_three(image_folder, shards, tmp_path, data_config, backend, decoder):
    if backend == "ffcv":
        need_ffcv()
        copied = tmp_path / "shards"
        shutil.copytree(shards, copied)
        directory = make_betons(copied)
    else:
        directory = image_folder if backend == "folder" else shards
    opened = open_backend(
        ImageSpec(data_config(directory, backend=backend, decoder=decoder, workers=1), AugmentConfig(), 128, 4, 0)
    )
    plan = TrainPlan(0, opened.num_train, 16, 16, 0, 1)
    after: list[float] = []
    for number, batch in enumerate(opened.train_batches(plan.slices(0, EPOCHS * plan.steps_per_epoch)), start=1):
        assert batch.images.dtype == torch.uint8
        if number % plan.steps_per_epoch == 0:
            after.append(resident_mb())
    opened.close()
    assert len(after) == EPOCHS
    # An epoch of decoded images is 3 MB: 22 MB more than at the third epoch if they stayed.
    assert after[-1] - after[SETTLED - 1] < 7, after
