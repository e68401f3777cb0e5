"""What is fetched together and ahead, by the order and the ranks."""

import pytest

from karat_scale.data.shards.cache import RemoteUse
from karat_scale.recipe import DataConfig


@pytest.mark.parametrize(
    ("environ", "ahead", "full"),
    [
        ({}, 8192, 8192),
        ({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, 512, 65536),
        ({"SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NUM_NODES": "4"}, 512, 32768),
    ],
)
def test_a_window_is_fetched_ahead_by_all_ranks_together(environ, ahead, full, monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    data = DataConfig(path="s3://bucket/set", order="block")
    block = RemoteUse.of(data, training=True)
    assert (block.together, block.ahead, block.working_set) == (256, ahead, 2 * 8192)
    one = RemoteUse.of(data.changed(order="full"), training=True)
    assert (one.together, one.ahead, one.working_set) == (1, 1024, full)
    assert RemoteUse.of(data, training=False).together == 64
