"""A checkpoint's training state by parameter name, whatever world size and ZeRO stage wrote it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from karat_scale.checkpoint.tensor_storage import load_tensors
from karat_scale.engine.shards import Fragment, Layout, Pieces
from karat_scale.errors import RunDirectoryError

FORMAT = 2


@dataclass
class SavedState:
    """Masters, optimizer states and averages, read as they are needed from memory-mapped files."""

    shapes: dict[str, tuple[int, ...]]
    """Of all parameters, frozen ones too."""
    masters: Pieces = field(default_factory=Pieces)
    elementwise: dict[str, Pieces] = field(default_factory=dict)
    """Optimizer states of the parameter's size, such as exp_avg and exp_avg_sq."""
    scalars: dict[str, dict[str, float]] = field(default_factory=dict)
    """Optimizer states that are one number, such as step: by key, then by parameter name."""
    ema: Pieces | None = None
    frozen: frozenset[str] = frozenset()
    """Parameters that do not learn: in `masters` and `ema` like the others, but without optimizer states."""
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    counters: dict[str, int] = field(default_factory=dict)
    """DeepSpeed's own counts of steps and samples."""
    loss_scaler: Any = None
    """DeepSpeed's, the same on all ranks; of meaning in fp16."""


def sidecar_name(rank: int) -> str:
    """The file that holds what DeepSpeed's files do not: a rank's random generators, layout and averages."""
    return f"rank-{rank:05d}.pt"


def saved_layout(sidecar: Mapping[str, Any]) -> Layout:
    """The layout in a rank's sidecar."""
    return [[Fragment(*fragment) for fragment in fragments] for fragments in sidecar["layout"]]


def read_state(
    checkpoint: Path, saved: Mapping[str, Any], ranks: Iterable[int] | None = None, parameters: Sequence[str] = ()
) -> SavedState:
    """Open a checkpoint.

    Args:
        checkpoint: its directory, verified.
        saved: its `state.json`.
        ranks: the ranks whose files to open; all that hold something of their own when None.
        parameters: the names of the model's parameters, in the order of its optimizer. Only the first format of
            detection needs them.

    Raises:
        RunDirectoryError: another version wrote it.
    """
    if saved["format"] == 1 and saved.get("kind") == "detection":
        return _read_detection_1(checkpoint, saved, parameters)
    if saved["format"] != FORMAT:
        raise RunDirectoryError(
            f"checkpoint {checkpoint} has format {saved['format']}, this version reads format {FORMAT}; "
            "use the version that wrote it"
        )
    stage = saved["zero_stage"]
    model_file = "zero_pp_rank_0_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
    model = load_tensors(checkpoint / model_file, mmap=True)
    first = load_tensors(checkpoint / sidecar_name(0), mmap=True)
    frozen: dict[str, torch.Tensor] = first.get("frozen") or {}
    shapes = {**first["shapes"], **{name: tuple(value.shape) for name, value in frozen.items()}}
    state = SavedState(shapes=shapes, frozen=frozenset(frozen))
    state.buffers = {name: value for name, value in model["module"].items() if name not in state.shapes}
    state.counters = {key: model[key] for key in ("global_steps", "global_samples", "skipped_steps")}
    if stage == 0:  # every rank had the whole of it
        layout = saved_layout(first)
        masters = [model["module"][fragments[0].name] for fragments in layout]
        _add_rank(state, layout, masters, model["optimizer"]["state"], first["ema"])
        ranks = ()
    for rank in range(saved["world_size"]) if ranks is None else ranks:
        sidecar = load_tensors(checkpoint / sidecar_name(rank), mmap=True)
        masters, states, state.loss_scaler = _read_optimizer_file(checkpoint, rank, stage)
        _add_rank(state, saved_layout(sidecar), masters, states, sidecar["ema"])
    for name, value in frozen.items():
        for pieces in (state.masters, state.ema):
            if pieces is not None:
                pieces.add([Fragment(name, 0, 0, value.numel())], value)
    return state


def _read_detection_1(checkpoint: Path, saved: Mapping[str, Any], parameters: Sequence[str]) -> SavedState:
    """One file of weights and AdamW's states, the same on all ranks."""
    content = load_tensors(checkpoint / "training.pt", mmap=True)
    weights: dict[str, torch.Tensor] = content["model"]
    state = SavedState(shapes={name: tuple(weights[name].shape) for name in parameters if name in weights})
    state.buffers = {name: value for name, value in weights.items() if name not in state.shapes}
    state.counters = {"global_steps": saved["step"], "global_samples": saved["samples"], "skipped_steps": 0}
    layout = [[Fragment(name, 0, 0, weights[name].numel())] for name in state.shapes]
    masters = [weights[name] for name in state.shapes]
    _add_rank(state, layout, masters, content["optimizer"]["state"], ema=None)
    return state


def _read_optimizer_file(
    checkpoint: Path, rank: int, stage: int
) -> tuple[list[torch.Tensor], Mapping[int, Mapping[str, Any]], Any]:
    """A rank's master tensors, the optimizer's states of each, and the loss scaler."""
    # DeepSpeed puts "bf16_" before the name in bf16.
    (path,) = checkpoint.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    content = load_tensors(path, mmap=True)["optimizer_state_dict"]
    scaler = content.get("loss_scaler")
    if stage == 3:
        return content["fp32_flat_groups"], content["optimizer_state_dict"]["state"], scaler
    return content["single_partition_of_fp32_groups"], content["base_optimizer_state"]["state"], scaler


def _add_rank(
    state: SavedState,
    layout: Layout,
    masters: list[torch.Tensor],
    states: Mapping[int, Mapping[str, Any]],
    ema: list[torch.Tensor] | None,
) -> None:
    for number, (fragments, master) in enumerate(zip(layout, masters, strict=True)):
        state.masters.add(fragments, master)
        for key, value in states.get(number, {}).items():
            if isinstance(value, torch.Tensor) and key != "step":
                state.elementwise.setdefault(key, Pieces()).add(fragments, value)
            else:
                state.scalars.setdefault(key, {}).update({fragment.name: float(value) for fragment in fragments})
        if ema is not None:
            state.ema = state.ema or Pieces()
            state.ema.add(fragments, ema[number])
