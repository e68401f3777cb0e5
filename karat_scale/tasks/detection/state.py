"""The state of a detector's training."""

from dataclasses import dataclass

from karat_scale.engine.run_state import RunState
from karat_scale.tasks.detection.evaluate import DetectionScores


@dataclass
class DetectionState(RunState):
    """COCO's averages in percent; the best is the best of masks."""

    best_box_ap: float | None = None
    best_mask_ap: float | None = None
    last_box_ap: float | None = None
    last_mask_ap: float | None = None

    def record(self, scores: DetectionScores) -> bool:
        """Record an evaluation at this step; returns True if it is the best so far."""
        self.evaluated_step = self.step
        self.last_box_ap, self.last_mask_ap = scores.box_ap, scores.mask_ap
        is_best = self.best_mask_ap is None or scores.mask_ap > self.best_mask_ap
        if is_best:
            self.best_box_ap, self.best_mask_ap, self.best_step = scores.box_ap, scores.mask_ap, self.step
        return is_best
