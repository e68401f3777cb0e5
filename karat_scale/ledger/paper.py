"""The rows of the paper's tables, from `paper.yaml`, and their data sets, from `data_sets.yaml`."""

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict

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
    """One row: the paper's figures, and the recipe that repeats it. Percent, millions, GB, GFLOPs."""

    model: str
    recipe: str
    overrides: tuple[str, ...] = ()
    top1: float | None = None
    top5: float | None = None
    parameters: float | None = None
    memory: float | None = None
    gflops: tuple[float, float] | None = None
    """GFLOPs of the attention activation, and in total."""


class PaperTable(_Facts):
    """Rows on one data set."""

    title: str
    note: str = ""
    measure: Literal["accuracy", "memory"] = "accuracy"
    data: DataSet
    rows: tuple[PaperRow, ...]


def paper_tables() -> tuple[PaperTable, ...]:
    """Return all tables, in the paper's order."""
    known = data_sets()
    return tuple(PaperTable.model_validate({**table, "data": known[table["data"]]}) for table in _read("paper.yaml"))


def data_sets() -> dict[str, DataSet]:
    """Return the data sets of the tables, by their names in `paper.yaml`."""
    return {name: DataSet.model_validate(about) for name, about in _read("data_sets.yaml").items()}


def _read(name: str) -> Any:
    return yaml.safe_load((_FOLDER / name).read_text(encoding="utf-8"))
