"""Where training stands: what a checkpoint must remember besides tensors."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

S = TypeVar("S", bound="RunState")


@dataclass
class RunState:
    """Of any kind of run. The cursor is `step`, finished global batches; `samples` follows from it and their size."""

    step: int = 0
    samples: int = 0
    evaluated_step: int = -1
    best_step: int | None = None
    skipped_steps: int = 0
    skipped_in_row: int = 0
    timed_samples: int = 0
    timed_seconds: float = 0.0
    peak_memory_mb: float = 0.0
    restarts: int = 0
    seconds_to_first_step: float | None = None
    train_images: int = 0
    """Of the data it trains on; 0 where nobody said."""
    class_order_sha256: str = ""
    """Of the names of their classes in the order of the labels; `summary.json` has one of the names in any order."""

    @property
    def images_per_second(self) -> float | None:
        """Training images a second over all restarts, without evaluation, saving and each start's first step."""
        return self.timed_samples / self.timed_seconds if self.timed_seconds else None

    def to_json(self) -> dict[str, Any]:
        """Plain data for `state.json`."""
        return asdict(self)

    @classmethod
    def from_json(cls: type[S], data: dict[str, Any]) -> S:
        """Read `state.json`, passing over keys that are not the state's. Older ones name the class order otherwise."""
        data = {"class_order_sha256": data.get("classes_sha256", ""), **data}
        known = {known.name for known in fields(cls)}
        return cls(**{key: value for key, value in data.items() if key in known})


@dataclass
class TrainState(RunState):
    """Of a run that trains a classifier."""

    best_top1: float | None = None
    best_top5: float | None = None
    last_top1: float | None = None
    last_top5: float | None = None
    data_digest: int = 0
    bad_samples: int = 0
    begun_with: dict[str, str] = field(default_factory=dict)
    """The run that `init_from` took the weights of, as `lineage` says: later starts may not find it."""

    def record(self, top1: float, top5: float) -> bool:
        """Take in an evaluation at this step; whether it is the best so far."""
        self.evaluated_step = self.step
        self.last_top1, self.last_top5 = top1, top5
        is_best = self.best_top1 is None or top1 > self.best_top1
        if is_best:
            self.best_top1, self.best_top5, self.best_step = top1, top5, self.step
        return is_best
