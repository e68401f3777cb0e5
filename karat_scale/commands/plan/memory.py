"""A rank's memory at the worst moment of training or of an evaluation, by parts."""

from dataclasses import dataclass

import numpy as np

from karat_scale.commands.plan.footprint import Footprint
from karat_scale.commands.plan.tracing import OUTSIDE
from karat_scale.commands.plan.zero import Kept


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
    gathered = state.gathered * share_left
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
