"""Which GPU a rank takes. What the launchers show is told by numbers: a test machine has one GPU or none."""

import pytest

from karat_scale.errors import UserError
from karat_scale.train.devices import gpu_index, refuse_shared


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
