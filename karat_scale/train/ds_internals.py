"""Every private corner of DeepSpeed that we touch, in one place; a test fails when a release moves one."""

import logging
from typing import Any

import torch


def quieten_and_skip_builds() -> None:
    """Before DeepSpeed joins a process group: no CPU op compiled at start, no banner on standard output."""
    from deepspeed.ops import __compatible_ops__
    from deepspeed.utils import logger

    # The shared-memory all-reduce is compiled for a minute at first use, and gloo does without it.
    __compatible_ops__["deepspeed_shm_comm"] = False
    logger.setLevel(logging.WARNING)


def master_weights(engine: Any) -> list[torch.Tensor]:
    """The fp32 tensors that this rank's optimizer steps, in a fixed order.

    Stage 0: the trainable parameters themselves. Stage 1: one flat shard per parameter group.
    """
    if engine.zero_optimization_stage() == 0:
        return [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    return list(engine.optimizer.single_partition_of_fp32_groups)


def refresh_module(engine: Any) -> None:
    """Make the module's parameters follow the master weights again. Collective at stage 1."""
    if engine.zero_optimization_stage() > 0:
        engine.optimizer.update_lp_params()


def use_storage(engine: Any, storage: Any) -> None:
    """Let `storage` write and read DeepSpeed's checkpoint files."""
    engine.checkpoint_engine = storage


def checkpoint_globals() -> list[Any]:
    """The classes of DeepSpeed's own that its checkpoint files hold; all else in them is plain data."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, ZeroStageEnum, fragment_address]
