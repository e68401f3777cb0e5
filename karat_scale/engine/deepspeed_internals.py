"""The private parts of DeepSpeed that we use; a test fails when a release moves one.

It also replaces the places where DeepSpeed makes the host wait for the device.
"""

import contextlib
import functools
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from karat_scale.engine.peers import CONNECTING
from karat_scale.engine.shards import Fragment, Layout
from karat_scale.foundation.machine import Background

# Seconds between two looks at whether all ranks have connected.
_POLL_SECONDS = 1.0


def average_gradients_in_few_copies(engine: Any) -> None:
    """Stage 0: copy a bucket's averages back in one operation, not one per parameter; in none if one rank trains."""
    average = engine.allreduce_bucket

    def average_in_place(bucket: list[torch.Tensor], group: Any, world_size: Any = None) -> None:
        if engine.dp_world_size > 1:
            averages = engine.unflatten(average(bucket, group, world_size), bucket)
            torch._foreach_copy_(bucket, averages)

    engine.allreduce_and_copy = average_in_place


def check_by_the_norm(engine: Any) -> None:
    """Stages 1 to 3: skip the search for overflows in each gradient; the norm of all gradients shows them."""
    optimizer = engine.optimizer
    optimizer.check_overflow = lambda *_, **__: None
    optimizer.update_offload_overflow_tracker = lambda *_: None
    if hasattr(optimizer, "averaged_gradients") and not engine.zero_offload_optimizer():
        optimizer.scaled_global_norm = functools.partial(_norm_of_shards, optimizer)  # stages 1 and 2
        optimizer._get_norm_groups = lambda: [_norm_of_shards(optimizer)]  # stage 3


def _norm_of_shards(optimizer: Any) -> torch.Tensor:
    """Return DeepSpeed's norm, which DeepSpeed computes gradient by gradient and group by group. Collective."""
    gradients = [gradient for group in optimizer.averaged_gradients.values() for gradient in group]
    total = _square(gradients)
    dist.all_reduce(total, group=optimizer.dp_process_group)
    return total.sqrt().float()


