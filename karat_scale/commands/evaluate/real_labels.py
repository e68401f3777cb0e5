"""Other labels for a test set's images, from a JSON file: ReaL's for ImageNet, or your own by the image's name."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from karat_scale.commands.evaluate.class_names import imagenet_wnids, match_classes
from karat_scale.commands.evaluate.predictions import Predictions
from karat_scale.foundation.console import plural
from karat_scale.foundation.errors import DataError
from karat_scale.foundation.files import LARGEST_TEXT, parse_json, read_bytes

_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})")
Accepted = frozenset[int]


class OtherLabels:
    """For each image a set of labels that count as right. An image without any does not count.

    The file is a JSON list, as ReaL's: the labels of ILSVRC2012_val_00000001 first, numbered as in ImageNet-1K. Or it
    is an object from an image's name, without its suffix, to a class or a list of classes: names, WordNet ids or
    numbers of the run's labels.

    Raises:
        DataError: the file is not like that.
    """

    def __init__(self, file: Path, classes: Sequence[str]) -> None:
        self._file, self._classes = file, classes
        try:
            content = parse_json(read_bytes(file, LARGEST_TEXT))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no JSON"
            raise DataError(f"--labels {file}: {reason}; name a JSON file such as ReaL's real.json") from None
        if not isinstance(content, list | dict) or not content:
            raise DataError(f"--labels {file}: should be a JSON list or object of labels")
        self._by_number = self._of_list(content) if isinstance(content, list) else {}
        self._by_name = self._of_object(content) if isinstance(content, dict) else {}

    def of(self, key: str) -> Accepted | None:
        """Return the labels of an image by its key or path; None if the file does not have the image."""
        name = key.rpartition("/")[2]
        if self._by_number:
            found = _NUMBER.search(name)
            return self._by_number.get(int(found[1])) if found else None
        for candidate in (key, name, name.rpartition(".")[0]):
            if candidate in self._by_name:
                return self._by_name[candidate]
        return None

    def _of_list(self, content: list[Any]) -> dict[int, Accepted]:
        labels = self._as_run_labels([*range(1000)], imagenet_wnids())
        return {number: self._accepted(entry, labels) for number, entry in enumerate(content, start=1)}

    def _of_object(self, content: dict[str, Any]) -> dict[str, Accepted]:
        entries = {key: entry if isinstance(entry, list) else [entry] for key, entry in content.items()}
        names = sorted({one for entry in entries.values() for one in entry if isinstance(one, str)})
        labels = self._as_run_labels(names, names) | {label: label for label in range(len(self._classes))}
        return {key: self._accepted(entry, labels) for key, entry in entries.items()}

    def _as_run_labels(self, keys: Sequence[Any], names: Sequence[str]) -> dict[Any, int]:
        matched = match_classes(names, self._classes)
        return {key: label for key, label in zip(keys, matched, strict=True) if label is not None}

    def _accepted(self, entry: Any, labels: dict[Any, int]) -> Accepted:
        if not isinstance(entry, list) or not all(isinstance(one, int | str) for one in entry):
            raise DataError(f"--labels {self._file}: {str(entry)[:60]!r} should be a list of labels")
        return frozenset(labels[one] for one in entry if one in labels)


def with_other_labels(predictions: Predictions, keys: Sequence[str], labels: OtherLabels) -> tuple[float, int, str]:
    """Return top-1 in percent by other labels, on how many images, and a line about the images that do not count.

    Raises:
        DataError: the file has labels for none of them.
    """
    accepted = [labels.of(key) for key in keys]
    counted = np.array([bool(one) for one in accepted])
    unknown = sum(one is None for one in accepted)
    if not counted.any():
        raise DataError(f"--labels has labels for none of the {plural(len(keys), 'image')}, such as {keys[0]!r}")
    right = [label in one for label, one in zip(predictions.predicted.tolist(), accepted, strict=True) if one]
    without = len(keys) - int(counted.sum()) - unknown
    left_out = [f"{plural(without, 'image')} without a label"] if without else []
    left_out += [f"{plural(unknown, 'image')} that the file does not have"] if unknown else []
    return 100 * sum(right) / len(right), len(right), " and ".join(left_out)
