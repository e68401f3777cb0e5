"""The two kinds of runs in the ledger: of `karat train` and of `karat detect`."""

from typing import NamedTuple

from karat_scale.recipe import Recipe, RunRecipe
from karat_scale.training.tasks.detection.recipe import DetectionRecipe
from paper.figures import ClassifierEval, ClassifierSummary, DetectorEval, DetectorSummary


class Kind(NamedTuple):
    """How the files of a kind of run are read.

    Args:
        command: the command that trains it, without `karat`.
        score: the first score of its last part, see `Record.result`.
    """

    command: str
    recipe: type[RunRecipe]
    summary: type[ClassifierSummary] | type[DetectorSummary]
    evaluation: type[ClassifierEval] | type[DetectorEval]
    score: str


CLASSIFIER = Kind("train", Recipe, ClassifierSummary, ClassifierEval, "top-1")
DETECTOR = Kind("detect", DetectionRecipe, DetectorSummary, DetectorEval, "mask AP")
KINDS = {kind.command: kind for kind in (CLASSIFIER, DETECTOR)}
