"""One finished run as the ledger keeps it: docs/ledger/<id>.json, written from the run's own files alone."""

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from karat_scale.errors import RecipeError, RunDirectoryError, UserError
from karat_scale.recipe import Recipe
from karat_scale.recipe.loading import validate_recipe
from karat_scale.recipe.portable import portable_recipe, text_digest
from karat_scale.train.run_directory import RunDirectory


class Record(BaseModel):
    """A run's summary and resolved recipe, and what its metrics add.

    Args:
        summary: the run's `summary.json`, as it is.
        recipe: the resolved recipe, YAML, without this machine's directories.
        recipe_sha256: of that text.
        epoch_images: training images an epoch, in whole global batches.
        eval_images: images of the last evaluation.
        eval_weights: "raw" or "ema", which was evaluated.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    summary: dict[str, Any]
    recipe: str
    recipe_sha256: str
    epoch_images: int
    eval_images: int
    eval_weights: str

    @cached_property
    def resolved(self) -> Recipe:
        """The recipe, with the defaults of today for keys that it did not have."""
        return validate_recipe(yaml.safe_load(self.recipe), "the recipe")

    @property
    def name(self) -> str:
        """Of its file, without the suffix: one for a recipe with its seed."""
        return f"{self.resolved.run.name}-seed{self.resolved.run.seed}-{self.recipe_sha256[:8]}"

    @property
    def epochs(self) -> float:
        """Passes over the training images."""
        return int(self.summary["samples"]) / self.epoch_images

    def to_text(self) -> str:
        """The file: the fields, and the SHA-256 of their JSON, which tells whether anyone has changed them since."""
        content = self.model_dump()
        return json.dumps({**content, "sha256": _digest(content)}, indent=2) + "\n"


def take_record(run: str) -> Record:
    """What the ledger keeps of a run.

    Raises:
        UserError: no run, an unfinished or damaged one, one that was never evaluated, or whose files disagree.
    """
    directory = RunDirectory(run)
    recipe = directory.recipe()
    summary = _read_summary(directory)
    if summary.get("exit") != 0:
        raise RunDirectoryError(
            f"{run}: has not finished ({summary.get('reason', 'no reason given')}); finish it first"
        )
    events = list(_read_events(directory.metrics_file))
    evaluations = [event for event in events if event["event"] == "eval"]
    if not evaluations:
        raise RunDirectoryError(f"{run}: was never evaluated, so there is no figure for the ledger")
    last = evaluations[-1]
    for ours, theirs in (("last_top1", "top1"), ("last_top5", "top5"), ("samples", "samples")):
        if summary.get(ours) != last[theirs]:
            raise RunDirectoryError(
                f"{run}: summary.json has {ours} = {summary.get(ours)}, and the last evaluation in metrics.jsonl "
                f"{theirs} = {last[theirs]}; put back the files that the run wrote"
            )
    text = portable_recipe(recipe)
    return Record(
        summary=summary,
        recipe=text,
        recipe_sha256=text_digest(text),
        epoch_images=_epoch_images(recipe, summary, events),
        eval_images=last["images"],
        eval_weights=last["weights"],
    )


def read_records(folder: Path) -> list[Record]:
    """All records of a folder, by name.

    Raises:
        UserError: one is damaged, was changed since it was written, or bears another's name.
    """
    return [_read_record(path) for path in sorted(folder.glob("*.json"))]


def _read_record(path: Path) -> Record:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        digest = content.pop("sha256", None)
        record = Record.model_validate(content)
        name = record.name
    except (ValueError, AttributeError, ValidationError, RecipeError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a record of karat ledger: {reason}; put it back or remove it") from None
    if digest != _digest(content) or record.recipe_sha256 != text_digest(record.recipe) or name != path.stem:
        raise UserError(f"{path}: was changed since karat ledger wrote it; put it back or remove it")
    return record


def _digest(content: dict[str, Any]) -> str:
    return text_digest(json.dumps(content, sort_keys=True))


def _read_summary(directory: RunDirectory) -> dict[str, Any]:
    if directory.is_summary_damaged:
        raise RunDirectoryError(f"{directory.summary_file}: damaged, it is not JSON")
    summary = directory.summary()
    if summary is None:
        raise RunDirectoryError(f"{directory.path}: has no summary.json, so it has not finished; finish it first")
    return summary


def _read_events(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise RunDirectoryError(f"{path} is missing; the ledger compares the summary with it") from None
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line)
            event["event"]
        except (ValueError, TypeError, KeyError):
            raise RunDirectoryError(f"{path}, line {number}: damaged, it is no event") from None
        yield event


def _epoch_images(recipe: Recipe, summary: dict[str, Any], events: list[dict[str, Any]]) -> int:
    batch = recipe.train.global_batch
    if "train_images" in summary:
        return int(summary["train_images"]) // batch * batch
    # Of a run from before `train_images`: its steps tell, where nothing cut them short.
    totals = [event["total_steps"] for event in events if event["event"] == "train"]
    if not totals or recipe.train.max_steps:
        raise RunDirectoryError("nothing in this run tells how many images its epochs have; run it anew")
    return int(totals[-1]) // recipe.train.epochs * batch
