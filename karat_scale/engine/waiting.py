"""Where DeepSpeed makes the host wait for the device, and what we put in its place."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist


def average_gradients_in_few_copies(engine: Any) -> None:
    """Stage 0: copy a bucket's averages back by one operation, not one a parameter, and none where one rank trains."""
    average = engine.allreduce_bucket

    def average_in_place(bucket: list[torch.Tensor], group: Any, world_size: Any = None) -> None:
        if engine.dp_world_size > 1:
            averages = engine.unflatten(average(bucket, group, world_size), bucket)
            torch._foreach_copy_(bucket, averages)

    engine.allreduce_and_copy = average_in_place


def check_by_the_norm(engine: Any) -> None:
    """Stages 1 to 3: leave out the search for overflows, gradient by gradient; the norm of all of them tells."""
    optimizer = engine.optimizer
    optimizer.check_overflow = lambda *_, **__: None
    optimizer.update_offload_overflow_tracker = lambda *_: None
    if hasattr(optimizer, "averaged_gradients") and not engine.zero_offload_optimizer():
        optimizer.scaled_global_norm = functools.partial(_norm_of_shards, optimizer)  # stages 1 and 2
        optimizer._get_norm_groups = lambda: [_norm_of_shards(optimizer)]  # stage 3


def _norm_of_shards(optimizer: Any) -> torch.Tensor:
    """As DeepSpeed's, which handles each gradient and each parameter group by itself. Collective."""
    gradients = [gradient for group in optimizer.averaged_gradients.values() for gradient in group]
    total = _square(gradients)
    dist.all_reduce(total, group=optimizer.dp_process_group)
    return total.sqrt().float()


def _square(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of the squares of all elements, 0-dim, in fp64: as fp32 it is nearly always the same in any order."""
    return torch.stack(torch._foreach_norm(list(gradients), 2, dtype=torch.float64)).square().sum()


def reduce_in_few_operations(engine: Any) -> None:
    """Stages 1 to 3 without `contiguous_gradients`: handle a bucket's gradients at once where DeepSpeed has a loop.

    With it, at stages 1 and 2: keep the gradient of a parameter larger than a bucket until the stream that reduces it
    is done. DeepSpeed frees it before.
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
    """torch.compile may let hooks of gradients run on other streams than the passes (DeepSpeed's issue 8061).

    DeepSpeed waits for the whole device here, and in `device_waits_for_itself` only two streams wait for each other.
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
    if optimizer.micro_step_id == 0:
        torch._foreach_copy_(kept, [part for _, part in own])
    else:
        torch._foreach_add_(kept, [part for _, part in own])
    for param in params:
        if not get_accelerator().is_synchronized_device():
            param.grad.record_stream(get_accelerator().current_stream())
        param.grad = None


@contextlib.contextmanager
def step_judged_by(is_invalid: Callable[[torch.Tensor], bool]) -> Iterator[None]:
    """Stages 1 to 3: inside the block DeepSpeed asks `is_invalid` once a step about the gradients' norm.

    `is_invalid` gets the norm of the scaled gradients, not read yet, not finite where a gradient is not. DeepSpeed
    itself would read it once a parameter group, and once more to put -1 in its place. It skips the step where the
    answer is true.
    """
    from deepspeed.runtime import bf16_optimizer, utils
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    answers: list[bool] = []

    def judge(norm: torch.Tensor) -> bool:
        if not answers:
            answers.append(is_invalid(norm))
        return answers[0]

    modules = (bf16_optimizer, stage_1_and_2, stage3)
    replaced: list[tuple[Any, str, Any]] = [(module, "is_invalid_grad_norm", judge) for module in modules]
    replaced += [(module, "mask_nan_or_inf_with_val_inplace", _leave_as_it_is) for module in (utils, stage_1_and_2)]
    replaced.append((bf16_optimizer, "clip_tensors_by_global_norm", _clip_by_norm))
    replaced.append((bf16_optimizer, "get_global_norm_of_tensors", _norm_of_whole_gradients))
    replaced.append((stage3, "combine_grad_norm_groups", functools.partial(_combined, stage3.combine_grad_norm_groups)))
    kept = [(module, name, getattr(module, name)) for module, name, _ in replaced]
    for module, name, ours in replaced:
        setattr(module, name, ours)
    try:
        yield
    finally:
        for module, name, theirs in kept:
            setattr(module, name, theirs)


def _leave_as_it_is(*_: Any, **__: Any) -> None:
    """A norm that is not finite says so itself."""


def _combined(combine: Callable[..., torch.Tensor], norms: list[torch.Tensor], **how: Any) -> torch.Tensor:
    """As DeepSpeed's, where there is something to combine."""
    return norms[0] if len(norms) == 1 else combine(norms, **how)


def _norm_of_whole_gradients(input_tensors: list[torch.Tensor], **_: Any) -> torch.Tensor:
    """As DeepSpeed's for gradients that each rank has whole."""
    return _square(input_tensors).sqrt().float()


def _clip_by_norm(input_tensors: list[torch.Tensor], max_norm: float, global_norm: torch.Tensor, **_: Any) -> None:
    """As DeepSpeed's, which reads the norm to see whether there is something to clip."""
    torch._foreach_mul_(list(input_tensors), (max_norm / (global_norm + 1e-6)).clamp(max=1.0))


@contextlib.contextmanager
def device_waits_for_itself(engine: Any) -> Iterator[None]:
    """Inside the block DeepSpeed does not stop the host until the device is done.

    It does so to order its own streams (for reductions, and at stage 3 for gathers) after what came before and before
    what comes next; they and the device's current stream can wait for each other instead. Not with offload, where the
    host takes over what they write.
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

    DeepSpeed counts on the host, which `device_waits_for_itself` no longer stops after a step.
    """
    from deepspeed.accelerator import get_accelerator

    offload = getattr(engine.optimizer, "parameter_offload", None)
    gathers = getattr(offload, "_DeepSpeedZeRoOffload__allgather_stream", None)
    if gathers is not None:
        gathers.wait_stream(get_accelerator().current_stream())