def _square(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of the squares of all elements, 0-dim, in fp64: as fp32 it is nearly always the same in any order."""
    return torch.stack(torch._foreach_norm(list(gradients), 2, dtype=torch.float64)).square().sum()


def reduce_in_few_operations(engine: Any) -> None:
    """Stages 1 to 3 without `contiguous_gradients`: handle a bucket's gradients at once where DeepSpeed has a loop.

    With `contiguous_gradients`, at stages 1 and 2: keep the gradient of a parameter larger than a bucket until the
    stream that reduces it is done. DeepSpeed frees it before.
    """
    optimizer, is_stage_3 = engine.optimizer, engine.zero_optimization_stage() == 3
    if not getattr(optimizer, "contiguous_gradients", True):
        if not is_stage_3:
            optimizer.allreduce_and_copy = functools.partial(_average_bucket, optimizer)
            if optimizer.overlap_comm and optimizer.reduction_stream is not None:
                _wait_for_hooks_on_other_streams(optimizer)
        elif not engine.zero_offload_optimizer():
            optimizer.partition_grads = functools.partial(_keep_own_parts, optimizer)
    elif not is_stage_3 and getattr(optimizer, "reduction_stream", None) is not None and optimizer.overlap_comm:
        average = optimizer.average_tensor

        def average_and_keep(gradients: torch.Tensor, dtype: torch.dtype) -> None:
            gradients.record_stream(optimizer.reduction_stream)
            average(gradients, dtype)

        optimizer.average_tensor = average_and_keep


def _wait_for_hooks_on_other_streams(optimizer: Any) -> None:
    """Let reductions wait for gradient hooks on other streams, as with torch.compile (DeepSpeed's issue 8061).

    DeepSpeed waits for the whole device here; in `device_waits_for_itself`, only two streams wait for each other.
    """
    from deepspeed.accelerator import get_accelerator

    accelerator, put_into_bucket = get_accelerator(), optimizer.reduce_independent_p_g_buckets_and_remove_grads

    def wait_and_put(param: Any, group: int) -> None:
        if accelerator.current_stream() != accelerator.default_stream():
            optimizer.reduction_stream.wait_stream(accelerator.current_stream())
        put_into_bucket(param, group)

    optimizer.reduce_independent_p_g_buckets_and_remove_grads = wait_and_put


def _average_bucket(optimizer: Any, bucket: list[torch.Tensor], dtype: torch.dtype, **how: Any) -> None:
    """Stages 1 and 2: average gradients over ranks in place."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    stream = accelerator.current_stream()
    if optimizer.overlap_comm:
        stream = optimizer.reduction_stream
        accelerator.synchronize()  # in `device_waits_for_itself`: the streams wait for each other
        optimizer._clear_previous_reduced_grads()  # the last bucket's are not in use any more
    with accelerator.stream(stream):
        averages = optimizer.allreduce_bucket(bucket, dtype, divide=how["divide"], process_group=how["process_group"])
        torch._foreach_copy_(bucket, optimizer.unflatten(averages, bucket))


def _keep_own_parts(optimizer: Any, params: list[Any], parts: list[torch.Tensor]) -> None:
    """Stage 3: add this rank's parts of averages to those of earlier micro batches, and free the whole gradients."""
    from deepspeed.accelerator import get_accelerator

    kept_parts = optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
    rank = dist.get_rank(optimizer.dp_process_group)
    own = [(p, part) for p, part in zip(params, parts, strict=True) if p.partition_numel() * rank < p.ds_numel]
    kept = [kept_parts[param.ds_id].narrow(0, 0, part.numel()) for param, part in own]
    if own and optimizer.micro_step_id == 0:  # these take no empty list
        torch._foreach_copy_(kept, [part for _, part in own])
    elif own:
        torch._foreach_add_(kept, [part for _, part in own])
    for param in params:
        if not get_accelerator().is_synchronized_device():
            param.grad.record_stream(get_accelerator().current_stream())
        param.grad = None


_judge: list[Callable[[torch.Tensor], bool]] = []
"""The judge of the current step: one, or none between steps."""


@contextlib.contextmanager
def step_judged_by(is_invalid: Callable[[torch.Tensor], bool]) -> Iterator[None]:
    """Stages 1 to 3: inside the block DeepSpeed asks `is_invalid` once per step about the gradients' norm.

    `is_invalid` gets the norm of the scaled gradients, which is still on the device, and not finite if a gradient is
    not. DeepSpeed skips the step if the answer is True.
    """
    answers: list[bool] = []

    def judge(norm: torch.Tensor) -> bool:
        if not answers:
            answers.append(is_invalid(norm))
        return answers[0]

    _judge.append(judge)
    try:
        yield
    finally:
        _judge.clear()


@functools.cache
def patch_modules() -> None:
    """Let DeepSpeed's modules ask the step's judge, for the rest of this process, and not read norms themselves.

    DeepSpeed would read the norm once per parameter group, and once more to replace it with -1.
    """
    from deepspeed.runtime import bf16_optimizer, utils
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    combine = stage3.combine_grad_norm_groups
    for module in (bf16_optimizer, stage_1_and_2, stage3):
        module.is_invalid_grad_norm = lambda norm: _judge[0](norm)
    for module in (utils, stage_1_and_2):  # a norm that is not finite says so itself
        module.mask_nan_or_inf_with_val_inplace = lambda *_, **__: None
    bf16_optimizer.clip_tensors_by_global_norm = _clip_by_norm
    # Each rank has the gradients whole.
    bf16_optimizer.get_global_norm_of_tensors = lambda input_tensors, **_: _square(input_tensors).sqrt().float()
    stage3.combine_grad_norm_groups = lambda norms, **how: norms[0] if len(norms) == 1 else combine(norms, **how)
    # It would print the machine's memory, after a garbage collection each time.
    bf16_optimizer.see_memory_usage = lambda *_, **__: None


def _clip_by_norm(input_tensors: list[torch.Tensor], max_norm: float, global_norm: torch.Tensor, **_: Any) -> None:
    """Clip as DeepSpeed does, but without reading the norm to see whether there is something to clip."""
    torch._foreach_mul_(list(input_tensors), (max_norm / (global_norm + 1e-6)).clamp(max=1.0))


@contextlib.contextmanager
def device_waits_for_itself(engine: Any) -> Iterator[None]:
    """Inside the block, DeepSpeed does not make the host wait for the device.

    DeepSpeed makes it wait to order its own streams (for reductions, and at stage 3 for gathers) after earlier and
    before later work. Here these streams and the device's current stream wait for each other instead. With offload the
    host still waits, because it takes over what the streams write.
    """
    from deepspeed.accelerator import get_accelerator

    accelerator, optimizer = get_accelerator(), engine.optimizer
    if accelerator.is_synchronized_device() or engine.zero_offload_optimizer() or engine.zero_offload_param():
        yield
        return
    names = ("reduction_stream", "reduce_and_partition_stream")
    streams = [stream for name in names if (stream := getattr(optimizer, name, None)) is not None]

    def order(*_: Any) -> None:
        for own in {accelerator.current_stream(), accelerator.default_stream()}:
            for stream in streams:
                stream.wait_stream(own)
                own.wait_stream(stream)

    for place in (accelerator, *streams):
        place.synchronize = order
    try:
        yield
    finally:
        for place in (accelerator, *streams):
            del place.synchronize


def gathers_wait_for_the_weights(engine: Any) -> None:
    """Stage 3: after the weights have changed, let the stream that gathers them wait until they are written.

    DeepSpeed relies on the host's wait, which no longer happens after a step in `device_waits_for_itself`.
    """
    from deepspeed.accelerator import get_accelerator

    offload = getattr(engine.optimizer, "parameter_offload", None)
    if (gathers := getattr(offload, "_DeepSpeedZeRoOffload__allgather_stream", None)) is not None:
        gathers.wait_stream(get_accelerator().current_stream())


def quieten_and_skip_builds() -> None:
    """Before DeepSpeed joins a process group: compile no CPU op, print no banner on standard output."""
    from deepspeed import ops
    from deepspeed.utils import logger

    # The shared-memory all-reduce is compiled for a minute at first use, and gloo does without it. DeepSpeed asks for
    # nothing else here, and would run compilers to fill the dictionary by itself.
    vars(ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    logger.setLevel(logging.WARNING)
    # Stage 3 still calls what torch.distributed has renamed; each rank would say so at each new place.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def share_world_group(size: int, patience: timedelta) -> None:
    """Give DeepSpeed its group of all ranks, with our patience: NCCL's default is ten minutes. Collective."""
    from deepspeed.utils import groups

    if size > 1 and groups._WORLD_GROUP is None:
        make: Callable[..., Any] = functools.partial(dist.new_group, list(range(size)))
        if dist.get_backend() == "gloo":
            dist.barrier()  # all are here then, so the others need not wait long for one that is stopped
            making = Background(functools.partial(make, timeout=min(patience, CONNECTING)))
            is_made = torch.tensor(0)
            while not is_made:
                is_made.fill_(making.wait(_POLL_SECONDS))
                dist.all_reduce(is_made, dist.ReduceOp.MIN)  # raises at once if a rank is killed; new_group would wait
            group = making.result()
        else:
            group = make(timeout=patience)
        distributed_c10d._set_pg_timeout(patience, group)
        groups._WORLD_GROUP = group


def forget_groups() -> None:
    """Let the next engine make new groups: DeepSpeed keeps the groups of a destroyed process group."""
    from deepspeed.utils import groups

    groups._WORLD_GROUP = None
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None


def use_torchs_own_linear() -> None:
    """Undo what an earlier stage 3 engine of this process did to `torch.nn.functional.linear`; a new one does it again.

    DeepSpeed's rounds differently in bf16, so an engine's results would depend on which were built before it.
    """
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses

    if (own := getattr(InsertPostInitMethodToModuleSubClasses, "linear_bk", None)) is not None:
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
    if hasattr(optimizer, "fp32_groups_flat_partition"):  # stage 1 in bf16 has a separate optimizer
        return list(optimizer.fp32_groups_flat_partition)
    return list(optimizer.single_partition_of_fp32_groups)


def shard_layout(engine: Any) -> Layout:
    """Return which parameters lie where in each of `master_weights(engine)`."""
    optimizer = engine.optimizer
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return [[Fragment.whole(names[p], p)] for p in master_weights(engine)]
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
        optimizer.invalidate_secondary_tensor()  # the copies within a node of zero_hpz_partition_size
        if persistent := optimizer.persistent_parameters:  # small ones, whole on each rank at all times
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
    """Return the factor by which fp16 losses are multiplied now."""
    return float(engine.optimizer.loss_scaler.cur_scale)


def keep_least_loss_scale(engine: Any) -> None:
    """Let overflows at the least loss scale be skipped like others, and not raise: the recipe says when to give up."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is not None and scaler.dynamic:
        scaler.raise_error_at_min_scale = False


def grow_loss_scale_after_the_step(engine: Any) -> None:
    """Stages 1 to 3 in fp16: raise the loss scale after the step, not before gradients are divided by it."""
    optimizer = engine.optimizer
    step, update = optimizer.step, optimizer._update_scale

    def update_on_overflow(has_overflow: bool) -> None:
        if has_overflow:
            update(has_overflow)

    def step_and_grow(*arguments: Any, **options: Any) -> None:
        step(*arguments, **options)
        if not optimizer.overflow:
            update(False)

    optimizer._update_scale, optimizer.step = update_on_overflow, step_and_grow


def load_loss_scaler(engine: Any, saved: Any) -> None:
    """Resume the loss scale from a checkpoint's, if both are dynamic."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is not None and scaler.dynamic and getattr(saved, "dynamic", False):
        for name in ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis"):
            setattr(scaler, name, getattr(saved, name))


def use_storage(engine: Any, storage: Any) -> None:
    """Let `storage` write and read DeepSpeed's checkpoint files.

    DeepSpeed itself copies its converter scripts next to them, on one rank, in the middle of a collective save. If the
    disk does not take them, the storage must know, and nothing may be raised.
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
    """Return DeepSpeed's own classes that its checkpoint files hold; everything else in them is plain data."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


class _RecomputeFirst(torch.autograd.Function):
    """The identity at the end of what is recomputed; its backward pass reads a saved tensor, which starts recomputing.

    If the last layer started it, stage 3 would end it by releasing the weight that this layer had just gathered.
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

    Its reentrant one adds up the gradients of a shared parameter in another order, and ZeRO gets each part separately.
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
