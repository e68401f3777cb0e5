"""The predictions for each image of a set, kept as one npz file: all that scores and reports need of them."""

import io
import json
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from karat_scale.foundation.errors import DataError
from karat_scale.foundation.files import open_regular, replace_file

KEPT = 10
"""The most probable classes of an image that are kept."""
_ARRAYS = ("ids", "labels", "top_labels", "top_probabilities", "losses")
Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Predictions:
    """The predictions for the n images of a set that could be read, in the order of their ids.

    ids, labels: [n]. top_labels, top_probabilities: [n, k], the most probable classes, the first one first. losses:
    [n], minus the logarithm of the label's probability. bad: the images that could not be read. classes: names in the
    order of the labels. identity: of the weights, the preprocessing and the data; equal texts mean equal predictions.
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
            raise DataError(f"none of the {self.bad} images can be read")

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
    """Read what was kept with this identity. None if it is missing, damaged or of another identity."""
    try:
        with os.fdopen(open_regular(path), "rb") as file, np.load(file, allow_pickle=False) as content:
            facts = json.loads(str(content["facts"]))
            if facts["identity"] != identity:
                return None
            arrays = {name: content[name] for name in _ARRAYS}
        return Predictions(**arrays, bad=facts["bad"], classes=tuple(facts["classes"]), identity=identity)
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, DataError):
        return None
