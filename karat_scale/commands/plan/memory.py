"""A rank's memory at the worst moment of training or of an evaluation, by parts.

What a micro batch of any size allocates and launches follows from traces of two sizes, by a straight line through each
pair of figures. A trace does not see the tiles of attention, so their memory and traffic are counted here. The tiles of
`streaming` stay within an operation. Those of query rows (`attend_rows`) are not traced, as their number follows from
the batch.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from karat_scale.attention.functional import choosing_as_on_a_gpu
from karat_scale.attention.kernels.triton_fourier import LARGEST_WIDTH
from karat_scale.attention.routes import MIN_ROWS, workspace_budget
from karat_scale.attention.variants import HELD, planning
from karat_scale.commands.plan.tracing import OUTSIDE, Launches, Trace, fake_copy, trace_step
from karat_scale.commands.plan.zero import FP32, Kept, ParameterSizes
from karat_scale.engine.engine import PRECISIONS
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

    All [n]: died: int64, n for what stays; part: int64, as in `Allocation`; gradient: bool. The first `forward` are the
    forward pass's. An event is the birth of one of them. launches: the kernels, as many for every b.
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
        """The line through traces of two batch sizes. Raises ValueError where they do not correspond."""
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
        """Bytes alive after each event, parameters' gradients left out."""
        constant, slope = self._live
        return constant + batch * slope

    @cached_property
    def gradients_made(self) -> Bytes:
        """Bytes of parameters' gradients that have been made up to each event, its own included."""
        return np.cumsum(self.gradient_in_hand)

    @cached_property
    def gradient_in_hand(self) -> Bytes:
        """Bytes of the gradient that is made at each event, if one is."""
        return np.where(self.gradient, self.constant, 0.0)

    def saved_by_part(self, batch: int, event: int) -> dict[int, int]:
        """Bytes from the forward pass alive after `event`, by part."""
        born = np.arange(len(self.died))
        alive = (born < self.forward) & (born <= event) & (self.died > event)
        bytes_ = self.constant + batch * self.slope
        parts = range(OUTSIDE, int(self.part.max(initial=OUTSIDE)) + 1)
        return {part: round(bytes_[alive & (self.part == part)].sum()) for part in parts}

    def written(self, batch: int) -> float:
        """Bytes of all that is ever allocated: what a step writes, at least."""
        return float(np.sum(self.constant + batch * self.slope))

    @cached_property
    def _live(self) -> tuple[Bytes, Bytes]:
        return self._accumulated(self.constant), self._accumulated(self.slope)

    def _accumulated(self, bytes_: Bytes) -> Bytes:
        changes = np.append(np.where(self.gradient, 0.0, bytes_), 0.0)
        np.add.at(changes, self.died[~self.gradient], -bytes_[~self.gradient])
        return np.cumsum(changes)[:-1]


# Two sizes that mixup's pairs allow.
TRACED_BATCHES = (2, 4)


class Subject:
    """What is planned: a recipe's model as it would run on a GPU, or on this machine's CPU, on fake tensors.

    Raises RecipeError where the model cannot be built.
    """

    def __init__(self, recipe: Recipe, on_gpu: bool) -> None:
        if recipe.attention.transfer_from:
            raise RecipeError("attention.transfer_from: a teacher's memory is not known; plan without it, and add it")
        self.recipe, self.on_gpu = recipe, on_gpu
        self.teacher = planned_cost(recipe)
        self.sizes = ParameterSizes.of(outline(recipe), recipe.optim)
        self._precision = PRECISIONS[recipe.train.precision]
        # As `pixel_dtype` and the task choose it.
        self.pixels = self._precision.compute if on_gpu and not recipe.distill.from_ else torch.float32

    @cached_property
    def footprint(self) -> Footprint:
        """What a micro batch allocates and launches, at every ZeRO stage.

        Raises RecipeError where the model cannot run as the recipe says.
        """
        return self._trace(trains=True)

    @cached_property
    def evaluation(self) -> Footprint:
        """As `footprint`, of a batch of an evaluation, which recomputes nothing."""
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
    """b images that pass at once: `held` bytes are there all through it, `inside` are what operations take."""

    images: int
    held: int
    inside: int


