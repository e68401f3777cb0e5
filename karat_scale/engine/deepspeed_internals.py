"""The private corners of DeepSpeed that we touch, here and in `waiting`; a test fails when a release moves one."""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from karat_scale.engine.shards import Fragment, Layout
from karat_scale.engine.waiting import gathers_wait_for_the_weights


def quieten_and_skip_builds() -> None:
    """Before DeepSpeed joins a process group: no CPU op compiled at start, no banner on standard output."""
    from deepspeed import ops
    from deepspeed.utils import logger

    # The shared-memory all-reduce is compiled for a minute at first use, and gloo does without it. DeepSpeed asks for
    # nothing else here, and would run compilers to fill the dictionary by itself.
    vars(ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    logger.setLevel(logging.WARNING)
    # Stage 3 still calls what torch.distributed has renamed; each rank would say so at each new place.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def share_world_group(size: int, patience: timedelta) -> None:
    """Give DeepSpeed its group of all ranks, with our patience: NCCL's own is ten minutes. Collective."""
    from deepspeed.utils import groups

    if size > 1 and groups._WORLD_GROUP is None:
        groups._WORLD_GROUP = dist.new_group(list(range(size)), timeout=patience)


def forget_groups() -> None:
    """Let the next engine make groups of its own: DeepSpeed keeps those of a process group that is destroyed."""
    from deepspeed.utils import groups

    groups._WORLD_GROUP = None
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None


@contextlib.contextmanager
def quiet_initialization() -> Iterator[None]:
    """Keep DeepSpeed's bf16 optimizer from printing the machine's memory, a garbage collection each time."""
    from deepspeed.runtime import bf16_optimizer

    report = bf16_optimizer.see_memory_usage
    bf16_optimizer.see_memory_usage = lambda *_, **__: None
    try:
        yield
    finally:
        bf16_optimizer.see_memory_usage = report


def use_torchs_own_linear() -> None:
    """Undo what an earlier stage 3 engine of this process did to `torch.nn.functional.linear`; a new one does it again.

    DeepSpeed's rounds differently in bf16, so an engine's results would depend on which were built before it.
    """
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses

    own = getattr(InsertPostInitMethodToModuleSubClasses, "linear_bk", None)
    if own is not None:
        torch.nn.functional.linear = own


def master_weights(engine: Any) -> list[torch.Tensor]:
    """The fp32 tensors that this rank's optimizer steps, in the order of its states.

    Stage 0: the trainable parameters. Stages 1 and 2: one flat shard per parameter group. Stage 3: one per sub-group.
    """
    optimizer = engine.optimizer
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if stage == 3:
        return list(optimizer.fp32_partitioned_groups_flat)
    if hasattr(optimizer, "fp32_groups_flat_partition"):  # stage 1 in bf16 has an optimizer of its own
        return list(optimizer.fp32_groups_flat_partition)
    return list(optimizer.single_partition_of_fp32_groups)


def shard_layout(engine: Any) -> Layout:
    """What lies where in each of `master_weights(engine)`."""
    optimizer = engine.optimizer
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return [[Fragment(names[p], 0, 0, p.numel())] for p in master_weights(engine)]
    if stage == 3:
        return [_stage_3_fragments(group, names, engine.global_rank) for group in optimizer.fp16_groups]
    groups = optimizer.bf16_groups if hasattr(optimizer, "bf16_groups") else optimizer.bit16_groups
    return [
        [
            Fragment(names[p], m.lp_fragment_address.start, m.hp_fragment_address.start, m.lp_fragment_address.numel)
            for p in group
            if (m := p._hp_mapping) is not None
        ]
        for group in groups
    ]


def _stage_3_fragments(group: list[Any], names: dict[Any, str], rank: int) -> list[Fragment]:
    """A sub-group is the rank's equal part of each parameter, one after the other; the last rank's may be padded."""
    fragments, offset = [], 0
    for parameter in group:
        size = parameter.partition_numel()
        start = rank * size
        length = min(size, parameter.ds_numel - start)
        if length > 0:
            fragments.append(Fragment(names[parameter], start, offset, length))
        offset += size
    return fragments


def load_optimizer_states(engine: Any, states: list[dict[str, Any]]) -> None:
    """Set the optimizer's states of each of `master_weights(engine)`."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    base = engine.basic_optimizer
    if stage == 3:  # between steps the groups are kept empty
        optimizer._set_fp32_optimizer_param_groups()
    groups = base.state_dict()["param_groups"]
    base.load_state_dict({"state": dict(enumerate(states)), "param_groups": groups})
    counts_in_tensors = not type(base).__module__.startswith("deepspeed.")  # as torch's own optimizers do
    for group in base.param_groups:
        for parameter in group["params"]:
            state = base.state[parameter]
            if "step" in state and counts_in_tensors:
                device = parameter.device if group.get("fused") else "cpu"
                state["step"] = torch.tensor(float(state["step"]), dtype=torch.float32, device=device)
            elif "step" in state:
                state["step"] = int(state["step"])
    if stage == 3:
        optimizer._clear_fp32_optimizer_param_groups()
    elif stage > 0:
        optimizer._link_all_hp_params()


def refresh_module(engine: Any) -> None:
    """Make the module's parameters follow the master weights again. Collective from stage 1 on."""
    optimizer = engine.optimizer
    stage = engine.zero_optimization_stage()
    if stage in (1, 2):
        optimizer.update_lp_params()
    elif stage == 3:
        optimizer._partition_all_parameters()
        for number in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
        persistent = optimizer.persistent_parameters  # small ones, whole on each rank at all times
        if persistent:
            persistent[0].all_gather(persistent)
        gathers_wait_for_the_weights(engine)


@contextlib.contextmanager
def whole_parameters(engine: Any, parameters: list[Any]) -> Iterator[None]:
    """Let parameters of the module be whole inside the block, to be read. Collective at stage 3."""
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(parameters, enabled=engine.zero_optimization_stage() == 3):
        yield


@torch.no_grad()
def set_frozen(engine: Any, values: dict[str, torch.Tensor]) -> None:
    """Copy whole fp32 values into the module's parameters that have no gradient. Collective at stage 3."""
    from deepspeed.runtime.zero import GatheredParameters

    parameters = {name: p for name, p in engine.module.named_parameters() if name in values}
    is_stage_3 = engine.zero_optimization_stage() == 3
    with GatheredParameters(list(parameters.values()), modifier_rank=0, enabled=is_stage_3 and bool(parameters)):
        if not is_stage_3 or engine.global_rank == 0:
            for name, parameter in parameters.items():
                parameter.copy_(values[name])


def forget_gradients(engine: Any) -> None:
    """After a skipped step: clear the sums that DeepSpeed 0.19 keeps at stages 1 and 2 with offload.

    Left there, one NaN would make every later step a skipped one.
    """
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() in (1, 2) and hasattr(optimizer, "averaged_gradients"):
        for group in optimizer.averaged_gradients:
            optimizer.averaged_gradients[group] = None


def loss_scale(engine: Any) -> float:
    """What fp16 losses are multiplied by now."""
    return float(engine.optimizer.loss_scaler.cur_scale)


def keep_least_loss_scale(engine: Any) -> None:
    """Let overflows at the least loss scale be skipped like others, and not raise: the recipe says when to give up."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is not None and scaler.dynamic:
        scaler.raise_error_at_min_scale = False


def load_loss_scaler(engine: Any, saved: Any) -> None:
    """Resume a dynamic loss scale from that of a checkpoint, if both are dynamic."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is not None and scaler.dynamic and getattr(saved, "dynamic", False):
        for name in ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis"):
            setattr(scaler, name, getattr(saved, name))


def use_storage(engine: Any, storage: Any) -> None:
    """Let `storage` write and read DeepSpeed's checkpoint files.

    DeepSpeed copies its converter scripts beside them itself, on one rank, in the middle of a collective save: where
    the disk does not take them the storage must know, and nothing be raised.
    """
    engine.checkpoint_engine = storage
    copy_scripts = engine._copy_recovery_script

    def copy_or_note(save_path: str) -> None:
        try:
            copy_scripts(save_path)
        except OSError as error:
            storage.error = storage.error or error

    engine._copy_recovery_script = copy_or_note


def checkpoint_globals() -> list[Any]:
    """The classes of DeepSpeed's own that its checkpoint files hold; all else in them is plain data."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


class _RecomputeFirst(torch.autograd.Function):
    """The identity, at the end of what is recomputed: asking for a saved tensor, its backward pass sets that off.

    Set off by the last layer, it would end with stage 3 taking back the weight that this layer had just been given.
    """

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(output.new_empty(0))
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        _ = ctx.saved_tensors
        return grad


def deepspeed_checkpoint() -> Callable[..., Any]:
    """DeepSpeed's non-reentrant activation checkpoint, set up for this process.

    Its reentrant one adds up the gradients of a parameter that blocks share in another order, and ZeRO meets each part.
    """
    quieten_and_skip_builds()
    import deepspeed

    deepspeed.init_distributed(dist_init_required=False)
    deepspeed.checkpointing.configure(None, partition_activations=False, checkpoint_in_cpu=False)

    def checkpoint(function: Callable[..., Any], *tensors: torch.Tensor) -> Any:
        device = tensors[0].device.type
        dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)

        def as_now(*inputs: torch.Tensor) -> Any:
            with torch.autocast(device, dtype, enabled):  # DeepSpeed would recompute without it
                after: Callable[..., Any] = _RecomputeFirst.apply
                return after(function(*inputs))

        # It empties the tensors that it is given; others may still need them.
        own = (tensor.view_as(tensor) for tensor in tensors)
        return deepspeed.checkpointing.non_reentrant_checkpoint(as_now, *own)

    return checkpoint
