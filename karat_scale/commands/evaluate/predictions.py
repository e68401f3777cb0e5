"""The files that evaluations write: the predictions for each image of a set, and the results on other test sets.

Predictions are one npz file, with all that scores and reports need of them. Results are in the run's directory, as
evaluations/NAME.json. `karat status` reads these, too, so this module imports nothing heavy.
"""

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError

from karat_scale.foundation.errors import DataError, RunDirectoryError, not_written
from karat_scale.foundation.files import locked, make_folder, open_to_read, parse_json, read_text, replace_file
from karat_scale.foundation.tables import CORRUPTIONS
from karat_scale.recipe.base import first_mistake

KEPT = 10
"""The number of an image's most probable classes that are kept."""
_ARRAYS = ("ids", "labels", "top_labels", "top_probabilities", "losses")
Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Predictions:
    """The predictions for the n images of a set that could be read, in the order of their ids.

    ids, labels: [n]. top_labels, top_probabilities: [n, k], the most probable classes, the most probable first. losses:
    [n], minus the logarithm of the label's probability. bad: the number of images that could not be read. classes:
    names in the order of the labels. identity: a digest of the weights, the preprocessing and the data; equal texts
    mean equal predictions.
    """

    ids: Integers
    labels: Integers
    top_labels: Integers
    top_probabilities: Floats
    losses: Floats
    bad: int
    classes: tuple[str, ...]
    identity: str = ""

    def __post_init__(self) -> None:
        if not len(self.ids):
            raise DataError(f"none of the {self.bad} images can be read; set data.on_bad_sample=stop to see why")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def predicted(self) -> Integers:
        """The most probable class of each image."""
        return self.top_labels[:, 0]

    @property
    def confidence(self) -> Floats:
        """The probability of the most probable class of each image."""
        return self.top_probabilities[:, 0]

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        """Whether the most probable class is the label."""
        return np.equal(self.predicted, self.labels)

    @property
    def scores(self) -> dict[str, float]:
        """Top-1 and top-5 in percent, and the mean loss."""
        in_five = (self.top_labels[:, :5] == self.labels[:, None]).any(1)
        return {
            "top1": 100 * float(self.correct.mean()),
            "top5": 100 * float(in_five.mean()),
            "loss": float(self.losses.mean(dtype=np.float64)),
        }

    def class_name(self, label: int) -> str:
        """Return the name of a label; its number where there are no names."""
        return self.classes[label] if label < len(self.classes) else str(label)


def write_predictions(path: Path, predictions: Predictions) -> None:
    """Write a file that `read_predictions` reads, atomically. Raises OSError."""
    facts = {"bad": predictions.bad, "classes": predictions.classes, "identity": predictions.identity}
    content = io.BytesIO()
    np.savez_compressed(content, facts=json.dumps(facts), **{name: getattr(predictions, name) for name in _ARRAYS})
    replace_file(path, content.getvalue())


def read_predictions(path: Path, identity: str) -> Predictions | None:
    """Read predictions whose identity begins with `identity`. None if missing, damaged or of another identity."""
    try:
        with open_to_read(path) as file, np.load(file, allow_pickle=False) as content:
            facts = json.loads(str(content["facts"]))
            if not facts["identity"].startswith(identity):
                return None
            arrays = {name: content[name] for name in _ARRAYS}
        return Predictions(**arrays, bad=facts["bad"], classes=tuple(facts["classes"]), identity=facts["identity"])
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile, DataError):
        return None


FOLDER = "evaluations"
SEVERITIES = (1, 2, 3, 4, 5)


