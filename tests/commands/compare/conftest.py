"""Fixtures: runs of a small recipe, and copies that look like runs of another seed or recipe."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from karat_scale.foundation.files import sealed
from karat_scale.recipe.loading import dump_recipe, load_recipe, text_digest
from tests.conftest import TrainOnce

QUICK = ("train.epochs=3", "schedule.warmup_epochs=0", "checkpoint.every_minutes=null")
Copy = Callable[..., Path]


@pytest.fixture(scope="session")
def trained(shards: Path, train_once: TrainOnce, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with two trained runs, `seed0` and `seed1`, of three evaluations each."""
    root = tmp_path_factory.mktemp("compared")
    for name in ("seed0", "seed1"):
        (root / name).symlink_to(train_once(name, f"path: {shards}", *QUICK, f"run.seed={name[-1]}"))
    return root


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Copy:
    """Return a function that copies a run with other overrides and, if given, other top-1 and other summary fields.

    The files of a copy agree with each other.
    """

    def make(name: str, *overrides: str, top1: list[float] | None = None, **fields: Any) -> Path:
        run = tmp_path / name
        run.mkdir()
        for file in ("metrics.jsonl", "summary.json"):
            shutil.copy(trained / "seed0" / file, run)
        recipe = dump_recipe(load_recipe(trained / "seed0" / "recipe.yaml", [*overrides, f"run.dir={run}"]))
        (run / "recipe.yaml").write_text(recipe)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        summary = json.loads((run / "summary.json").read_text())
        evaluations = [line for line in lines if line["event"] == "eval"]
        if top1:
            for line, value in zip(evaluations, top1, strict=True):
                line["top1"] = value
            best = max(evaluations, key=lambda line: line["top1"])
            summary |= {"best_step": best["step"]}
            summary |= {f"best_{score}": best[score] for score in ("top1", "top5")}
            summary |= {"last_top1": top1[-1]}
        write_lines(run, lines)
        summary |= {"recipe_sha256": text_digest(recipe), **fields}
        (run / "summary.json").write_text(json.dumps(sealed(summary)))
        return run

    return make


def write_lines(run: Path, lines: list[dict[str, Any]]) -> None:
    """Write the events of a run."""
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
