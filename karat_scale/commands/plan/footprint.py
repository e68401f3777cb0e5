"""What a micro batch of any size allocates and launches: traces of two sizes, and a straight line through each."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from karat_scale.commands.plan.launches import Launches
from karat_scale.commands.plan.tracing import OUTSIDE, Trace

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