class Evaluation(BaseModel):
    """The scores of one checkpoint on one test set.

    Args:
        name: the name of the evaluation and of its file.
        source: the directory, and the file of other labels if there is one.
        identity: a digest of the weights, the preprocessing and the data; equal texts mean equal scores.
        model: a digest of the weights and the preprocessing alone.
        images: the number of images, each counted once. unreadable: the number that could not be read. unmatched: the
            classes that the run does not have. left_out: the number of their images.
        among: the number of classes between which the model chose, out of `classes`.
        top1: in percent; for corrupted copies the mean over all corruptions and severities, or None while one is
            missing.
        corruptions: top-1 by corruption and severity.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    name: str
    source: str
    checkpoint: str
    weights: str
    identity: str
    model: str
    date: str
    images: int
    unreadable: int = 0
    unmatched: list[str] = []
    left_out: int = 0
    among: int
    classes: int
    top1: float | None = None
    top5: float | None = None
    loss: float | None = None
    corruptions: dict[str, dict[int, float]] = {}

    def portable(self) -> dict[str, Any]:
        """Return plain data without this machine's directories."""
        return self.model_dump(mode="json", exclude={"source", "identity", "model"}, exclude_none=True)

    def with_more(self, corruptions: Mapping[str, Mapping[int, float]]) -> "Evaluation":
        """Return the evaluation with other scores on corrupted copies, besides its own, and their mean."""
        names = [*corruptions, *(name for name in self.corruptions if name not in corruptions)]
        whole = {name: {**corruptions.get(name, {}), **self.corruptions.get(name, {})} for name in names}
        return self.model_copy(update={"corruptions": whole, "top1": mean_over(whole) if is_complete(whole) else None})

    @property
    def text(self) -> str:
        """The result in a line."""
        among = f", among {self.among} of {self.classes:,} classes" if self.among < self.classes else ""
        bad = f", {self.unreadable} unreadable" if self.unreadable else ""
        if self.corruptions:
            done, of = sum(map(len, self.corruptions.values())), len(CORRUPTIONS) * len(SEVERITIES)
            mean = f"top-1 {mean_over(self.corruptions):.2f} %, mean of {done} kinds and severities"
            return f"{mean}{f' of {of}' if done < of else ''} on {self.images:,} images each{among}{bad}"
        scores = f"top-1 {self.top1:.2f} %" if self.top1 is not None else "not complete"
        scores += f" top-5 {self.top5:.2f} %" if self.top5 is not None and self.top5 < 100 else ""
        scores += f" loss {self.loss:.4f}" if self.loss is not None else ""
        return f"{scores} on {self.images:,} images{among}{bad}"


def mean_over(corruptions: Mapping[str, Mapping[int, float]]) -> float:
    """Return the mean over all corruptions and severities that there are."""
    values = [top1 for by_severity in corruptions.values() for top1 in by_severity.values()]
    return sum(values) / len(values)


def is_complete(corruptions: Mapping[str, Mapping[int, float]]) -> bool:
    """Whether each corruption has each severity."""
    return all(severity in corruptions.get(name, {}) for name in CORRUPTIONS for severity in SEVERITIES)


def evaluation_file(run: Path, name: str) -> Path:
    """Return the place of an evaluation."""
    return run / FOLDER / f"{name}.json"


def keep_evaluation(run: Path, evaluation: Evaluation) -> Evaluation:
    """Write an evaluation into the run's directory, atomically, and return it.

    It gets the corruptions that other processes have kept of the same identity. Raises RunDirectoryError if the disk
    refuses it, or the file there is damaged.
    """
    path = evaluation_file(run, evaluation.name)
    try:
        make_folder(path.parent)
        with locked(path.with_name(f".{path.name}.lock")):
            kept = read_evaluation(path)
            if evaluation.corruptions and kept is not None and kept.identity == evaluation.identity:
                evaluation = evaluation.with_more(kept.corruptions)
            replace_file(path, evaluation.model_dump_json(indent=2) + "\n")
    except OSError as error:
        raise not_written(path, error) from error
    return evaluation


def read_evaluation(path: Path) -> Evaluation | None:
    """Read an evaluation; None if there is none.

    Raises:
        RunDirectoryError: the file is damaged.
    """
    try:
        content: Mapping[str, Any] = parse_json(read_text(path))
        return Evaluation.model_validate(content)
    except FileNotFoundError:
        return None
    except ValidationError as error:
        reason = first_mistake(error)
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "it is not JSON"
    raise RunDirectoryError(f"{path}: not an evaluation of karat eval: {reason}; remove it and evaluate again")


def read_evaluations(run: Path) -> list[Evaluation]:
    """Return a run's evaluations by name. Raises RunDirectoryError if a file is damaged."""
    found = (read_evaluation(path) for path in sorted((run / FOLDER).glob("*.json")))
    return [evaluation for evaluation in found if evaluation is not None]
