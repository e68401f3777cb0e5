"""What DeepSpeed and this project's engine keep on a rank, stage by stage, read from their code and measured.

P is the model's parameters, W the ranks. Sizes are bytes. DeepSpeed 0.19: `runtime/zero/stage_1_and_2.py`, `stage3.py`
and `runtime/bf16_optimizer.py`, which is stage 1 in bf16.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from karat_scale.models import parameter_count
from karat_scale.recipe import OptimConfig, Recipe
from karat_scale.train.deepspeed.config import offloads_optimizer, zero_stage
from karat_scale.train.parameter_groups import parameter_groups

FP32 = 4
# torch's AdamW on a CPU works on one tensor after the other, with temporaries of its size: two for a flat shard, and
# at stage 0 a third, of the clipping. The fused one of CUDA and DeepSpeed's for CPUs have none.
ADAM_TEMPORARIES = 2
# DeepSpeed's defaults, in elements.
BUCKET, ALL_REDUCE, MAX_LIVE, PERSISTENT = 500_000_000, 500_000_000, 1_000_000_000, 100_000


@dataclass(frozen=True)
class ParameterSizes:
    """Elements: of all that learns, of each optimizer group, of each parameter, and of all that is frozen."""

    total: int
    groups: tuple[int, ...]
    each: tuple[int, ...]
    frozen: int

    @classmethod
    def of(cls, model: nn.Module, optim: OptimConfig) -> "ParameterSizes":
        """Of a model, in the groups of the engine's optimizer."""
        parameters = list(model.parameters())
        return cls(
            total=parameter_count(model),
            groups=tuple(sum(p.numel() for p in group["params"]) for group in parameter_groups(model, optim)),
            each=tuple(p.numel() for p in parameters if p.requires_grad),
            frozen=sum(p.numel() for p in parameters if not p.requires_grad),
        )


@dataclass(frozen=True)
class Kept:
    """What a rank holds, in bytes.

    weights: what the forward pass reads; masters: fp32 weights beside them. moments: of AdamW. ema: fp32.
    held_gradients: alive before a backward pass begins, in the worst micro batch of a step.
    keeps_gradients: each parameter's gradient stays where backward made it; else it is copied away at once.
    bucket: DeepSpeed's buffers while gradients come. gathered: stage 3's whole weights between forward and backward.
    partition: allocated for gradients when `flush_after` bytes of them have come.
    final_gradients: alive when the step begins. reducing: more than that, at its most, between backward and step.
    stepping: temporaries of the step. starting: all that is alive at the worst moment of `deepspeed.initialize`.
    host: of it all, what offload moves to the CPU's memory beside a GPU.
    """

    weights: int
    masters: int
    moments: int
    ema: int
    held_gradients: int
    keeps_gradients: bool
    bucket: int
    gathered: int
    partition: int
    flush_after: int
    final_gradients: int
    reducing: int
    stepping: int
    starting: int
    host: int

    @property
    def steady(self) -> int:
        """Between steps."""
        return self.weights + self.masters + self.moments + self.ema


def kept(
    sizes: ParameterSizes, config: Mapping[str, Any], recipe: Recipe, world: int, accumulation: int, on_gpu: bool
) -> Kept:
    """What a rank of `world` keeps under a filled DeepSpeed `config`, with `accumulation` micro batches a step."""
    stage = zero_stage(config)
    ema = FP32 * sizes.total if recipe.train.ema_decay else 0
    case = _Case(sizes, config, world, accumulation > 1, on_gpu, recipe.train.precision == "bf16", ema)
    by_stage = {0: _stage_0, 1: _bf16_stage_1 if case.is_bf16 else _stages_1_and_2, 2: _stages_1_and_2, 3: _stage_3}
    return by_stage[stage](case)


