"""The fields of a run's summary.json and metrics.jsonl that the ledger needs, with their types."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from karat_scale.commands.compare.finished import Count, Figures, Number, Percent

Line = Annotated[str, Field(pattern=r"^[^|\x00-\x1f]*$")]  # a cell of a table


class SummaryFigures(Figures):
    """Fields of summary.json. Fields that older runs did not write have a default."""

    name: str
    steps: Count
    samples: Count
    images_per_second: Annotated[float, Field(gt=0.0)] | None = None
    peak_memory_mb: Annotated[float, Field(ge=0.0)]
    parameters: Count
    data_digest: Number | None = None
    world_size: Count
    device: Line
    processor: Line = "CPU"
    seed: Number | None = None
    train_images: Count | None = None
    classes: Number = 0
    classes_sha256: str = ""
    lineage: dict[str, dict[str, str]] = Field(default={})
    recipe_sha256: str | None = None
    sha256: str | None = None


class ClassifierSummary(SummaryFigures):
    """Of a run of `karat train`."""

    last_top1: Percent
    last_top5: Percent


class DetectorSummary(SummaryFigures):
    """Of a run of `karat detect`."""

    last_box_ap: Percent
    last_mask_ap: Percent


class EvalEvent(Figures):
    """An evaluation."""

    scores: ClassVar[tuple[str, ...]]
    """The fields that `summary.json` has, too, as `last_NAME`."""

    event: Literal["eval"]
    samples: Number
    images: Count
    weights: Line


class ClassifierEval(EvalEvent):
    """Of a run of `karat train`."""

    scores = ("top1", "top5")

    top1: Percent
    top5: Percent


class Averages(Figures):
    """COCO's averages of an evaluation."""

    box_ap: Percent
    box_ap50: Percent
    box_ap75: Percent
    mask_ap: Percent
    mask_ap50: Percent
    mask_ap75: Percent

    @property
    def parts(self) -> tuple[tuple[float, ...], ...]:
        """AP, AP50 and AP75 of boxes, and of masks."""
        return (self.box_ap, self.box_ap50, self.box_ap75), (self.mask_ap, self.mask_ap50, self.mask_ap75)


class DetectorEval(EvalEvent, Averages):
    """Of a run of `karat detect`."""

    scores = ("box_ap", "mask_ap")


class TrainEvent(Figures):
    """Steps of training."""

    event: Literal["train"]
    step: Count
    samples: Count
    total_steps: Count
    data_digest: Number | None = None
