"""The rows of the paper's tables, from `paper.yaml`, and their data sets, from `data_sets.yaml`."""

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

_FOLDER = Path(__file__).parent


class _Facts(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSet(_Facts):
    """The identity of a data set: images of its two splits, number of classes, and the digest of their names."""

    images: int
    val_images: int
    classes: int
    classes_sha256: str


class PaperRow(_Facts):
    """One row: the paper's figures, and the recipe that repeats it. Percent, millions, GB, GFLOPs.

    Args:
        gflops: of the attention activation, and in total.
        box, mask: AP, AP50 and AP75.
        operator: parameters of the learned operators.
        doubts: what else the paper says of these figures, where it contradicts itself.
    """

    model: str
    recipe: str
    overrides: tuple[str, ...] = ()
    top1: float | None = None
    top5: float | None = None
    parameters: float | None = None
    memory: float | None = None
    gflops: tuple[float, float] | None = None
    total_gflops: float | None = None
    box: tuple[float, float, float] | None = None
    mask: tuple[float, float, float] | None = None
    operator: float | None = None
    doubts: tuple[str, ...] = ()


class PaperTable(_Facts):
    """Rows on one data set, which is the title.

    Args:
        overrides: of every row, before the row's own.
    """

    title: str
    measure: Literal["accuracy", "memory", "detection"] = "accuracy"
    data: DataSet
    overrides: tuple[str, ...] = ()
    rows: tuple[PaperRow, ...]

    @field_validator("rows")
    @classmethod
    def _have_the_overrides(cls, rows: tuple[PaperRow, ...], info: ValidationInfo) -> tuple[PaperRow, ...]:
        every = info.data["overrides"]
        return tuple(row.model_copy(update={"overrides": (*every, *row.overrides)}) for row in rows)


class PaperGroup(BaseModel):
    """A table of the paper: the same models on some data sets."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    note: str = ""
    tables: tuple[PaperTable, ...]


def paper_groups() -> tuple[PaperGroup, ...]:
    """Return all tables of the paper."""
    known = data_sets()
    groups = [
        {**group, "tables": [{**table, "data": known[table["data"]]} for table in group["tables"]]}
        for group in _read("paper.yaml")
    ]
    return tuple(PaperGroup.model_validate(group) for group in groups)


def data_sets() -> dict[str, DataSet]:
    """Return the data sets of the tables, by their names in `paper.yaml`."""
    return {name: DataSet.model_validate(about) for name, about in _read("data_sets.yaml").items()}


def _read(name: str) -> Any:
    return yaml.safe_load((_FOLDER / name).read_text(encoding="utf-8"))
