"""What a micro batch of any size allocates, event by event: traces of two sizes, and a straight line through each."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from karat_scale.plan.tracing import OUTSIDE, Trace

Bytes = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Footprint:
    """The allocations of one forward and backward pass for b images: `constant` + b `slope` bytes each.

    born, died: int64, event numbers; died is `events` for what stays. part: int64, as in `Allocation`.
    gradient: bool.
    """

    constant: Bytes
    slope: Bytes
    born: npt.NDArray[np.int64]
    died: npt.NDArray[np.int64]
    part: npt.NDArray[np.int64]
    gradient: npt.NDArray[np.bool_]
    forward: int
    events: int

    @classmethod
    def through(cls, traces: Mapping[int, Trace]) -> "Footprint":
        """The line through traces of two batch sizes. Raises ValueError where their events do not correspond."""
        (small, first), (large, second) = sorted(traces.items())
        a, b = first.allocations, second.allocations
        if [(x.born, x.died, x.part) for x in a] != [(x.born, x.died, x.part) for x in b]:
            raise ValueError("the model does other things for another batch size")
        sizes = np.array([[x.bytes for x in a], [x.bytes for x in b]], dtype=np.float64)
        slope = (sizes[1] - sizes[0]) / (large - small)
        return cls(
            constant=sizes[0] - small * slope,
            slope=slope,
            born=np.array([x.born for x in a]),
            died=np.array([first.events if x.died is None else x.died for x in a]),
            part=np.array([x.part for x in a]),
            gradient=np.array([x.gradient for x in a]),
            forward=first.forward,
            events=first.events,
        )

    def live(self, batch: int) -> Bytes:
        """Bytes alive after each event, parameters' gradients left out."""
        return self._live_constant + batch * self._live_slope

    @cached_property
    def gradients_made(self) -> Bytes:
        """Bytes of parameters' gradients that have been made up to each event, the event included."""
        made = np.zeros(self.events)
        np.add.at(made, self.born[self.gradient], self.constant[self.gradient])
        return np.cumsum(made)

    @cached_property
    def gradient_in_hand(self) -> Bytes:
        """Bytes of the gradient that is made at each event, if one is."""
        return np.diff(self.gradients_made, prepend=0.0)

    def saved_by_part(self, batch: int, event: int) -> dict[int, int]:
        """Bytes from the forward pass alive after `event`, by part."""
        alive = (self.born < self.forward) & (self.born <= event) & (self.died > event)
        bytes_ = self.constant + batch * self.slope
        parts = range(OUTSIDE, int(self.part.max(initial=OUTSIDE)) + 1)
        return {part: round(bytes_[alive & (self.part == part)].sum()) for part in parts}

    def written(self, batch: int) -> float:
        """Bytes of all that is ever allocated: what a step writes, at least."""
        return float(np.sum(self.constant + batch * self.slope))

    @cached_property
    def _live_constant(self) -> Bytes:
        return self._accumulated(self.constant)

    @cached_property
    def _live_slope(self) -> Bytes:
        return self._accumulated(self.slope)

    def _accumulated(self, bytes_: Bytes) -> Bytes:
        changes = np.zeros(self.events + 1)
        counts = ~self.gradient
        np.add.at(changes, self.born[counts], bytes_[counts])
        np.add.at(changes, self.died[counts], -bytes_[counts])
        return np.cumsum(changes[: self.events])
