"""A rank's peak memory in training and in an evaluation, by parts, and the choice of settings that fit.

The allocations and launches of a micro batch of any size follow from traces of two sizes, by a straight line through
each pair of figures. A trace does not see the tiles of attention, so their memory and traffic are counted here. The
tiles of `streaming` stay within an operation. The tiles of query rows (`attend_rows`) are not traced, as their number
follows from the batch.

The choice is the lowest ZeRO stage that fits, with its largest micro batch: higher stages and small batches cost time.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from karat_scale.attention.functional import choosing_as_on_a_gpu
from karat_scale.attention.kernels.triton_fourier import LARGEST_WIDTH
from karat_scale.attention.routes import MIN_ROWS, workspace_budget
from karat_scale.attention.variants import HELD, planning
from karat_scale.commands.plan.tracing import OUTSIDE, Launches, Trace, fake_copy, trace_step
from karat_scale.commands.plan.zero import FP32, Case, Kept, ParameterSizes, kept
from karat_scale.data.plan import micro_batch_of
from karat_scale.engine.deepspeed_config import load_ds_config, stage_refusal, zero_stage
from karat_scale.engine.engine import PRECISIONS
from karat_scale.foundation.console import work_display
from karat_scale.foundation.errors import RecipeError
from karat_scale.models.factory import layer_sizes, outline
from karat_scale.models.layers import LayerSize, blocks_of
from karat_scale.models.recompute import choices_by_rule, recompute
from karat_scale.recipe import AttentionConfig, Recipe
from karat_scale.training.tasks.classification.distillation_teacher import planned_cost

Bytes = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Footprint:
    """The allocations of one forward and backward pass for b images: `constant` + b `slope` bytes each, in order.

    All arrays are [n]. died: int64, n for allocations that stay. part: int64, as in `Allocation`. gradient: bool. The
    first `forward` allocations are those of the forward pass. An event is the birth of an allocation. launches: the
    kernels, the same number for every b.
    """

    constant: Bytes
    slope: Bytes
    died: npt.NDArray[np.int64]
    part: npt.NDArray[np.int64]
    gradient: npt.NDArray[np.bool_]
    forward: int
    launches: Launches

    @classmethod
    def through(cls, traces: Mapping[int, Trace]) -> "Footprint":
        """Return the line through traces of two batch sizes. Raises ValueError if the traces do not correspond."""
        (small, first), (large, second) = sorted(traces.items())
        a, b = first.allocations, second.allocations
        if [(x.died, x.part) for x in a] != [(x.died, x.part) for x in b]:
            raise ValueError("the model does other things for another batch size")
        sizes = np.array([[x.bytes for x in a], [x.bytes for x in b]], dtype=np.float64)
        slope = (sizes[1] - sizes[0]) / (large - small)
        return cls(
            constant=sizes[0] - small * slope,
            slope=slope,
            died=np.array([len(a) if x.died is None else x.died for x in a]),
            part=np.array([x.part for x in a]),
            gradient=np.array([x.gradient for x in a]),
            forward=first.forward,
            launches=Launches.of(first.launching),
        )

    def live(self, batch: int) -> Bytes:
        """Return the bytes alive after each event, without parameters' gradients."""
        bytes_ = self.constant + batch * self.slope
        changes = np.append(np.where(self.gradient, 0.0, bytes_), 0.0)
        np.add.at(changes, self.died[~self.gradient], -bytes_[~self.gradient])
        return np.cumsum(changes)[:-1]

    @cached_property
    def gradients_made(self) -> Bytes:
        """Bytes of parameters' gradients that have been made up to each event, its own included."""
        return np.cumsum(np.where(self.gradient, self.constant, 0.0))

    def saved_by_part(self, batch: int, event: int) -> dict[int, int]:
        """Return the bytes of the forward pass that are alive after `event`, by part."""
        born = np.arange(len(self.died))
        alive = (born < self.forward) & (born <= event) & (self.died > event)
        bytes_ = self.constant + batch * self.slope
        parts = range(OUTSIDE, int(self.part.max(initial=OUTSIDE)) + 1)
        return {part: round(bytes_[alive & (self.part == part)].sum()) for part in parts}

    def written(self, batch: int) -> float:
        """Return the bytes of all allocations, the least that a step writes."""
        return float(np.sum(self.constant + batch * self.slope))


