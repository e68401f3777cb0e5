"""How a recipe uses samples at a URL: what is fetched together, how far ahead, and what the cache must hold."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from karat_scale.foundation.stores import DEFAULT_TIMEOUT
from karat_scale.recipe import DataConfig

# Samples that are fetched together, and ahead, where the order does not say it.
_TOGETHER, _AHEAD = 64, 1024
# Of each rank, in `order: full`: those ahead, those that workers were given, and as many that were used lately.
_HELD = 8 * _AHEAD


@dataclass(frozen=True)
class RemoteUse:
    """How the samples at a URL are used.

    Attributes:
        timeout: data.timeout.
        cache_gb: data.cache_gb.
        together: the consecutive samples that are fetched by one request.
        ahead: the samples of a rank that may be fetched before its workers are given them.
        working_set: the samples that the node's cache must hold at a time.
    """

    timeout: float = DEFAULT_TIMEOUT
    cache_gb: float = 20.0
    together: int = 1
    ahead: int = _AHEAD
    working_set: int = 0

    @classmethod
    def of(cls, data: DataConfig, training: bool) -> "RemoteUse":
        """Return how a recipe uses a split, on each of the ranks that the environment tells of."""
        ranks, on_this_node = _ranks(os.environ)
        if training and data.order == "block":
            # All ranks use one window at a time, while the next is fetched.
            window = data.block_samples * data.window_blocks
            return cls(data.timeout, data.cache_gb, data.block_samples, -(-window // ranks), 2 * window)
        return cls(data.timeout, data.cache_gb, 1 if training else _TOGETHER, _AHEAD, _HELD * on_this_node)


def _ranks(environ: Mapping[str, str]) -> tuple[int, int]:
    """Return the ranks of the run and those of this node, as torchrun or srun tells them."""
    if "WORLD_SIZE" in environ:
        ranks = int(environ["WORLD_SIZE"])
        return ranks, int(environ.get("LOCAL_WORLD_SIZE", ranks))
    ranks = int(environ.get("SLURM_STEP_NUM_TASKS", "1"))
    return ranks, -(-ranks // int(environ.get("SLURM_STEP_NUM_NODES", "1")))
