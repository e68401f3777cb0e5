"""The lowest ZeRO stage that fits, with its largest micro batch: both higher stages and small batches cost time."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from karat_scale.commands.plan.memory import Batch, Peak, Subject, attention_workspace, evaluation, peak
from karat_scale.commands.plan.zero import kept
from karat_scale.data.plan import micro_batch_of
from karat_scale.engine.deepspeed_config import load_ds_config, stage_refusal, zero_stage
from karat_scale.engine.engine import PRECISIONS
from karat_scale.recipe import Recipe

STAGES = ("zero0", "zero1", "zero2", "zero3")
# On a GPU: CUDA's context, cuBLAS's and NCCL's buffers. On a CPU: Python with torch, timm and DeepSpeed, which were
# measured at 0.50 to 0.53 GB beyond the live tensors.
GPU_OVERHEAD, CPU_OVERHEAD = 1_000_000_000, 600_000_000
# What the allocator holds beyond live tensors.
FRAGMENTATION = 0.06


@dataclass(frozen=True)
class Choice:
    """One way to train a recipe, and what it needs on a rank.

    config: of DeepSpeed, by name or path. recompute: the policy of `train.recompute`. eval_batch: the recipe's, or a
    smaller one where that is too large beside training. peak: live tensors at the worst moment. margin: bytes for all
    else. host: bytes of the peak's that offload moves to the CPU. available: of the GPU, or of this rank's share of
    the RAM.
    """

    config: str
    stage: int
    recompute: str
    micro_batch: int
    accumulation: int
    eval_batch: int
    peak: Peak
    margin: int
    host: int
    available: int

    @property
    def needed(self) -> int:
        """Bytes on the GPU, or in RAM."""
        return self.peak.total + self.margin - self.host

    @property
    def fits(self) -> bool:
        return self.needed <= self.available


@dataclass(frozen=True)
class Machine:
    """What a rank gets: `memory` bytes, on a GPU or of a node's RAM; `world` ranks in all."""

    world: int
    memory: int
    on_gpu: bool


def choose(recipe: Recipe, machine: Machine, configs: Sequence[str] = STAGES) -> Choice:
    """The recommended way to train `recipe` on a machine.

    `train.micro_batch` of the recipe is kept if it is set, and so is a policy of recomputation; where nothing fits
    without one, one is tried. Where nothing fits at all, the way that needs least; its `fits` is false. `configs` are
    the DeepSpeed configurations to choose from, the best first.

    Raises:
        RecipeError: the global batch does not divide over the ranks, or the model cannot be built.
    """
    own, configs = recipe.train.recompute.policy, usable(recipe, configs)
    return recommended(
        best(subject, machine, config)
        for policy in ((own, "attention", "all") if own == "none" else (own,))  # the cheapest first
        for subject in (Subject(recipe.changed(train__recompute__policy=policy), machine.on_gpu),)
        for config in configs
    )


def usable(recipe: Recipe, configs: Sequence[str]) -> list[str]:
    """Those of `configs` that the recipe can train under; a single one is not judged here, but refused when read."""
    refused = refused_stages(recipe)
    return [config for config in configs if config not in refused or len(configs) == 1]


def refused_stages(recipe: Recipe) -> dict[str, str]:
    """Those of STAGES that cannot train the recipe, and why."""
    refusals = {config: stage_refusal(recipe, stage) for stage, config in enumerate(STAGES)}
    return {config: refusal for config, refusal in refusals.items() if refusal}


def recommended(candidates: Iterable[Choice]) -> Choice:
    """The first that fits, else the one that needs least."""
    considered = []
    for choice in candidates:
        if choice.fits:
            return choice
        considered.append(choice)
    return min(considered, key=lambda choice: choice.needed)


def preferred(choices: Iterable[Choice]) -> Choice:
    """The first that fits, else the last: of micro batches from the largest on, the smallest."""
    for choice in choices:
        if choice.fits:
            break
    return choice


def best(subject: Subject, machine: Machine, config: str) -> Choice:
    """Under one DeepSpeed configuration the largest micro batch that fits, else the smallest there is."""
    sizes = micro_batches(subject.recipe, machine.world)
    return preferred(consider(subject, machine, config, size) for size in sizes)


def micro_batches(recipe: Recipe, world: int) -> Iterator[int]:
    """The micro batches that the recipe allows on `world` ranks, the largest first; just its own where it names one.

    CUDA graphs do not accumulate gradients, so a recipe that records them has only the largest.

    Raises RecipeError where there is none.
    """
    even = recipe.augment.mixes
    largest = micro_batch_of(recipe, world)
    if recipe.train.micro_batch or recipe.train.records_graphs:
        yield largest
        return
    yield from (m for m in range(largest, 0, -1) if largest % m == 0 and not (even and m % 2))


def consider(subject: Subject, machine: Machine, config: str, micro_batch: int) -> Choice:
    """What training needs under one configuration with one micro batch.

    Evaluations take the recipe's batch, or halve it until they fit, or need no more than training does.
    """
    recipe = subject.recipe.changed(deepspeed__config=config)
    filled = load_ds_config(recipe, machine.world, micro_batch)
    stage = zero_stage(filled)
    accumulation = recipe.train.global_batch // machine.world // micro_batch
    teacher = subject.teacher.parameters * PRECISIONS[recipe.train.precision].weights.itemsize
    state = replace(kept(subject.sizes, filled, recipe, machine.world, accumulation, machine.on_gpu), teacher=teacher)
    loaded = _loader(recipe, micro_batch)

    def choice(worst: Peak, eval_batch: int, loaded: int) -> Choice:
        overhead = GPU_OVERHEAD if machine.on_gpu else CPU_OVERHEAD + loaded
        return Choice(
            config=config,
            stage=stage,
            recompute=recipe.train.recompute.policy,
            micro_batch=micro_batch,
            accumulation=accumulation,
            eval_batch=eval_batch,
            peak=worst,
            margin=overhead + round(FRAGMENTATION * worst.total),
            host=min(state.host, worst.total),
            available=machine.memory,
        )

    step = _batch(subject, micro_batch, accumulation)
    training = choice(peak(state, subject.footprint, step), recipe.train.eval_batch, loaded)
    images = recipe.train.eval_batch
    while True:
        rest = evaluation(state, subject.evaluation, _batch(subject, images, 1))
        evaluating = choice(rest, images, loaded + _loader(recipe, images))
        if images == 1 or evaluating.needed <= max(machine.memory, training.needed):
            break
        images //= 2
    return max(replace(training, eval_batch=images), evaluating, key=lambda choice: choice.needed)


def _batch(subject: Subject, images: int, accumulation: int) -> Batch:
    """uint8 images of a whole step on the CPU, of a micro batch on a GPU, and of both what the model sees."""
    recipe = subject.recipe
    pixels = images * 3 * recipe.model.image_size**2
    raw = pixels * (1 if subject.on_gpu else accumulation)
    made, weights = subject.pixels.itemsize, PRECISIONS[recipe.train.precision].weights.itemsize
    seen = made if made <= weights else made + weights  # the engine rounds them to the weights' dtype
    return Batch(images, raw + seen * pixels, attention_workspace(recipe, images, subject.on_gpu))


def _loader(recipe: Recipe, micro_batch: int) -> int:
    """Bytes of the batches that workers have made ahead, in /dev/shm."""
    return recipe.data.workers * recipe.data.prefetch * micro_batch * 3 * recipe.model.image_size**2
