"""The rows of the paper's tables, from `paper.yaml`."""

from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict

_FILE = Path(__file__).with_name("paper.yaml")


class PaperRow(BaseModel):
    """One row: the paper's figures, and what repeats it. Percent, millions, GB, GFLOPs."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str
    recipe: str
    overrides: tuple[str, ...] = ()
    top1: float | None = None
    top5: float | None = None
    parameters: float | None = None
    memory: float | None = None
    gflops: tuple[float, float] | None = None
    """Of the attention activation, and in all."""


class PaperTable(BaseModel):
    """Rows on one data set, with the size of its training split."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    note: str = ""
    measure: Literal["accuracy", "memory"] = "accuracy"
    images: int
    rows: tuple[PaperRow, ...]


def paper_tables() -> tuple[PaperTable, ...]:
    """All tables, in the paper's order."""
    tree = yaml.safe_load(_FILE.read_text(encoding="utf-8"))
    return tuple(PaperTable.model_validate(table) for table in tree)
