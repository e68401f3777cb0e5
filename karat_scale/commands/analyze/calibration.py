"""Calibration: whether the model is right as often as its probabilities say."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from karat_scale.commands.analyze.figures import INK, new_figure
from karat_scale.commands.analyze.own_predictions import predictions_of
from karat_scale.commands.analyze.result import Result, Settings, Table
from karat_scale.commands.analyze.trained_run import TrainedRun
from karat_scale.commands.evaluate.predictions import Predictions

BINS = 15
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Reliability:
    """The images in bins of equal width by the probability of their most probable class.

    counts, confidence and accuracy: [bins]; the means of a bin without images are nan.
    """

    edges: Floats
    counts: Floats
    confidence: Floats
    accuracy: Floats

    @property
    def error(self) -> float:
        """The expected calibration error, from 0 to 1 (Guo et al., 2017): the mean gap, weighted by images."""
        gaps = np.nan_to_num(np.abs(self.accuracy - self.confidence))
        return float((gaps * self.counts).sum() / self.counts.sum())

    @property
    def largest_gap(self) -> float:
        """The largest gap of a bin."""
        return float(np.nanmax(np.abs(self.accuracy - self.confidence)))


def reliability(predictions: Predictions, bins: int = BINS) -> Reliability:
    """Sort the images into bins."""
    edges = np.linspace(0, 1, bins + 1)
    confidence = predictions.confidence.astype(np.float64)
    places = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    counts, sums, hits = (
        np.bincount(places, weights=weights, minlength=bins).astype(np.float64)
        for weights in (np.ones(len(places)), confidence, predictions.correct.astype(np.float64))
    )
    with np.errstate(invalid="ignore"):
        return Reliability(edges, counts, sums / counts, hits / counts)


def analyze_calibration(run: TrainedRun, settings: Settings) -> Result:
    """Compute the expected calibration error and draw the reliability diagram.

    Raises:
        UserError: the run has no checkpoint, or its data cannot be read.
    """
    result = Result()
    predictions = predictions_of(run, settings, result)
    found = reliability(predictions)
    confidence, accuracy = float(predictions.confidence.mean()), float(predictions.correct.mean())
    result.numbers = {
        "expected_calibration_error": found.error,
        "largest_gap": found.largest_gap,
        "mean_confidence": confidence,
        "accuracy": accuracy,
        "loss": predictions.scores["loss"],
        "bins": BINS,
    }
    result.arrays = {"edges": found.edges, "counts": found.counts}
    result.arrays |= {"confidence": found.confidence, "accuracy": found.accuracy}
    result.figures["reliability"] = (
        _draw(found),
        "Top: how often the model is right, by the probability that it gives; on the dashed line it is calibrated, and "
        "below it too sure. Bottom: the share of images with such a probability.",
    )
    rows: list[list[object]] = [
        ["expected calibration error, %", 100 * found.error],
        [f"largest gap of {BINS} bins, %", 100 * found.largest_gap],
        ["mean probability of the prediction, %", 100 * confidence],
        ["accuracy, %", 100 * accuracy],
        ["mean loss (negative log-likelihood)", predictions.scores["loss"]],
    ]
    result.tables.append(Table("Calibration", ["figure", "value"], rows))
    return result


def _draw(found: Reliability) -> Figure:
    figure = new_figure(4.6, 4.6)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    width = found.edges[1] - found.edges[0]
    upper.bar(found.edges[:-1], np.nan_to_num(found.accuracy), width, align="edge", color="C0", alpha=0.75)
    upper.plot(found.confidence, found.accuracy, "o", color="C1", markersize=4)
    upper.plot([0, 1], [0, 1], "--", color=INK, linewidth=0.9)
    upper.set(ylabel="share of correct predictions", ylim=(0, 1.03), title=f"ECE {100 * found.error:.2f} %")
    lower.bar(found.edges[:-1], found.counts / found.counts.sum(), width, align="edge", color="C0", alpha=0.75)
    lower.set(xlabel="probability of the prediction", ylabel="share of images", xlim=(0, 1), ylim=(0, None))
    return figure