# Two sizes that mixup's pairs allow.
TRACED_BATCHES = (2, 4)


class Subject:
    """The subject of a plan: a recipe's model as it would run on a GPU, or on this machine's CPU, on fake tensors.

    Raises RecipeError where the model cannot be built.
    """

    def __init__(self, recipe: Recipe, on_gpu: bool) -> None:
        if recipe.attention.transfer_from:
            raise RecipeError(
                "attention.transfer_from: a teacher's memory is not known; plan with attention.transfer_from="
            )
        self.recipe, self.on_gpu = recipe, on_gpu
        self.teacher = planned_cost(recipe)
        self.sizes = ParameterSizes.of(outline(recipe), recipe.optim)
        self._precision = PRECISIONS[recipe.train.precision]
        # As `pixel_dtype` and the task choose it.
        self.pixels = self._precision.compute if on_gpu and not recipe.distill.from_ else torch.float32

    @cached_property
    def footprint(self) -> Footprint:
        """The allocations and launches of a micro batch, at every ZeRO stage.

        Raises RecipeError where the model cannot run as the recipe says.
        """
        return self._trace(trains=True)

    @cached_property
    def evaluation(self) -> Footprint:
        """The same as `footprint` for a batch of an evaluation, which recomputes nothing."""
        return self._trace(trains=False)

    def _trace(self, trains: bool) -> Footprint:
        model, autocasts, weights = outline(self.recipe), self._precision.autocasts, self._precision.weights
        mode = fake_copy(model, None if weights == torch.float32 else weights)
        if trains:
            recompute(model, choices_by_rule(self.recipe.train.recompute, len(blocks_of(model))))
        size, pixels = self.recipe.model.image_size, self.pixels if autocasts else None
        try:
            with choosing_as_on_a_gpu() if self.on_gpu else nullcontext(), planning():
                traces = {
                    batch: trace_step(model, mode, batch, size, autocasts, pixels, trains) for batch in TRACED_BATCHES
                }
        except ValueError as error:
            raise RecipeError(f"attention.implementation = {self.recipe.attention.implementation!r}: {error}") from None
        return Footprint.through(traces)


