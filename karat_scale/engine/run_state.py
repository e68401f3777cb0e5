"""The state of training: what a checkpoint must remember besides tensors."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from karat_scale.recipe.base import wanted_by

S = TypeVar("S", bound="RunState")


@dataclass
class RunState:
    """The state of any run. The cursor is `step`, finished global batches; `samples` follows from it and their size.

    A kind of run adds `best_NAME` and `last_NAME` for each of its `scores`.
    """

    __pydantic_config__: ClassVar = ConfigDict(allow_inf_nan=False)
    scores: ClassVar[tuple[str, ...]] = ()
    """The scores to keep. The first one tells which evaluation is the best."""

    step: int = 0
    samples: int = 0
    evaluated_step: int = -1
    best_step: int | None = None
    skipped_steps: int = 0
    skipped_in_row: int = 0
    timed_samples: int = 0
    timed_seconds: float = 0.0
    timed_on: str = ""
    """The number of ranks and the device that these two are of; on others they begin again."""
    peak_memory_mb: float = 0.0
    restarts: int = 0
    seconds_to_first_step: float | None = None
    train_images: int = 0
    """The number of images it trains on; 0 if unknown."""
    train_identity: str = ""
    """The identity of these images: `kind of files:digest`. Only digests of one kind can be compared."""
    val_images: int = 0
    """The number of images that the scores are of; 0 if unknown."""
    class_order_sha256: str = ""
    """The digest of the class names in the order of the labels; `summary.json` has one of the names in any order."""
    begun_with: dict[str, str] = field(default_factory=dict)
    """Name and recipe of the run that `init_from` took the weights of: later starts may not find it."""
    unreported_steps: Annotated[int, Field(ge=0)] = 0
    """The steps since the last report of training, which the next report includes."""
    unreported_losses: dict[str, list[Annotated[int, Field(ge=-(2**31), lt=2**31)]]] = field(default_factory=dict)
    """Each rank's sum of each loss over those steps, as the bits of a float32."""

    @property
    def images_per_second(self) -> float | None:
        """Training images per second on the last machine, without evaluation, saving and each start's first step."""
        return self.timed_samples / self.timed_seconds if self.timed_seconds else None

    def record(self, evaluation: Mapping[str, Any]) -> bool:
        """Keep the scores of an evaluation at this step; return whether it is the best so far."""
        self.evaluated_step = self.step
        best = getattr(self, f"best_{self.scores[0]}")
        is_best = best is None or evaluation[self.scores[0]] > best
        if is_best:
            self.best_step = self.step
        for name in self.scores:
            for which in ("last", "best") if is_best else ("last",):
                setattr(self, f"{which}_{name}", evaluation[name])
        return is_best

    def without_best(self) -> dict[str, Any]:
        """The fields to set so that the next evaluation is the best."""
        return {known.name: None for known in fields(self) if known.name.startswith("best_")}

    def to_json(self) -> dict[str, Any]:
        """Plain data for `state.json`."""
        return asdict(self)

    @classmethod
    def from_json(cls: type[S], data: dict[str, Any]) -> S:
        """Read `state.json`, skipping unknown keys. Older files have another name for the class order.

        Raises:
            ValueError: a value is not of its field's kind; the message is one line.
        """
        data = {"class_order_sha256": data.get("classes_sha256", ""), **data}
        known = {known.name: data[known.name] for known in fields(cls) if known.name in data}
        try:
            return TypeAdapter(cls).validate_json(json.dumps(known), strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise ValueError(f"{first['loc'][0]}: {wanted_by(first)}") from None
