"""Changes that the tests of the ledger make to a finished run."""

import json
import shutil
from pathlib import Path
from typing import Any

from karat_scale.data.plan import total_steps
from karat_scale.foundation.files import sealed
from karat_scale.recipe import Recipe
from karat_scale.recipe.loading import dump_recipe, load_recipe, text_digest
from karat_scale.training.tasks.detection.recipe import DetectionRecipe
from paper.paper import DataSet, data_sets
from tests.conftest import events, summary

DATA_SETS: dict[str, DataSet] = data_sets()


def copy_run(trained: Path, copy: Path) -> Path:
    """Copy what the ledger reads of a finished run; return the copy."""
    copy.mkdir()
    for name in ("recipe.yaml", "metrics.jsonl", "summary.json"):
        shutil.copy(trained / name, copy)
    name = (trained / "checkpoints" / "latest").read_text().strip()
    (copy / "checkpoints" / name).mkdir(parents=True)
    for file in ("latest", f"{name}/state.json"):
        shutil.copy(trained / "checkpoints" / file, copy / "checkpoints" / file)
    return copy


def change(run: Path, **fields: Any) -> None:
    """Set fields of a summary, or remove those that are None, and seal it as the run would."""
    changed = {**summary(run), **fields}
    kept = {key: x for key, x in changed.items() if x is not None}
    (run / "summary.json").write_text(json.dumps(sealed(kept)))


def pretend(run: Path, name: str, data: str, images: int, *overrides: str, **fields: Any) -> None:
    """Turn a run, in all its files, into one of a shipped recipe on `images` images of a data set."""
    schema = DetectionRecipe if data == "coco" else Recipe
    recipe = load_recipe(name, [f"run.dir={run}", "data.path=/somewhere", *overrides], schema)
    (run / "recipe.yaml").write_text(dump_recipe(recipe))
    train = recipe.train
    steps = total_steps(images // train.global_batch, train.epochs, train.max_steps)
    samples = steps * recipe.train.global_batch
    known = DATA_SETS[data]
    lines = events(run)
    for event in lines:
        event |= {"samples": samples, "step": steps, "total_steps": steps}
        event |= {"images": known.val_images} if event["event"] == "eval" else {}
    (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in lines))
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    of_recipe = {"name": recipe.run.name, "seed": recipe.run.seed, "recipe_sha256": text_digest(dump_recipe(recipe))}
    of_data = {"train_images": images, "classes": known.classes, "classes_sha256": known.classes_sha256}
    change(run, **{**of_recipe, **of_data, "steps": steps, "samples": samples, **fields})


def rows(docs: Path, cell: str) -> list[str]:
    return [line for line in (docs / "reproduction.md").read_text().splitlines() if f"{cell}|" in line]