@dataclass(frozen=True)
class _Case:
    sizes: ParameterSizes
    config: Mapping[str, Any]
    world: int
    accumulates: bool
    on_gpu: bool
    is_bf16: bool
    whole_ema: int

    @property
    def whole(self) -> int:
        """fp32 bytes of all parameters."""
        return FP32 * self.sizes.total

    @property
    def shard(self) -> int:
        """fp32 bytes of a rank's share."""
        return -(-self.whole // self.world)

    @property
    def ema(self) -> int:
        return -(-self.whole_ema // self.world)

    @property
    def width(self) -> int:
        """Bytes of a parameter in the forward pass, from stage 1 on."""
        return 2 if self.is_bf16 else FP32

    @property
    def largest_group(self) -> int:
        """fp32 bytes of the larger optimizer group's share."""
        return -(-FP32 * max(self.sizes.groups) // self.world)

    @property
    def frozen(self) -> int:
        """Bytes of what does not learn: with the weights, and beside a CPU's in fp32, as the engine's copy."""
        return self.sizes.frozen * (self.width if self.stage else FP32) + (
            0 if self.on_gpu else FP32 * self.sizes.frozen
        )

    @property
    def stage(self) -> int:
        return zero_stage(self.config)

    def adam(self, tensor_bytes: int, temporaries: int = ADAM_TEMPORARIES) -> int:
        return 0 if self.on_gpu else temporaries * tensor_bytes

    def zero(self, key: str, default: int) -> int:
        """A number of the `zero_optimization` section."""
        return int(self.config["zero_optimization"].get(key, default))

    @property
    def bucket(self) -> int:
        overlaps = self.config["zero_optimization"].get("overlap_comm")
        return (2 if overlaps else 1) * self.width * self.zero("reduce_bucket_size", BUCKET)

    @property
    def offloads(self) -> bool:
        return self.on_gpu and offloads_optimizer(self.config)


def _stage_0(case: _Case) -> Kept:
    """fp32 weights, also under autocast; gradients are all-reduced after backward in a flat copy, on one rank too."""
    return Kept(
        weights=case.whole + case.frozen,
        masters=0,
        moments=2 * case.whole,
        ema=case.whole_ema,
        held_gradients=case.whole if case.accumulates else 0,
        keeps_gradients=not case.accumulates,
        bucket=0,
        gathered=0,
        partition=0,
        flush_after=0,
        final_gradients=case.whole,
        reducing=min(case.whole, FP32 * ALL_REDUCE),
        stepping=case.adam(FP32 * max(case.sizes.each), ADAM_TEMPORARIES + 1),
        starting=case.whole * (1 if case.on_gpu else 2),
        host=0,
    )


def _bf16_stage_1(case: _Case) -> Kept:
    """bf16 weights and gradients, fp32 gradients of all parameters from the start, masters of a share."""
    low = case.width * case.sizes.total
    return Kept(
        weights=low + case.frozen,
        masters=case.shard,
        moments=2 * case.shard,
        ema=case.ema,
        held_gradients=case.whole + (low if case.accumulates else 0),
        keeps_gradients=not case.accumulates,
        bucket=0,
        gathered=0,
        partition=0,
        flush_after=0,
        final_gradients=case.whole + low + (low if case.world > 1 else 0),
        reducing=0,
        stepping=case.adam(case.largest_group),
        starting=case.whole + low + case.shard + (0 if case.on_gpu else case.whole),
        host=0,
    )


def _stages_1_and_2(case: _Case) -> Kept:
    """Flat weights, fp32 masters of a share beside them, and a bucket through which gradients go.

    Stage 1 (fp32) keeps all gradients until the step. Stage 2 keeps a share; in fp32 that of a later micro batch is
    a second one, until the two are added.
    """
    weights = case.width * case.sizes.total
    is_2 = case.stage == 2
    held = (case.shard if is_2 else case.whole) if case.accumulates else 0
    adds_in_place = is_2 and case.is_bf16
    unflushed = 0 if is_2 else max(case.whole - case.bucket, 0)
    second = held if is_2 and not case.is_bf16 else 0
    on_host = 3 * case.shard + case.ema + case.shard if case.offloads else 0
    return Kept(
        weights=weights + case.frozen,
        masters=case.shard,
        moments=2 * case.shard,
        ema=case.ema,
        held_gradients=held,
        keeps_gradients=not is_2 and not case.accumulates,
        bucket=case.bucket,
        gathered=0,
        partition=case.shard if is_2 and not (adds_in_place and case.accumulates) else 0,
        flush_after=case.bucket,
        final_gradients=case.shard,
        reducing=case.bucket + unflushed + second,
        stepping=case.adam(case.largest_group) + (0 if adds_in_place else case.largest_group),
        starting=weights + 2 * case.shard + (weights if case.on_gpu else case.whole),
        host=on_host,
    )


def _stage_3(case: _Case) -> Kept:
    """A share of everything, buffers that stay, and the weights whole from their first use to their last.

    DeepSpeed keeps what is used again within `stage3_max_reuse_distance` elements, so a model of less than 1e9
    parameters is whole on each rank between forward and backward.
    """
    share = -(-case.width * case.sizes.total // case.world)
    live = min(case.sizes.total, case.zero("stage3_max_live_parameters", MAX_LIVE))
    threshold = case.zero("stage3_param_persistence_threshold", PERSISTENT)
    persistent = case.width * sum(size for size in case.sizes.each if size <= threshold)
    several = case.world > 1
    offload_weights = (case.config["zero_optimization"].get("offload_param") or {}).get("device", "none") != "none"
    on_host = (4 * case.shard + case.ema if case.offloads else 0) + (share if case.on_gpu and offload_weights else 0)
    return Kept(
        weights=share + case.frozen + (persistent if several else 0),
        masters=case.shard,
        moments=2 * case.shard,
        ema=case.ema,
        held_gradients=case.shard + case.bucket,
        keeps_gradients=False,
        bucket=0,
        gathered=max(case.width * live - persistent, 0) if several else 0,
        partition=0,
        flush_after=0,
        final_gradients=case.shard + case.bucket,
        reducing=0,
        stepping=case.adam(case.largest_group) + case.largest_group,
        starting=case.whole + share + 2 * case.shard + case.bucket + (0 if case.on_gpu else case.whole),
        host=on_host,
    )
