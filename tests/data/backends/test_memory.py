"""The memory of a loader and its workers does not grow over ten epochs."""

import json
import shutil
import sys

import pytest

from tests.conftest import output_of
from tests.data.betons import make_betons, need_ffcv

EPOCHS, SETTLED = 10, 3
# SAMPLED has each backend and each decoder once, and REST the other pairs.
SAMPLED = [("folder", "pillow"), ("webdataset", "auto"), ("ffcv", "auto"), ("dali", "auto")]
REST = [("folder", "auto"), ("webdataset", "pillow"), ("ffcv", "pillow")]


@pytest.mark.slow
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
        if backend == "dali":
            pytest.importorskip("nvidia.dali", reason="the extra `dali` is not installed")
        directory = image_folder if backend == "folder" else shards
    config = data_config(directory, backend=backend, decoder=decoder, workers=1).model_dump_json()
    said = output_of(sys.executable, "-m", "tests.data.backends.epoch_memory", config, EPOCHS)
    after = json.loads(said.splitlines()[-1])
    assert len(after) == EPOCHS
    # An epoch of decoded images is 3 MB. If they stayed, the memory would grow by 22 MB after the third epoch.
    assert after[-1] - after[SETTLED - 1] < 7, after
