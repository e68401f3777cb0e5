"""One finished run as the ledger keeps it: docs/ledger/<id>.json, written from the run's own files alone."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from karat_scale.errors import RunDirectoryError, UserError
from karat_scale.files import sealed
from karat_scale.ledger.agreement import Events, check_agreement, read_events, read_summary
from karat_scale.ledger.figures import SummaryFigures
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

    @cached_property
    def figures(self) -> SummaryFigures:
        """What the ledger needs of the summary."""
        return SummaryFigures.of(self.summary, "the summary")

    @property
    def name(self) -> str:
        """Of its file, without the suffix: one for a recipe with its seed."""
        return f"{self.resolved.run.name}-seed{self.resolved.run.seed}-{self.recipe_sha256[:8]}"

    @property
    def epochs(self) -> float:
        """Passes over the training images."""
        return self.figures.samples / self.epoch_images

    def to_text(self) -> str:
        """The file: the fields, and the SHA-256 of their JSON, which tells whether anyone has changed them since."""
        return json.dumps(sealed(self.model_dump()), indent=2) + "\n"


def take_record(run: str) -> Record:
    """What the ledger keeps of a run.

    Raises:
        UserError: no run, an unfinished or damaged one, one that was never evaluated, or whose files disagree.
    """
    directory = RunDirectory(run)
    recipe = directory.recipe()
    summary = read_summary(directory)
    figures, events = SummaryFigures.of(summary, str(directory.summary_file)), read_events(directory)
    check_agreement(directory, recipe, summary, figures, events)
    last = events.evaluations[-1]
    text = portable_recipe(recipe)
    return Record(
        summary=summary,
        recipe=text,
        recipe_sha256=text_digest(text),
        epoch_images=_epoch_images(recipe, figures, events),
        eval_images=last.images,
        eval_weights=last.weights,
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
        record = Record.model_validate({key: value for key, value in content.items() if key != "sha256"})
        name, _ = record.name, record.figures
    except (ValueError, AttributeError, ValidationError, UserError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a record of karat ledger: {reason}; put it back or remove it") from None
    if content != sealed(content) or record.recipe_sha256 != text_digest(record.recipe) or name != path.stem:
        raise UserError(f"{path}: was changed since karat ledger wrote it; put it back or remove it")
    return record


def _epoch_images(recipe: Recipe, figures: SummaryFigures, events: Events) -> int:
    batch = recipe.train.global_batch
    if figures.train_images is not None:
        return figures.train_images // batch * batch
    # Of a run from before `train_images`: its steps tell, where nothing cut them short.
    if not events.training or recipe.train.max_steps:
        raise RunDirectoryError("nothing in this run tells how many images its epochs have; run it anew")
    return events.training[-1].total_steps // recipe.train.epochs * batch
