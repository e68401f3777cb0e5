"""Where DeepSpeed makes the host wait for the device, and what we put in its place."""

import contextlib
import functools
from collections.abc import Callable, Iterator
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
    if engine.zero_optimization_stage() == 3:
        optimizer.get_grad_norm_direct = functools.partial(_norm_of_shards, optimizer)


def _norm_of_shards(optimizer: Any, gradients: list[torch.Tensor], params: list[Any]) -> torch.Tensor:
    """As DeepSpeed's, which also copies -1 from the host for what is not finite. Collective."""
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
    total = torch.stack(norms).square().sum()
    dist.all_reduce(total, group=optimizer._get_param_partition_group(params[0]))
    return total.sqrt()


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


def _clip_by_norm(input_tensors: list[torch.Tensor], max_norm: float, global_norm: torch.Tensor, **_: Any) -> None:
    """As DeepSpeed's, which reads the norm to see whether there is something to clip."""
    torch._foreach_mul_(list(input_tensors), (max_norm / (global_norm + 1e-6)).clamp(max=1.0))


@contextlib.contextmanager
def device_waits_for_itself(engine: Any) -> Iterator[None]:
    """Inside the block DeepSpeed does not stop the host until the device is done.

    It does so to order its own streams (for reductions, and at stage 3 for gathers) before what comes next; the
    device's current stream can wait for them instead. Not with offload, where the host takes over what they write.
    """
    from deepspeed.accelerator import get_accelerator

    accelerator, optimizer = get_accelerator(), engine.optimizer
    if accelerator.is_synchronized_device() or engine.zero_offload_optimizer() or engine.zero_offload_param():
        yield
        return
    names = ("reduction_stream", "reduce_and_partition_stream")
    streams = [stream for name in names if (stream := getattr(optimizer, name, None)) is not None]

    def order(*_: Any) -> None:
        for stream in streams:
            accelerator.current_stream().wait_stream(stream)

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