@dataclass(frozen=True)
class Peak:
    """The worst moment: "start", "backward", "reduce", "step" or "evaluate"; bytes by part, and activations by block.

    `blocks` holds block -1 for what lies outside blocks. Only the moment's own bytes are there: at a step there are
    no activations.
    """

    moment: str
    parts: dict[str, int]
    blocks: dict[int, int]

    @property
    def total(self) -> int:
        """Bytes of live tensors."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Batch:
    """A batch of images: `held` bytes are alive during the whole pass, `inside` bytes are what operations take."""

    images: int
    held: int
    inside: int


def peak(state: Kept, footprint: Footprint, batch: Batch) -> Peak:
    """Return the worst moment of training."""
    moments = (
        Peak("start", {"parameters": state.starting}, {}),
        _backward(state, footprint, batch),
        _step("reduce", state, state.reducing, batch),
        _step("step", state, state.stepping, batch),
    )
    return max(moments, key=lambda moment: moment.total)


def evaluation(state: Kept, footprint: Footprint, batch: Batch) -> Peak:
    """Return the worst moment of an evaluation: a forward pass that saves nothing, and all that stays between steps."""
    live = footprint.live(batch.images)
    event = int(np.argmax(live))
    made = footprint.saved_by_part(batch.images, event)
    parts = {
        **_steady(state),
        "gradients": state.resting,
        "gathered weights": state.fetched,
        "activations": sum(made.values()),
        "workspace": batch.inside,
        "images": batch.held,
    }
    return Peak("evaluate", parts, {part: size for part, size in made.items() if size})


def _step(name: str, state: Kept, temporary: int, batch: Batch) -> Peak:
    parts = {**_steady(state), "gradients": state.final_gradients, "workspace": temporary, "images": batch.held}
    return Peak(name, parts, {})


def _steady(state: Kept) -> dict[str, int]:
    return {
        "parameters": state.weights,
        "masters": state.masters,
        "optimizer": state.moments,
        "EMA": state.ema,
        **({"teacher": state.teacher} if state.teacher else {}),
    }


def _backward(state: Kept, footprint: Footprint, batch: Batch) -> Peak:
    """Return the worst moment of forward and backward; that of forward is its end, where backward begins."""
    live = footprint.live(batch.images)
    made = footprint.gradients_made
    gradients = state.keeps_gradients * made + state.partition * (made > 0) * (made > state.flush_after)
    if state.passing:
        gradients = gradients + np.minimum((1 - state.keeps_gradients) * made, state.passing)
    elif state.keeps_gradients != 1:
        gradients = gradients + np.diff(made, prepend=0.0)  # the gradient that is made at an event
    share_left = 1 - made / max(made[-1], 1)
    in_backward = np.arange(len(live)) >= footprint.forward
    # DeepSpeed keeps the flat buffer of weights that it gathers together until the last of them is used.
    gathered = state.gathered * share_left + state.fetched / 2 * ~in_backward
    bucket = state.bucket * in_backward
    event = int(np.argmax(live + gradients + gathered + bucket))
    saved = footprint.saved_by_part(batch.images, event)
    activations = sum(saved.values())
    parts = {
        **_steady(state),
        "gradients": state.held_gradients + round(gradients[event]),
        "buckets": round(bucket[event]),
        "gathered weights": round(gathered[event]),
        "activations": activations,
        "workspace": round(live[event]) - activations + batch.inside,
        "images": batch.held,
    }
    return Peak("backward", parts, {part: size for part, size in saved.items() if size or part != OUTSIDE})


# The arrays besides a tile's features: its scores, their gradients, and short-lived products of them.
ARRAYS_OF_A_TILE = 3
# For a tile of query rows, in arrays of the size of its scores: those alive at the worst moment of its backward pass,
# and all that are ever allocated; for each harmonic, and besides these. Counted on traces of one tile.
HELD_BY_A_HARMONIC, HELD_BY_ROWS = 3, 6
WRITTEN_BY_A_HARMONIC, WRITTEN_BY_ROWS = 28, 14


def attention_workspace(recipe: Recipe, images: int, on_gpu: bool) -> int:
    """Bytes of the tiles of a batch, or of FlexAttention's arrays on a CPU; 0 where attention makes none.

    The Triton kernels keep tiles in registers, the CPU kernel some hundred KB a thread outside torch's allocator.
    """
    budget = workspace_budget(torch.device("cuda" if on_gpu else "cpu"))
    workspace = 0
    for size, attention in _layers(recipe):
        if attention.implementation == "flex" and not on_gpu:
            workspace = max(workspace, images * size.heads * _held_by_flex(attention, size))
            continue
        if _streams(attention, size, on_gpu):
            features = max(1, 2 * attention.grid)
            tile = min(budget // features, images * size.scores)
            workspace = max(workspace, tile * (features + ARRAYS_OF_A_TILE))
        if _tiles_rows(attention, size, on_gpu):
            held = HELD_BY_A_HARMONIC * _harmonics(attention) + HELD_BY_ROWS
            tile = max(budget // HELD, MIN_ROWS * size.heads * size.tokens)
            workspace = max(workspace, min(tile, images * size.heads * size.scores) * held)
    return FP32 * workspace


def _held_by_flex(attention: AttentionConfig, size: LayerSize) -> int:
    """Numbers that FlexAttention's forward pass holds on a CPU for a head and an image, as measured."""
    rows = size.sets * size.tokens
    if attention.has_functions:  # a call for each cosine and sine, all at once
        return 2 * attention.grid * round(5.2 * size.scores + rows * (size.width + 3 * attention.rank))
    return round(3.3 * size.scores + 5 * rows * size.width)


