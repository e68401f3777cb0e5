"""The analyses by name, in the order of the report, and their options. Imports nothing heavy: the parser reads both."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from karat_scale.foundation.tables import load


class Analysis(NamedTuple):
    """An analysis of each run or, if `of_all`, of all runs together.

    place: the place of a function below `commands/analyze`. It takes (run, settings) or, if `of_all`, the runs by their
    labels, and returns a `Result`.
    """

    title: str
    place: str
    of_all: bool = False

    def __call__(self, *arguments: object) -> Any:
        """Make the analysis."""
        return load(f"karat_scale.commands.analyze.{self.place}")(*arguments)


ANALYSES = {
    "training": Analysis("Training", "history:analyze_training", of_all=True),
    "accuracy": Analysis("Accuracy", "predictions:analyze_accuracy"),
    "calibration": Analysis("Calibration", "predictions:analyze_calibration"),
    "mistakes": Analysis("Mistakes and close calls", "predictions:analyze_mistakes"),
    "robustness": Analysis("Other test sets", "history:analyze_robustness", of_all=True),
    "conversion": Analysis("Converted attention", "history:analyze_conversion"),
    "spectrum": Analysis("Spectral behaviour", "matrices:analyze_spectrum"),
    "content": Analysis("What S depends on", "matrices:analyze_content"),
    "maps": Analysis("Attention maps", "maps:analyze_maps"),
    "functions": Analysis("Learned functions", "functions:analyze_functions"),
    "distributions": Analysis("Weight distributions", "functions:analyze_distributions"),
    "landscape": Analysis("Loss landscape and optimizer path", "landscape:analyze_landscape"),
    "sharpness": Analysis("Sharpness", "landscape:analyze_sharpness"),
}


@dataclass(frozen=True)
class Options:
    """The size of each analysis. Images are those of the validation split."""

    images: int = 64
    """Images for spectrum, content and functions."""
    image_ids: Sequence[int] | None = None
    """The images of the attention maps; None spreads four over the split."""
    block: int = -1
    """The block of the attention maps; negative counts from the last."""
    batch: int = 8
    """Images per batch, which limits memory."""
    grid: int = 15
    """Points per side of the loss landscape."""
    range: float = 1.0
    """Extent of the landscape: the random grid is +- this, in filter norms; the path's margin is proportional to it."""
    samples: int = 128
    """Images for each loss of the landscape."""
    hessian_samples: int = 32
    """Images for the sharpness."""
    seed: int = 0
