"""torch's random generators of one rank, kept in checkpoints."""

from typing import Any

import numpy as np
import torch

from karat_scale.checkpoint.records import Sidecar


def generator_states(device: torch.device) -> dict[str, Any]:
    """Those of the CPU and, where the rank trains on one, of its GPU, as they are now."""
    return {
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state() if device.type == "cuda" else None,
    }


def restore_generators(states: Sidecar, device: torch.device) -> None:
    """Let them be as `generator_states` found them."""
    torch.set_rng_state(states.rng)
    if states.cuda_rng is not None and device.type == "cuda":
        torch.cuda.set_rng_state(states.cuda_rng)


def seed_generators(seed: int, step: int, rank: int) -> None:
    """Seed the generators of a rank that has none saved: they start from the step."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0]))
