"""Whole fp32 weights out of a checkpoint, raw or averaged, whatever number of ranks wrote it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from karat_scale.errors import RunDirectoryError
from karat_scale.train.checkpoint import sidecar_name
from karat_scale.train.tensor_storage import load_tensors

_MODEL_FILE = "mp_rank_00_model_states.pt"


def load_weights(model: nn.Module, checkpoint: Path, saved: Mapping[str, Any], ema: bool) -> None:
    """Copy a checkpoint's weights into `model`, in place, in the model's dtype.

    Args:
        model: the model the checkpoint is of, not partitioned.
        checkpoint: its directory, verified.
        saved: its `state.json`.
        ema: take the averaged weights, else the raw ones.

    Raises:
        RunDirectoryError: there are no averages in it, or it holds another model.
    """
    if ema and not saved["has_ema"]:
        raise RunDirectoryError(f"{checkpoint}: has no EMA weights; use --weights raw")
    states = load_tensors(checkpoint / _MODEL_FILE)
    parameters = dict(model.named_parameters())
    try:
        model.load_state_dict(states["module"])  # buffers, and all there is at stage 0
        with torch.no_grad():
            for name, value in _masters(checkpoint, saved, states, ema, list(parameters)):
                parameters[name].copy_(value)
    except (RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise RunDirectoryError(f"checkpoint {checkpoint} holds another model: {reason}") from error


def _masters(
    checkpoint: Path, saved: Mapping[str, Any], states: Mapping[str, Any], ema: bool, names: list[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    if saved["zero_stage"] == 0:
        if ema:
            yield from zip(names, load_tensors(checkpoint / sidecar_name(0))["ema"], strict=True)
        return
    ranks = [_shards(checkpoint, rank, ema) for rank in range(saved["world_size"])]
    for shards, shapes in zip(zip(*ranks, strict=True), states["param_shapes"], strict=True):
        flat = torch.cat([shard.flatten() for shard in shards])
        offset = 0
        for name, shape in shapes.items():
            yield name, flat[offset : offset + shape.numel()].view(shape)
            offset += shape.numel()


def _shards(checkpoint: Path, rank: int, ema: bool) -> list[torch.Tensor]:
    """One rank's flat fp32 shard of each parameter group."""
    if ema:
        shards: list[torch.Tensor] = load_tensors(checkpoint / sidecar_name(rank))["ema"]
        return shards
    # DeepSpeed puts "bf16_" before the name in bf16.
    (path,) = checkpoint.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    masters: list[torch.Tensor] = load_tensors(path)["optimizer_state_dict"]["single_partition_of_fp32_groups"]
    return masters
