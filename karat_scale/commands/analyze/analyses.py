"""The analyses by name, in the order of the report, and their options. Imports nothing heavy: the parser reads both."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from karat_scale.foundation.tables import load

_MATRICES = "A is the matrix of scores of queries and keys. S is what the operator, or softmax, makes of it."


class Analysis(NamedTuple):
    """An analysis of each run or, `of_all`, of all runs together.

    place: of a function below `commands/analyze`. It takes (run, settings) or, `of_all`, the runs by their labels, and
    returns a `Result`.
    """

    title: str
    place: str
    introduction: str = ""
    of_all: bool = False

    def __call__(self, *arguments: object) -> Any:
        """Make the analysis."""
        return load(f"karat_scale.commands.analyze.{self.place}")(*arguments)


ANALYSES = {
    "training": Analysis("Training", "history:analyze_training", of_all=True),
    "accuracy": Analysis("Accuracy", "predictions:analyze_accuracy", "Every validation image counts once."),
    "calibration": Analysis(
        "Calibration",
        "predictions:analyze_calibration",
        "A calibrated model that says 80 % is right in 80 of 100 cases.",
    ),
    "mistakes": Analysis(
        "Mistakes and close calls",
        "predictions:analyze_mistakes",
        "Each picture is shown as the model sees it, and beside it with the last block's attention on it.",
    ),
    "robustness": Analysis("Other test sets", "history:analyze_robustness", of_all=True),
    "conversion": Analysis(
        "Converted attention",
        "history:analyze_conversion",
        "An error is the share of the energy of O that a block's new attention misses, on the original's inputs.",
    ),
    "spectrum": Analysis("Spectral behaviour", "matrices:analyze_spectrum", _MATRICES),
    "content": Analysis("What S depends on", "matrices:analyze_content", _MATRICES),
    "maps": Analysis("Attention maps", "maps:analyze_maps", _MATRICES),
    "functions": Analysis("Learned functions", "functions:analyze_functions"),
    "distributions": Analysis(
        "Weight distributions", "functions:analyze_distributions", "A smaller tail index means a heavier tail."
    ),
    "landscape": Analysis("Loss landscape and optimizer path", "landscape:analyze_landscape"),
    "sharpness": Analysis("Sharpness", "landscape:analyze_sharpness"),
}


@dataclass(frozen=True)
class Options:
    """The size of each analysis. Counts are of validation images."""

    images: int = 64
    """Images for spectrum and functions."""
    image_ids: Sequence[int] | None = None
    """The images of the attention maps; None spreads four over the split."""
    block: int = -1
    """The block of the attention maps; negative counts from the last."""
    batch: int = 8
    """Images per batch, which limits memory."""
    grid: int = 15
    """Points per side of the loss landscape."""
    range: float = 1.0
    """Extent of the landscape: the random grid is +- this, in filter norms; it scales the path's margin."""
    samples: int = 128
    """Images for each loss of the landscape."""
    hessian_samples: int = 32
    """Images of the sharpness."""
    seed: int = 0
