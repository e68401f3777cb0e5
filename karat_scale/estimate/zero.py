"""What DeepSpeed and this project's engine keep on a rank, stage by stage, read from their code and measured.

P is the model's parameters, W the ranks. Sizes are bytes. DeepSpeed 0.19: `runtime/zero/stage_1_and_2.py`, `stage3.py`
and `runtime/bf16_optimizer.py`, which is stage 1 with bf16 weights; stage 1 in fp16 is the first file's. To DeepSpeed
autocast (`train.precision: bf16`) is fp32: its weights and gradients are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from karat_scale.engine.deepspeed_config import offloads_optimizer, zero_stage
from karat_scale.engine.precision import PRECISIONS
from karat_scale.estimate.kept import Kept, ParameterSizes
from karat_scale.recipe import Recipe
from karat_scale.tables import OptimizerRow

FP32 = 4
# DeepSpeed's defaults, in elements.
BUCKET, ALL_REDUCE, MAX_LIVE, PERSISTENT, PREFETCH = 500_000_000, 500_000_000, 1_000_000_000, 100_000, 50_000_000


def kept(
    sizes: ParameterSizes, config: Mapping[str, Any], recipe: Recipe, world: int, accumulation: int, on_gpu: bool
) -> Kept:
    """What a rank of `world` keeps under a filled DeepSpeed `config`, with `accumulation` micro batches a step."""
    stage = zero_stage(config)
    ema = FP32 * sizes.total if recipe.train.ema_decay else 0
    width = PRECISIONS[recipe.train.precision].weights.itemsize
    case = _Case(sizes, config, recipe.optim.row, world, accumulation > 1, on_gpu, width, ema)
    stage_1 = _bf16_stage_1 if recipe.train.precision == "bf16_weights" else _stages_1_and_2
    return {0: _stage_0, 1: stage_1, 2: _stages_1_and_2, 3: _stage_3}[stage](case)


@dataclass(frozen=True)
class _Case:
    sizes: ParameterSizes
    config: Mapping[str, Any]
    optimizer: OptimizerRow
    world: int
    accumulates: bool
    on_gpu: bool
    width: int
    """Bytes of a parameter that the module holds."""
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
    def is_16_bit(self) -> bool:
        """Whether fp32 masters stand beside weights of 16 bits."""
        return self.width < FP32

    @property
    def largest_group(self) -> int:
        """fp32 bytes of the larger optimizer group's share."""
        return -(-FP32 * max(self.sizes.groups) // self.world)

    @property
    def frozen(self) -> int:
        """Bytes of what does not learn: with the weights, and beside a CPU's in fp32, as the engine's copy."""
        return self.sizes.frozen * (self.width + (0 if self.on_gpu else FP32))

    @property
    def stage(self) -> int:
        return zero_stage(self.config)

    @property
    def moments(self) -> int:
        """Bytes of the optimizer's states of a rank's share."""
        return len(self.optimizer.states) * self.shard

    def temporaries(self, tensor_bytes: int, more: int = 0) -> int:
        """Bytes of a step on a tensor. Fused optimizers, of CUDA and DeepSpeed's for CPUs, have none."""
        return 0 if self.on_gpu else (self.optimizer.temporaries + more) * tensor_bytes

    def zero(self, key: str, default: int) -> int:
        """A number of the `zero_optimization` section."""
        return int(self.config["zero_optimization"].get(key, default))

    @property
    def bucket(self) -> int:
        overlaps = self.config["zero_optimization"].get("overlap_comm")
        width = FP32 if self.stage == 1 else self.width
        return (2 if overlaps else 1) * width * self.zero("reduce_bucket_size", BUCKET)

    @property
    def offloads(self) -> bool:
        return self.on_gpu and offloads_optimizer(self.config)


def _stage_0(case: _Case) -> Kept:
    """fp32 weights, also under autocast; several ranks all-reduce gradients after backward in a flat copy."""
    return Kept(
        weights=case.whole + case.frozen,
        masters=0,
        moments=_whole_moments(case),
        ema=case.whole_ema,
        held_gradients=case.whole if case.accumulates else 0,
        keeps_gradients=0 if case.accumulates else 1,
        bucket=0,
        gathered=0,
        fetched=0,
        partition=0,
        flush_after=0,
        final_gradients=case.whole,
        resting=0,
        reducing=min(case.whole, FP32 * ALL_REDUCE) if case.world > 1 else 0,
        stepping=max(
            case.temporaries(FP32 * max(case.sizes.each), more=1),  # of the clipping
            case.optimizer.matrix_temporaries * max(case.sizes.matrices, default=0),
        ),
        starting=case.whole * (1 if case.on_gpu else 2),
        host=0,
    )


def _whole_moments(case: _Case) -> int:
    row, matrices = case.optimizer, FP32 * sum(case.sizes.matrices)
    of_matrices = len(row.states if row.matrix_states is None else row.matrix_states) * matrices
    return len(row.states) * (case.whole - matrices) + of_matrices


def _bf16_stage_1(case: _Case) -> Kept:
    """bf16 weights and gradients, fp32 gradients of all parameters from the start, masters of a share."""
    low = case.width * case.sizes.total
    return Kept(
        weights=low + case.frozen,
        masters=case.shard,
        moments=case.moments,
        ema=case.ema,
        held_gradients=case.whole + (low if case.accumulates else 0),
        keeps_gradients=0 if case.accumulates else 1,
        bucket=0,
        gathered=0,
        fetched=0,
        partition=0,
        flush_after=0,
        final_gradients=case.whole + low + (low if case.world > 1 else 0),
        resting=case.whole,
        reducing=0,
        stepping=case.temporaries(case.largest_group),
        starting=case.whole + low + case.shard + (0 if case.on_gpu else case.whole),
        host=0,
    )


def _stages_1_and_2(case: _Case) -> Kept:
    """Flat weights, fp32 masters of a share beside them, and a bucket through which gradients go.

    Stage 1 (fp32, fp16) keeps all gradients in fp32 until the step; fp16's are cast back to be sent. Stage 2 keeps a
    share; in fp32 that of a later micro batch is a second one, until the two are added.
    """
    weights = case.width * case.sizes.total
    is_2 = case.stage == 2
    held = (case.shard if is_2 else case.whole) if case.accumulates else 0
    widened = case.is_16_bit and not is_2
    unflushed = 0 if is_2 else case.whole if widened else max(case.whole - case.bucket, 0)
    second = held if is_2 and not case.is_16_bit else 0
    cast = min(weights, case.bucket // 2) if widened else 0
    on_host = 2 * case.shard + case.moments + case.ema if case.offloads else 0
    return Kept(
        weights=weights + case.frozen,
        masters=case.shard,
        moments=case.moments,
        ema=case.ema,
        held_gradients=held,
        keeps_gradients=0 if is_2 or case.accumulates else FP32 // case.width,
        bucket=case.bucket,
        gathered=0,
        fetched=0,
        partition=case.shard if is_2 and not (case.is_16_bit and case.accumulates) else 0,
        flush_after=case.bucket,
        final_gradients=case.shard,
        resting=0,
        reducing=case.bucket + unflushed + second + cast,
        stepping=case.temporaries(case.largest_group) + (0 if case.is_16_bit else case.largest_group),
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
    gathered = max(case.width * live - persistent, 0) if several else 0
    ahead = case.zero("stage3_prefetch_bucket_size", PREFETCH)
    offload_weights = (case.config["zero_optimization"].get("offload_param") or {}).get("device", "none") != "none"
    on_host = 2 * case.shard + case.moments + case.ema if case.offloads else 0
    on_host += share if case.on_gpu and offload_weights else 0
    return Kept(
        weights=share + case.frozen + (persistent if several else 0),
        masters=case.shard,
        moments=case.moments,
        ema=case.ema,
        held_gradients=case.shard + case.bucket,
        keeps_gradients=0,
        bucket=0,
        gathered=gathered,
        fetched=2 * min(case.width * max(ahead, *case.sizes.each), gathered),
        partition=0,
        flush_after=0,
        final_gradients=case.shard + case.bucket,
        resting=case.shard + case.bucket,
        reducing=0,
        stepping=case.temporaries(case.largest_group) + case.largest_group,
        starting=case.whole + share + 2 * case.shard + case.bucket + (0 if case.on_gpu else case.whole),
        host=on_host,
    )
