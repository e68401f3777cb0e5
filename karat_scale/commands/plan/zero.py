"""The memory that DeepSpeed and this project's engine keep on a rank, by stage, read from their code and measured.

Sizes are bytes. The code is DeepSpeed 0.19's `runtime/zero/stage_1_and_2.py`, `stage3.py` and
`runtime/bf16_optimizer.py`. The last file is stage 1 with bf16 weights; stage 1 in fp16 is in the first file. DeepSpeed
takes autocast (`train.precision: bf16`) for fp32, because weights and gradients are fp32.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from karat_scale.engine.deepspeed_config import offloads_optimizer, zero_stage
from karat_scale.engine.engine import PRECISIONS
from karat_scale.engine.optimizers import own_matrices, parameter_groups
from karat_scale.models import parameter_count
from karat_scale.recipe import OptimConfig, Recipe

FP32 = 4
# DeepSpeed's defaults, in elements.
BUCKET, ALL_REDUCE, MAX_LIVE, PERSISTENT, PREFETCH = 500_000_000, 500_000_000, 1_000_000_000, 100_000, 50_000_000


@dataclass(frozen=True)
class Kept:
    """The bytes that a rank holds.

    weights: read by the forward pass. masters: fp32 copies of the weights. moments: the optimizer's. ema: fp32.
    held_gradients: alive before a backward pass begins, in the worst micro batch of a step.
    keeps_gradients: how many times the bytes of a gradient stay after backward has made it: 1 if it stays itself, 2 if
    it is widened to fp32, 0 if it is copied away at once, a rank's share if the other ranks' shares are freed.
    passing: at most this many bytes of the gradients that do not stay are alive at once, until they are freed.
    bucket: DeepSpeed's buffers while gradients arrive. gathered: stage 3's whole weights between forward and backward.
    fetched: stage 3's weights that have been fetched ahead, in one buffer and each by itself.
    partition: allocated for gradients when `flush_after` bytes of them have arrived, once or repeatedly.
    final_gradients: alive when the step begins. reducing: the most beyond that between backward and step.
    resting: gradients and their buffers that are kept between steps.
    stepping: temporaries of the step. starting: all that is alive at the worst moment of `deepspeed.initialize`.
    teacher: the teacher of distillation, which is not partitioned.
    host: the part of all these that offload moves from a GPU to the CPU's memory.
    """

    weights: int
    moments: int
    ema: int
    held_gradients: int
    final_gradients: int
    stepping: int
    starting: int
    masters: int = 0
    keeps_gradients: float = 0
    passing: int = 0
    bucket: int = 0
    gathered: int = 0
    fetched: int = 0
    partition: int = 0
    flush_after: int = 0
    resting: int = 0
    reducing: int = 0
    teacher: int = 0
    host: int = 0


@dataclass(frozen=True)
class ParameterSizes:
    """The elements of all trainable parameters, of each optimizer group, of each parameter, and of frozen ones.

    `matrices`: the elements of each parameter that has the optimizer's `matrix_states`.
    """

    total: int
    groups: tuple[int, ...]
    each: tuple[int, ...]
    frozen: int
    matrices: tuple[int, ...] = ()

    @classmethod
    def of(cls, model: nn.Module, optim: OptimConfig) -> "ParameterSizes":
        """Return the sizes of a model, in the groups of the engine's optimizer."""
        learned = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        own = own_matrices(model, optim)
        return cls(
            total=parameter_count(model),
            groups=tuple(sum(p.numel() for p in group["params"]) for group in parameter_groups(model, optim)),
            each=tuple(learned.values()),
            frozen=sum(p.numel() for p in model.parameters() if not p.requires_grad),
            matrices=tuple(size for name, size in learned.items() if name in own),
        )


def overlaps_collectives(config: Mapping[str, Any]) -> bool:
    """Whether a bucket is reduced while the next one is filled: by default at stage 3."""
    overlaps = config.get("zero_optimization", {}).get("overlap_comm")
    return zero_stage(config) == 3 if overlaps is None else bool(overlaps)


