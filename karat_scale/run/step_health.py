"""Steps that were skipped, as their gradients are not finite, and losses that jump: found, noted, and ended at."""

import math

from karat_scale.engine.run_state import RunState
from karat_scale.errors import DivergedError
from karat_scale.reporting.interval import Interval
from karat_scale.run.incidents import Spikes
from karat_scale.run.parts import Parts


class StepHealth:
    """Looks at the norms and losses that an interval has kept on the device.

    grad_norm: of the last step that was looked at.
    """

    def __init__(self, parts: Parts, state: RunState, interval: Interval) -> None:
        self._parts, self._state, self._interval = parts, state, interval
        self.grad_norm: float | None = None
        deviations = parts.recipe.train.detect_spikes
        self._spikes = Spikes(deviations) if deviations is not None else None

    @property
    def watches_losses(self) -> bool:
        """True if the interval must keep the loss of each step."""
        return self._spikes is not None

    def look(self) -> None:
        """Look which steps were skipped since the last look; the same on all ranks.

        Raises:
            DivergedError: the recipe says to stop at such a step, or as many in a row were skipped as it allows.
        """
        norms = self._interval.take_norms()
        for step, norm in enumerate(norms, start=self._state.step - len(norms) + 1):
            self.grad_norm = norm
            self._state.skipped_in_row = 0 if math.isfinite(norm) else self._state.skipped_in_row + 1
            if self._state.skipped_in_row:
                self._note_skipped(step, norm)
        if self._spikes is not None:
            self._note_spikes(self._spikes)

    def _note_spikes(self, spikes: Spikes) -> None:
        """Collective: a step's loss is the mean over the ranks."""
        parts, losses = self._parts, self._interval.take_step_losses()
        if not len(losses):
            return
        first = self._state.step - len(losses) + 1
        for place, loss, limit in spikes.find((parts.world.sum(losses) / parts.world.size).tolist()):
            if parts.world.is_main:
                advice = parts.incidents.note(first + place, "spike", loss=loss, limit=limit)
                parts.reporter.spike(first + place, loss, limit, advice)

    def _note_skipped(self, step: int, norm: float) -> None:
        state, train = self._state, self._parts.recipe.train
        stop = train.on_nonfinite == "stop"
        what, advice = f"step {step} has a loss or gradients that are not finite", ""
        if self._parts.world.is_main and train.precision != "fp16":  # where the loss scale overflows now and then
            advice = f"; {self._parts.incidents.note(step, 'not finite', grad_norm=norm)}"
        if not stop and state.skipped_in_row < train.max_skipped_steps:
            if self._parts.world.is_main:
                self._parts.reporter.warn(f"{what}; skipped{advice}")
            return
        self._parts.checkpoints.saver.finish()
        rule = "train.on_nonfinite = stop" if stop else f"the last of train.max_skipped_steps = {state.skipped_in_row}"
        last = self._parts.checkpoints.store.pointed("latest") or "none"
        raise DivergedError(
            f"{what}, {rule}; the last checkpoint is {last}; lower optim.lr or look into the data{advice}"
        )