def written_by_rows(recipe: Recipe, on_gpu: bool) -> int:
    """Bytes that tiles of query rows write in a training step, for an image; those of `streaming` do not count."""
    return FP32 * sum(
        size.heads * size.scores * (WRITTEN_BY_A_HARMONIC * _harmonics(attention) + WRITTEN_BY_ROWS)
        for size, attention in _layers(recipe)
        if _tiles_rows(attention, size, on_gpu)
    )


def _layers(recipe: Recipe) -> list[tuple[LayerSize, AttentionConfig]]:
    return [(size, recipe.attention.of_block(n)) for n, size in enumerate(layer_sizes(recipe.model))]


def _harmonics(attention: AttentionConfig) -> int:
    return attention.grid if attention.form == "content" else 0


def _tiles_rows(attention: AttentionConfig, size: LayerSize, on_gpu: bool) -> bool:
    if attention.row is not None and attention.row.by_rows:
        return True
    if attention.form != "content" or not attention.has_functions or attention.implementation == "reference":
        return False
    # With a bias, psi goes row by row whatever computes H.
    return _streams(attention, size, on_gpu) or size.biased


def _streams(attention: AttentionConfig, size: LayerSize, on_gpu: bool) -> bool:
    """Return whether `streaming` runs, or `flex`, which has the same backward pass.

    With `auto`, a GPU takes Triton for the modular Fourier form with any base, up to a head's largest width, and a CPU
    takes its kernel without a base.
    """
    if not attention.has_functions or attention.implementation not in ("auto", "streaming", "flex"):
        return False
    has_kernel = attention.is_modular_series and (on_gpu or attention.base == "zero")
    has_kernel &= not (on_gpu and size.width > LARGEST_WIDTH)
    return attention.implementation != "auto" or not has_kernel


STAGES = ("zero0", "zero1", "zero2", "zero3")
# On a GPU: CUDA's context, cuBLAS's and NCCL's buffers. On a CPU: Python with torch, timm and DeepSpeed, which were
# measured at 0.50 to 0.53 GB beyond the live tensors.
GPU_OVERHEAD, CPU_OVERHEAD = 1_000_000_000, 600_000_000
# The share that the allocator holds beyond live tensors.
FRAGMENTATION = 0.06


@dataclass(frozen=True)
class Choice:
    """One way to train a recipe, and what it needs on a rank.

    config: the DeepSpeed configuration, by name or path. recompute: the policy of `train.recompute`. eval_batch: the
    recipe's, or a smaller one if that is too large. peak: the live tensors at the worst moment. margin: the bytes for
    all else. host: the bytes of the peak that offload moves to the CPU. available: the bytes of the GPU, or of this
    rank's share of the RAM.
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
    """The resources of a rank: `memory` bytes, on a GPU or of a node's RAM; `world` ranks in all."""

    world: int
    memory: int
    on_gpu: bool


def choose(recipe: Recipe, machine: Machine, configs: Sequence[str] = STAGES) -> Choice:
    """The recommended way to train `recipe` on a machine.

    The recipe's `train.micro_batch` is kept if it is set, and so is its policy of recomputation. If nothing fits
    without a policy, policies are tried. If nothing fits at all, the result is the way that needs least, and its `fits`
    is false. `configs` are the DeepSpeed configurations to choose from, the best first.

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


def search(subject: Subject, machine: Machine) -> tuple[dict[str, list[Choice]], Choice]:
    """Return each configuration's choices by micro batch, and the recommended one, as `choose`. Shows its progress."""
    own, grid = subject.recipe.deepspeed.config, dict[str, list[Choice]]()
    configs = usable(subject.recipe, STAGES if own in STAGES else [own])
    sizes = list(micro_batches(subject.recipe, machine.world))
    with work_display() as show_work:
        for number, (config, size) in enumerate(itertools.product(configs, sizes)):
            show_work("plan", number, len(configs) * len(sizes))
            grid.setdefault(config, []).append(consider(subject, machine, config, size))
    choice = recommended(map(preferred, grid.values()))
    return grid, choice if choice.fits else choose(subject.recipe, machine, configs)


