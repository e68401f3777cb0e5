"""One finished run in the ledger: docs/ledger/<id>.json, written only from the run's own files."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from karat_scale.commands.compare.finished import read_summary
from karat_scale.commands.evaluate.predictions import read_evaluations
from karat_scale.foundation.errors import RunDirectoryError, UserError
from karat_scale.foundation.files import parse_json, sealed
from karat_scale.recipe import RunRecipe
from karat_scale.recipe.base import first_mistake
from karat_scale.recipe.loading import portable_recipe, text_digest, validate_recipe
from karat_scale.training.run_directory import RunDirectory
from paper.agreement import check_agreement, read_events
from paper.figures import Averages, ClassifierSummary, DetectorSummary
from paper.kinds import CLASSIFIER, DETECTOR, KINDS, Kind


class Record(BaseModel):
    """A run's summary, its resolved recipe, and some values from its metrics.

    Args:
        summary: the run's `summary.json`, unchanged.
        recipe: the resolved recipe, YAML, without this machine's directories.
        recipe_sha256: of that text.
        epoch_images: training images per epoch, in whole global batches.
        eval_images: images of the last evaluation.
        eval_weights: "raw" or "ema", the weights that were evaluated.
        evaluations: the run's results on other test sets, by name, without this machine's directories.
        averages: of the last evaluation, in a run of `karat detect`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    summary: dict[str, Any]
    recipe: str
    recipe_sha256: str
    epoch_images: int
    eval_images: int
    eval_weights: str
    evaluations: list[dict[str, Any]] = []
    averages: Averages | None = None

    @property
    def kind(self) -> Kind:
        """The kind of run."""
        return CLASSIFIER if self.averages is None else DETECTOR

    @cached_property
    def resolved(self) -> RunRecipe:
        """The recipe, with today's defaults for keys that did not exist then."""
        tree = yaml.safe_load(self.recipe)
        # Keys that recipes had when these runs were made. None of the runs asked for what they did.
        for key in ("budget_gb", "partition", "cpu"):
            tree["train"].get("recompute", {}).pop(key, None)
        tree["log"].pop("tensorboard", None)
        return validate_recipe(tree, "the recipe", self.kind.recipe)

    @cached_property
    def figures(self) -> ClassifierSummary | DetectorSummary:
        """The fields of the summary that the ledger needs."""
        return self.kind.summary.of(self.summary, "the summary")

    @property
    def result(self) -> tuple[tuple[float, ...], ...]:
        """The last evaluation in percent: top-1 and top-5, or AP, AP50 and AP75 of boxes, and of masks."""
        if isinstance(self.figures, ClassifierSummary):
            return ((self.figures.last_top1, self.figures.last_top5),)
        assert self.averages is not None
        return self.averages.parts

    @property
    def name(self) -> str:
        """The name of its file, without the suffix: the recipe, its seed and digest."""
        return f"{self.resolved.run.name}-seed{self.resolved.run.seed}-{self.recipe_sha256[:8]}"

    @property
    def epochs(self) -> float:
        """Passes over the training images."""
        return self.figures.samples / self.epoch_images

    def to_text(self) -> str:
        """Return the file's text: the fields and the SHA-256 of their JSON, by which a later change is detected."""
        return json.dumps(sealed(self.model_dump()), indent=2) + "\n"


def take_record(run: str) -> Record:
    """Read a run into a record.

    Raises:
        UserError: the run is missing, unfinished, damaged or never evaluated, or its files disagree.
    """
    directory = RunDirectory(run)
    kind = KINDS[directory.command]
    recipe = directory.recipe(kind.recipe)
    summary = read_summary(directory)
    figures = kind.summary.of(summary, str(directory.summary_file))
    if figures.train_images is None:  # records of the first runs lack it
        raise RunDirectoryError(f"{directory.summary_file}: has no train_images; train the run again")
    batch = recipe.train.global_batch
    events = read_events(directory, kind.evaluation)
    check_agreement(directory, recipe, summary, figures, events)
    last = events.evaluations[-1]
    text = portable_recipe(recipe)
    return Record(
        summary=summary,
        recipe=text,
        recipe_sha256=text_digest(text),
        epoch_images=figures.train_images // batch * batch,
        eval_images=last.images,
        eval_weights=last.weights,
        evaluations=[one.portable() for one in read_evaluations(directory.path) if one.top1 is not None],
        averages=Averages.of(vars(last), "the last evaluation") if kind is DETECTOR else None,
    )


def read_records(folder: Path) -> list[Record]:
    """Return all records of a folder, by name.

    Raises:
        UserError: a record is damaged, was changed since it was written, or has the wrong name.
    """
    return [_read_record(path) for path in sorted(folder.glob("*.json"))]


def _read_record(path: Path) -> Record:
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        record = Record.model_validate({key: value for key, value in content.items() if key != "sha256"})
        name, _ = record.name, record.figures
    except (ValueError, AttributeError, ValidationError, UserError, yaml.YAMLError) as error:
        reason = first_mistake(error) if isinstance(error, ValidationError) else str(error).splitlines()[0]
        raise UserError(f"{path}: not a record of the ledger: {reason}; put it back or remove it") from None
    if content != sealed(content) or record.recipe_sha256 != text_digest(record.recipe) or name != path.stem:
        raise UserError(f"{path}: was changed since it was written; put it back or remove it")
    return record