def peak(state: Kept, footprint: Footprint, batch: Batch) -> Peak:
    """The worst of the moments of training."""
    moments = (
        Peak("start", {"parameters": state.starting}, {}),
        _backward(state, footprint, batch),
        _step("reduce", state, state.reducing, batch),
        _step("step", state, state.stepping, batch),
    )
    return max(moments, key=lambda moment: moment.total)


def evaluation(state: Kept, footprint: Footprint, batch: Batch) -> Peak:
    """The worst moment of an evaluation: a forward pass that saves nothing, beside all that rests between steps."""
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
    """Forward, too: its own worst moment is its end, where backward begins."""
    live = footprint.live(batch.images)
    made = footprint.gradients_made
    gradients = state.keeps_gradients * made + state.partition * (made > 0) * (made > state.flush_after)
    if state.passing:
        gradients = gradients + np.minimum((1 - state.keeps_gradients) * made, state.passing)
    elif state.keeps_gradients != 1:
        gradients = gradients + footprint.gradient_in_hand
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


# Beside a tile's features, its scores and their gradients, and products of them that live for a moment.
ARRAYS_OF_A_TILE = 3
# Of a tile of query rows, in arrays of the size of its scores: what is alive at the worst moment of its backward pass,
# and all that is ever allocated. Of each harmonic, and beside them; counted on traces of one tile.
HELD_BY_A_HARMONIC, HELD_BY_ROWS = 3, 6
WRITTEN_BY_A_HARMONIC, WRITTEN_BY_ROWS = 28, 14


def attention_workspace(recipe: Recipe, images: int, on_gpu: bool) -> int:
    """Bytes of the tiles of a batch; 0 where attention makes none.

    The Triton kernels keep tiles in registers, the CPU kernel some hundred KB a thread outside torch's allocator.
    """
    budget = workspace_budget(torch.device("cuda" if on_gpu else "cpu"))
    workspace = 0
    for size, attention in _layers(recipe):
        if _streams(attention, size, on_gpu):
            features = max(1, 2 * attention.grid)
            tile = min(budget // features, images * size.scores)
            workspace = max(workspace, tile * (features + ARRAYS_OF_A_TILE))
        if _tiles_rows(attention, size, on_gpu):
            held = HELD_BY_A_HARMONIC * _harmonics(attention) + HELD_BY_ROWS
            workspace = max(workspace, _rows(size, images, budget) * held)
    return FP32 * workspace


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


def _rows(size: LayerSize, images: int, budget: int) -> int:
    """Scores in a tile of query rows."""
    return min(max(budget // HELD, MIN_ROWS * size.heads * size.tokens), images * size.heads * size.scores)


def _tiles_rows(attention: AttentionConfig, size: LayerSize, on_gpu: bool) -> bool:
    if attention.row is not None and attention.row.by_rows:
        return True
    if attention.form != "content" or not attention.has_functions or attention.implementation == "reference":
        return False
    # With a bias, psi goes row by row whatever computes H.
    return _streams(attention, size, on_gpu) or size.biased


def _streams(attention: AttentionConfig, size: LayerSize, on_gpu: bool) -> bool:
    """Whether `streaming` runs, or `flex`, which has its backward pass.

    With `auto`, a GPU takes Triton for the modular Fourier form with any base, up to a head's largest width, and a CPU
    takes its kernel without a base.
    """
    if not attention.has_functions or attention.implementation not in ("auto", "streaming", "flex"):
        return False
    has_kernel = attention.is_modular_series and (on_gpu or attention.base == "zero")
    has_kernel &= not (on_gpu and size.width > LARGEST_WIDTH)
    return attention.implementation != "auto" or not has_kernel