@dataclass
class Case:
    """A filled DeepSpeed `config` on `world` ranks, with `accumulation` micro batches a step; its figures are bytes."""

    sizes: ParameterSizes
    config: Mapping[str, Any]
    recipe: Recipe
    world: int
    accumulation: int
    on_gpu: bool

    def __post_init__(self) -> None:
        sizes, recipe, config, world, on_gpu = self.sizes, self.recipe, self.config, self.world, self.on_gpu
        self.stage, self.zero = zero_stage(config), config.get("zero_optimization", {})
        self.optimizer = recipe.optim.row
        self.accumulates = self.accumulation > 1
        self.offloads = on_gpu and offloads_optimizer(config)
        # The bytes of an element of the module's parameters. A 16-bit parameter also has an fp32 master.
        self.width = PRECISIONS[recipe.train.precision].weights.itemsize
        self.is_16_bit = self.width < FP32
        self.low = self.width * sizes.total
        # The fp32 bytes of all parameters, of a rank's share, and of its share of the larger optimizer group.
        self.whole = FP32 * sizes.total
        self.shard = -(-self.whole // world)
        self.largest_group = -(-FP32 * max(sizes.groups) // world)
        self.whole_ema = self.whole if recipe.train.ema_decay else 0
        # Frozen parameters: with the weights, and on a CPU also in fp32, as the engine's copy.
        self.frozen = sizes.frozen * (self.width + (0 if on_gpu else FP32))
        moments = len(self.optimizer.states) * self.shard
        self.shared = {"masters": self.shard, "moments": moments, "ema": -(-self.whole_ema // world)}
        self.on_host = self.shard + sum(self.shared.values()) if self.offloads else 0
        self.bucket = (FP32 if self.stage == 1 else self.width) * int(self.zero.get("reduce_bucket_size", BUCKET))
        self.overlaps = overlaps_collectives(config)
        # Gradients are copied into a buffer as they come: stages 1 and 2 do so with offload in any case.
        is_forced = self.stage < 3 and offloads_optimizer(config)
        self.is_contiguous = is_forced or bool(self.zero.get("contiguous_gradients", True))

    def temporaries(self, tensor_bytes: int, more: int = 0) -> int:
        """Return the bytes of a step's temporaries for a tensor. Fused optimizers (CUDA's, DeepSpeed's) have none."""
        return 0 if self.on_gpu else (self.optimizer.temporaries + more) * tensor_bytes


def kept(case: Case) -> Kept:
    """Return what a rank keeps."""
    stage_1 = _bf16_stage_1 if case.recipe.train.precision == "bf16_weights" else _stages_1_and_2
    return {0: _stage_0, 1: stage_1, 2: _stages_1_and_2, 3: _stage_3}[case.stage](case)


def _stage_0(case: Case) -> Kept:
    """fp32 weights, also under autocast; several ranks all-reduce gradients after backward in a flat copy."""
    row, matrices = case.optimizer, FP32 * sum(case.sizes.matrices)
    of_matrices = len(row.states if row.matrix_states is None else row.matrix_states) * matrices
    return Kept(
        weights=case.whole + case.frozen,
        moments=len(row.states) * (case.whole - matrices) + of_matrices,
        ema=case.whole_ema,
        held_gradients=case.whole if case.accumulates else 0,
        keeps_gradients=0 if case.accumulates else 1,
        final_gradients=case.whole,
        reducing=min(case.whole, FP32 * ALL_REDUCE) if case.world > 1 else 0,
        stepping=max(
            case.temporaries(FP32 * max(case.sizes.each), more=1),  # of the clipping
            row.matrix_temporaries * max(case.sizes.matrices, default=0),
        ),
        starting=case.whole * (1 if case.on_gpu else 2),
    )


def _bf16_stage_1(case: Case) -> Kept:
    """bf16 weights and gradients, fp32 gradients of all parameters from the start, masters of a share."""
    low = case.low
    return Kept(
        **case.shared,
        weights=low + case.frozen,
        held_gradients=case.whole + (low if case.accumulates else 0),
        keeps_gradients=0 if case.accumulates else 1,
        final_gradients=case.whole + low + (low if case.world > 1 else 0),
        resting=case.whole,
        stepping=case.temporaries(case.largest_group),
        starting=case.whole + low + case.shard + (0 if case.on_gpu else case.whole),
    )


def _stages_1_and_2(case: Case) -> Kept:
    """Flat weights, fp32 masters of a share next to them, and a bucket through which gradients go.

    Stage 1 (fp32, fp16) keeps all gradients in fp32 until the step; fp16's are cast back to be sent. Stage 2 keeps a
    share; in fp32, a later micro batch has a second share until the two are added. Without `contiguous_gradients`, a
    bucket's gradients are copied flat when it is full. Gradients that stage 2 does not keep are freed then, or with
    `overlap_comm` when the next bucket is full.
    """
    weights = case.low
    is_2 = case.stage == 2
    buckets = (2 if case.overlaps else 1) * case.bucket
    held = (case.shard if is_2 else case.whole) if case.accumulates else 0
    widened = case.is_16_bit and not is_2
    unflushed = 0 if is_2 else case.whole if widened else max(case.whole - buckets, 0)
    second = held if is_2 and not case.is_16_bit else 0
    cast = min(weights, case.bucket // 2) if widened else 0
    state = Kept(
        **case.shared,
        weights=weights + case.frozen,
        held_gradients=held,
        keeps_gradients=0 if is_2 or case.accumulates else FP32 // case.width,
        bucket=buckets,
        partition=case.shard if is_2 and not (case.is_16_bit and case.accumulates) else 0,
        flush_after=case.bucket,
        final_gradients=case.shard,
        reducing=buckets + unflushed + second + cast,
        stepping=case.temporaries(case.largest_group) + (0 if case.is_16_bit else case.largest_group),
        starting=weights + 2 * case.shard + (weights if case.on_gpu else case.whole),
        host=case.on_host,
    )
    if case.is_contiguous:
        return state
    made = case.whole if widened else weights
    own = made // case.world if is_2 else made
    passing = buckets - buckets // case.world if is_2 else 0
    flat = min(made, case.bucket)
    return replace(
        state,
        keeps_gradients=1 / case.world if is_2 else state.keeps_gradients,
        passing=passing,
        bucket=0,
        partition=flat + (state.partition if case.is_16_bit else 0),
        flush_after=case.bucket * case.width // FP32 if widened else case.bucket,
        # The step takes these gradients, so they count once, except where stage 2 casts them.
        reducing=own + min(made - own, passing) + flat + second + cast - (0 if case.is_16_bit and is_2 else case.shard),
        # A group's gradients are freed once they are flat; in a buffer, the other group's would keep it alive.
        stepping=state.stepping if case.is_16_bit else max(case.temporaries(case.largest_group), case.largest_group),
    )


def _stage_3(case: Case) -> Kept:
    """A share of everything, buffers that stay, and the weights whole from their first use to their last.

    DeepSpeed keeps weights that are used again within `stage3_max_reuse_distance` elements, so a model of less than 1e9
    parameters is whole on each rank between forward and backward.
    """
    share = -(-case.low // case.world)
    live = min(case.sizes.total, int(case.zero.get("stage3_max_live_parameters", MAX_LIVE)))
    threshold = int(case.zero.get("stage3_param_persistence_threshold", PERSISTENT))
    persistent = case.width * sum(size for size in case.sizes.each if size <= threshold)
    several = case.world > 1
    gathered = max(case.width * live - persistent, 0) if several else 0
    ahead = int(case.zero.get("stage3_prefetch_bucket_size", PREFETCH))
    offload_weights = (case.zero.get("offload_param") or {}).get("device", "none") != "none"
    state = Kept(
        **case.shared,
        weights=share + case.frozen + (persistent if several else 0),
        held_gradients=case.shard + case.bucket,
        gathered=gathered,
        fetched=2 * min(case.width * max(ahead, *case.sizes.each), gathered),
        final_gradients=case.shard + case.bucket,
        resting=case.shard + case.bucket,
        stepping=case.temporaries(case.largest_group) + case.largest_group,
        starting=case.whole + share + 2 * case.shard + case.bucket + (0 if case.on_gpu else case.whole),
        host=case.on_host + (share if case.on_gpu and offload_weights else 0),
    )
    if case.is_contiguous:
        return state
    made = case.low
    passing = (2 if case.overlaps and case.on_gpu else 1) * case.bucket
    return replace(
        state,
        held_gradients=case.shard,
        passing=passing,
        partition=min(made, case.bucket),
        flush_after=case.bucket,
        final_gradients=case.shard,
        reducing=min(made, case.bucket) + min(made, passing),
        resting=case.shard,
        starting=state.starting - case.bucket,
    )