def usable(recipe: Recipe, configs: Sequence[str]) -> list[str]:
    """Return the `configs` that can train the recipe; a single one is not judged here, but refused when it is read."""
    refused = refused_stages(recipe)
    return [config for config in configs if config not in refused or len(configs) == 1]


def refused_stages(recipe: Recipe) -> dict[str, str]:
    """Return the STAGES that cannot train the recipe, and why."""
    refusals = {config: stage_refusal(recipe, stage) for stage, config in enumerate(STAGES)}
    return {config: refusal for config, refusal in refusals.items() if refusal}


def recommended(candidates: Iterable[Choice]) -> Choice:
    """Return the first choice that fits, else the one that needs least."""
    considered = []
    for choice in candidates:
        if choice.fits:
            return choice
        considered.append(choice)
    return min(considered, key=lambda choice: choice.needed)


def preferred(choices: Iterable[Choice]) -> Choice:
    """Return the first choice that fits, else the last one: that of the smallest micro batch."""
    for choice in choices:
        if choice.fits:
            break
    return choice


def best(subject: Subject, machine: Machine, config: str) -> Choice:
    """Return the choice of the largest micro batch that fits under a DeepSpeed configuration, else of the smallest."""
    return preferred(consider(subject, machine, config, m) for m in micro_batches(subject.recipe, machine.world))


def micro_batches(recipe: Recipe, world: int) -> Iterator[int]:
    """Yield the micro batches that the recipe allows on `world` ranks, the largest first; only its own if it names one.

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
    """Return what training needs under one configuration with one micro batch.

    Evaluations take the recipe's batch, or halve it until they fit or need no more than training does.
    """
    recipe = subject.recipe.changed(deepspeed__config=config)
    filled = load_ds_config(recipe, machine.world, micro_batch)
    stage = zero_stage(filled)
    accumulation = recipe.train.global_batch // machine.world // micro_batch
    teacher = subject.teacher.parameters * PRECISIONS[recipe.train.precision].weights.itemsize
    case = Case(subject.sizes, filled, recipe, machine.world, accumulation, machine.on_gpu)
    state = replace(kept(case), teacher=teacher)
    loaded = loader_bytes(recipe, micro_batch)

    def choice(worst: Peak, eval_batch: int, loaded: int) -> Choice:
        way = config, stage, recipe.train.recompute.policy, micro_batch, accumulation, eval_batch
        overhead = GPU_OVERHEAD if machine.on_gpu else CPU_OVERHEAD + loaded
        margin, host = overhead + round(FRAGMENTATION * worst.total), min(state.host, worst.total)
        return Choice(*way, peak=worst, margin=margin, host=host, available=machine.memory)

    step = _batch(subject, micro_batch, accumulation)
    training = choice(peak(state, subject.footprint, step), recipe.train.eval_batch, loaded)
    images = recipe.train.eval_batch
    while True:
        rest = evaluation(state, subject.evaluation, _batch(subject, images, 1))
        evaluating = choice(rest, images, loaded + loader_bytes(recipe, images))
        if images == 1 or evaluating.needed <= max(machine.memory, training.needed):
            break
        images //= 2
    return max(replace(training, eval_batch=images), evaluating, key=lambda choice: choice.needed)


def _batch(subject: Subject, images: int, accumulation: int) -> Batch:
    """Return a batch that holds uint8 images (a step's on the CPU, a micro batch's on a GPU) and the model's input."""
    recipe = subject.recipe
    pixels = images * 3 * recipe.model.image_size**2
    raw = pixels * (1 if subject.on_gpu else accumulation)
    made, weights = subject.pixels.itemsize, PRECISIONS[recipe.train.precision].weights.itemsize
    seen = made if made <= weights else made + weights  # the engine rounds them to the weights' dtype
    return Batch(images, raw + seen * pixels, attention_workspace(recipe, images, subject.on_gpu))


def loader_bytes(recipe: Recipe, micro_batch: int) -> int:
    """Bytes of the batches that workers have made ahead, in /dev/shm."""
    return recipe.data.workers * recipe.data.prefetch * micro_batch * 3 * recipe.model.image_size**2
