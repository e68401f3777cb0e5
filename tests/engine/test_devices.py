"""Which GPU a rank takes. What the launchers show is told by numbers: a test machine has one GPU or none."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import timedelta
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist

from karat_scale.engine import distributed
from karat_scale.engine.devices import gpu_index, refuse_shared, tell_deepspeed
from karat_scale.engine.distributed import have_a_gpu_each
from karat_scale.foundation.errors import UserError
from tests.conftest import free_port, karat_environment


@pytest.mark.parametrize(
    ("local_rank", "shown", "index"),
    [(0, 1, 0), (3, 4, 3), (3, 1, 0)],
    ids=["alone", "all shown", "its own shown"],
)
def test_a_rank_takes_its_own_gpu(local_rank: int, shown: int, index: int) -> None:
    assert gpu_index(local_rank, shown) == index


def test_more_ranks_than_gpus_are_refused() -> None:
    with pytest.raises(UserError, match="local rank 2 has no GPU: this node shows 2; start one task per GPU"):
        gpu_index(2, 2)
    refuse_shared(["node1 A100 GPU-1", "node1 A100 GPU-2", "node2 A100 GPU-3"])
    with pytest.raises(UserError, match="ranks 1 and 2 have one GPU, node1 A100 GPU-2; start one task per GPU"):
        refuse_shared(["node1 A100 GPU-1", "node1 A100 GPU-2", "node1 A100 GPU-2"])


def test_every_rank_hears_that_two_have_one_gpu() -> None:
    port = free_port()

    def rank_hears(rank: int) -> None:
        store = dist.TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False)
        try:
            if rank == 2:
                time.sleep(0.5)  # rank 0, which keeps the store, must not leave before
            have_a_gpu_each(dist.PrefixStore("cards", store), rank, 3, f"A100 GPU-{rank % 2}")
        finally:
            del store

    with ThreadPoolExecutor(3) as ranks:
        told = [ranks.submit(rank_hears, rank) for rank in range(3)]
    for one in told:
        with pytest.raises(UserError, match="ranks 0 and 2 have one GPU, A100 GPU-0"):
            one.result()


ON_THE_CPU = """
import sys
import torch
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
from karat_scale.engine import distributed
from karat_scale.training import run  # all that `karat train` imports
from karat_scale.training.tasks.classification import task  # and this
assert "deepspeed" not in sys.modules
distributed.start("cpu")
from deepspeed.accelerator import get_accelerator
print(get_accelerator().device_name())
distributed.stop()
"""


@pytest.mark.slow
def test_run_device_cpu_holds_for_deepspeed_too_where_there_is_a_gpu() -> None:
    given = {key: value for key, value in karat_environment().items() if key != "DS_ACCELERATOR"}
    done = subprocess.run([sys.executable, "-c", ON_THE_CPU], env=given, capture_output=True, text=True, timeout=200)
    assert done.stdout == "cpu\n", done.stderr


def test_another_device_than_deepspeed_was_imported_for_is_one_line(world) -> None:
    import deepspeed  # noqa: F401

    try:
        with pytest.raises(UserError, match=r"run\.device = cuda, but DeepSpeed was imported for cpu in this process;"):
            tell_deepspeed("cuda")
    finally:
        tell_deepspeed("cpu")


@pytest.mark.parametrize("size", [1, 2])
def test_nccl_is_told_its_gpu_if_it_has_peers(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Alone it connects to nobody; bound to its GPU, it would split its communicator for each group of DeepSpeed's."""
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **how: told.append({"backend": backend, **how}))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(distributed, "meet", lambda place: dist.HashStore())  # of ranks that do not exist here
    monkeypatch.setattr(distributed, "Peers", lambda place: Mock(telling=nullcontext, making_a_group=nullcontext))
    monkeypatch.setattr(dist, "new_group", lambda **how: None)
    monkeypatch.setattr(distributed, "card", str)
    monkeypatch.setattr(distributed, "have_a_gpu_each", lambda *ranks: None)
    for device in (torch.device("cuda", 1), torch.device("cpu")):
        distributed._join(0, size, device, timedelta(minutes=1))
    bound = torch.device("cuda", 1) if size > 1 else None
    assert [(how["backend"], how.get("device_id")) for how in told] == [("nccl", bound), ("gloo", None)]
