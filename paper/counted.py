"""What we count of the models in the paper's tables of memory and operations, without a run or a GPU.

Counting builds each model on torch's meta device. It takes seconds, so the page reads the counts from `counted.json`.
`python -m paper.counted` writes that file again.
"""

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from karat_scale.foundation.files import write_atomically
from paper.match import reference_recipe
from paper.paper import PaperRow, paper_groups

FILE = Path(__file__).parent / "counted.json"


class Counted(NamedTuple):
    """Of a model: billions of multiply-adds in a forward pass of one image, and millions of operator parameters."""

    gflops: float
    operator: float

    @property
    def text(self) -> str:
        """Both; a model without operators has only the first."""
        return f"{self.gflops:.3f}" + (f"; {self.operator:.3f} M" if self.operator else "")


def counted(row: PaperRow) -> Counted:
    """Return what the file has for a row. Raises KeyError if it has nothing."""
    return Counted(*_read()[_key(row)])


def count(row: PaperRow) -> Counted:
    """Count a row's model."""
    import torch

    from karat_scale.attention.operator import AttentionHeads
    from karat_scale.models.factory import create_model
    from karat_scale.models.flops import forward_flops

    recipe = reference_recipe(row)
    with torch.device("meta"):
        network = create_model(recipe.model, recipe.attention)
    # A set, since all blocks may share an operator.
    learned = {p for module in network.modules() if isinstance(module, AttentionHeads) for p in module.parameters()}
    operations = forward_flops(network, recipe.model.image_size)
    return Counted(round(operations / 2e9, 3), round(sum(p.numel() for p in learned) / 1e6, 3))


def counted_rows() -> Iterable[PaperRow]:
    """Yield the rows that have counts."""
    for table in (table for group in paper_groups() for table in group.tables):
        yield from table.rows if table.measure == "memory" else ()


def _key(row: PaperRow) -> str:
    return " ".join([row.recipe, *row.overrides])


@functools.cache
def _read() -> dict[str, list[float]]:
    counts: dict[str, list[float]] = json.loads(FILE.read_text(encoding="utf-8"))
    return counts


if __name__ == "__main__":
    lines = [f"{json.dumps(_key(row))}: {json.dumps(count(row))}" for row in counted_rows()]
    write_atomically(FILE, "{\n" + ",\n".join(lines) + "\n}\n")
