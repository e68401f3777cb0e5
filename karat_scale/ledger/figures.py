"""The fields of a run's summary.json and metrics.jsonl that the ledger needs, with their types."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from karat_scale.errors import RunDirectoryError

Percent = Annotated[float, Field(ge=0.0, le=100.0)]
Count = Annotated[int, Field(ge=1)]
Number = Annotated[int, Field(ge=0)]
Line = Annotated[str, Field(pattern=r"^[^|\x00-\x1f]*$")]  # a cell of a table
M = TypeVar("M", bound="Figures")


class Figures(BaseModel):
    """Some fields of a JSON object. Types are strict: a number in quotes is not a number."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    @classmethod
    def of(cls: type[M], content: Any, where: str) -> M:
        """Validate `content`. Raises RunDirectoryError, which begins with `where` and names the first wrong field."""
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "its content"
            value = "" if first["type"] == "missing" else f" = {str(first['input'])[:40]!r}"
            what = first["msg"].removeprefix("Input ")
            raise RunDirectoryError(f"{where}: damaged: {field}{value}: {what}; put back what the run wrote") from None


class SummaryFigures(Figures):
    """Fields of summary.json. Fields that older runs did not write have a default."""

    name: str
    steps: Count
    samples: Count
    last_top1: Percent
    last_top5: Percent
    images_per_second: Annotated[float, Field(gt=0.0)] | None = None
    peak_memory_mb: Annotated[float, Field(ge=0.0)]
    parameters: Count
    data_digest: Number
    world_size: Count
    device: Line
    processor: Line = "CPU"
    seed: Number | None = None
    train_images: Count | None = None
    classes: Number = 0
    classes_sha256: str = ""
    lineage: dict[str, dict[str, str]] = {}
    recipe_sha256: str | None = None
    sha256: str | None = None


class EvalEvent(Figures):
    """An evaluation."""

    event: Literal["eval"]
    samples: Number
    top1: Percent
    top5: Percent
    images: Count
    weights: Line


class TrainEvent(Figures):
    """Steps of training."""

    event: Literal["train"]
    step: Count
    samples: Count
    total_steps: Count
    data_digest: Number
