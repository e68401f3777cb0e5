"""Steps that went wrong, written down so that `karat replay` can take them again.

RUN/incidents/step-00001234.json says which samples the step had, on which ranks, and from which checkpoint training
reaches it. That checkpoint is kept.
"""

import json
import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from karat_scale.checkpoint.store import CheckpointStore, checkpoint_name
from karat_scale.data.plan import TrainPlan
from karat_scale.foundation.files import replace_file

# Each keeps a checkpoint, so a run that goes wrong often must not fill the disk.
KEPT_CHECKPOINTS, MOST = 3, 50
WINDOW, LEAST = 100, 20


class Incidents:
    """The directory `incidents` of a run. Rank 0 alone writes to it."""

    def __init__(self, directory: Path, store: CheckpointStore, plan: TrainPlan) -> None:
        self._directory, self._store, self._plan = directory, store, plan
        self._noted = 0

    def note(self, step: int, kind: str, **figures: float) -> str:
        """Write down what happened in a step, counted from 1; returns how to look into it, or what prevented that."""
        if self._noted >= MOST:
            return f"this start has noted {MOST} others already"
        self._noted += 1
        checkpoint = next(iter(checkpoints_before(self._store, step)), None)
        record = {
            "step": step,
            "kind": kind,
            **{name: value if math.isfinite(value) else str(value) for name, value in figures.items()},
            "checkpoint": checkpoint,
            **self._batch(step),
        }
        try:
            self._directory.mkdir(exist_ok=True)
            replace_file(self._directory / f"{checkpoint_name(step)}.json", json.dumps(record, indent=1) + "\n")
            if checkpoint is not None and len(self._store.pinned()) < KEPT_CHECKPOINTS:
                self._store.pin(checkpoint)
        except OSError as error:
            return f"{self._directory} cannot be written: {error.strerror}"
        return f"karat replay {self._directory.parent} {step} looks into it"

    def _batch(self, step: int) -> dict[str, Any]:
        """The samples of a step in the order of the ranks and of their micro batches."""
        plan = self._plan
        epoch, batch = divmod(step - 1, plan.steps_per_epoch)
        sizes = {"world_size": plan.world_size, "micro_batch": plan.micro_batch}
        if plan.lanes:  # only the ranks that have read them know the samples of a stream
            return {"epoch": epoch, "batch": batch, **sizes, "samples": None}
        ids = plan.epoch_order(epoch)[batch * plan.global_batch : (batch + 1) * plan.global_batch]
        return {"epoch": epoch, "batch": batch, **sizes, "samples": ids.tolist()}


def checkpoints_before(store: CheckpointStore, step: int) -> list[str]:
    """Return the checkpoints from which training reaches a step, newest first."""
    return [name for name in store.names() if name < checkpoint_name(step)]


class Spikes:
    """Finds losses far above those of the steps before.

    deviations: a loss is a spike if it is so many standard deviations above the mean of the last WINDOW finite losses.
    """

    def __init__(self, deviations: float) -> None:
        self._deviations = deviations
        self._last: deque[float] = deque(maxlen=WINDOW)

    def find(self, losses: Sequence[float]) -> list[tuple[int, float, float]]:
        """Return (position, loss, limit) of each spike among further losses."""
        found = []
        for position, loss in enumerate(losses):
            if not math.isfinite(loss):
                continue
            limit = self._limit()
            if loss > limit:
                found.append((position, loss, limit))
            self._last.append(loss)
        return found

    def _limit(self) -> float:
        count = len(self._last)
        if count < LEAST:
            return math.inf
        mean = math.fsum(self._last) / count
        variance = math.fsum((loss - mean) ** 2 for loss in self._last) / count
        return mean + self._deviations * math.sqrt(variance)
