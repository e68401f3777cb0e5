"""Accuracy on the whole validation split: in total, of each class, and which classes are taken for which."""

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from karat_scale.commands.analyze.figures import new_figure, show_map
from karat_scale.commands.analyze.own_predictions import predictions_of
from karat_scale.commands.analyze.result import Result, Settings, Table
from karat_scale.commands.analyze.trained_run import TrainedRun
from karat_scale.commands.evaluate.predictions import Predictions

MOST_NAMED = 30
"""Classes up to which the confusion matrix names each class and shows its numbers."""
MOST_PAIRS = 20
Counts = npt.NDArray[np.int64]


def analyze_accuracy(run: TrainedRun, settings: Settings) -> Result:
    """Compute scores, the accuracy of each class and the confusion matrix.

    Raises:
        UserError: the run has no checkpoint, or its data cannot be read.
    """
    result = Result()
    predictions = predictions_of(run, settings, result)
    scores = predictions.scores
    matrix = confusion(predictions)
    per_class = class_figures(predictions, matrix)
    result.numbers = {"images": len(predictions), "unreadable": predictions.bad, **scores}
    result.numbers["classes"] = [
        dict(zip(("class", "images", "accuracy", "precision", "taken_for"), row, strict=True)) for row in per_class
    ]
    result.arrays = {"confusion": matrix}
    result.figures["confusion"] = (
        _draw_confusion(predictions, matrix),
        "Rows: the images of a class. Columns: the class that the model says, in percent of the row.",
    )
    columns = ["class", "images", "accuracy, %", "precision, %", "most often taken for"]
    result.tables.append(Table("Accuracy of each class", columns, per_class))
    result.tables.append(_confused_pairs(predictions, matrix))
    if predictions.bad:
        result.notes.append(f"{predictions.bad} images of the split cannot be read and are left out")
    return result


def confusion(predictions: Predictions) -> Counts:
    """Return the number of images by label and by predicted class, [classes, classes]."""
    from sklearn.metrics import confusion_matrix  # 1 s of import

    classes = max(len(predictions.classes), int(predictions.predicted.max()) + 1)
    counts: Counts = confusion_matrix(predictions.labels, predictions.predicted, labels=np.arange(classes))
    return counts


def class_figures(predictions: Predictions, matrix: Counts) -> list[list[object]]:
    """Return name, images, accuracy and precision in percent (None if undefined) and the commonest error by class."""
    from sklearn.metrics import precision_recall_fscore_support

    labels = np.arange(len(matrix))
    precision, recall, _, support = precision_recall_fscore_support(
        predictions.labels, predictions.predicted, labels=labels, zero_division=np.nan
    )
    wrong = matrix - np.diag(np.diag(matrix))
    rows: list[list[object]] = []
    for label in labels.tolist():
        worst = int(wrong[label].argmax())
        taken_for = f"{predictions.class_name(worst)} ({wrong[label, worst]})" if wrong[label, worst] else ""
        accuracy, own = (None if np.isnan(x) else 100 * float(x) for x in (recall[label], precision[label]))
        rows.append([predictions.class_name(label), int(support[label]), accuracy, own, taken_for])
    return rows


def _confused_pairs(predictions: Predictions, matrix: Counts) -> Table:
    wrong = matrix - np.diag(np.diag(matrix))
    order = np.argsort(-wrong, axis=None, kind="stable")[:MOST_PAIRS]
    pairs = [divmod(int(place), len(matrix)) for place in order]
    totals = matrix.sum(1)
    rows: list[list[object]] = []
    for true, said in pairs:
        if count := int(wrong[true, said]):
            share = 100 * count / int(totals[true])
            rows.append([predictions.class_name(true), predictions.class_name(said), count, share])
    return Table("Classes that are confused most often", ["class", "taken for", "images", "% of the class"], rows)


def _draw_confusion(predictions: Predictions, matrix: Counts) -> Figure:
    shares = 100 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    count = len(matrix)
    named = count <= MOST_NAMED
    side = min(2.6 + 0.26 * count, 8.5) if named else 6.5
    figure = new_figure(side + 1, side)
    axes = figure.subplots()
    image = show_map(axes, shares, vmin=0, vmax=100, cmap="viridis")
    figure.colorbar(image, label="% of the row", shrink=0.8)
    axes.set(xlabel="the model says", ylabel="class")
    if named:
        names = [predictions.class_name(label)[:20].replace("$", r"\$") for label in range(count)]
        axes.set_xticks(range(count), names, rotation=60, ha="right", rotation_mode="anchor", fontsize=7.5)
        axes.set_yticks(range(count), names, fontsize=7.5)
        for true, said in np.argwhere(matrix > 0):
            share = shares[true, said]
            dark = "#ffffff" if share < 60 else "#000000"
            axes.text(said, true, f"{share:.0f}", ha="center", va="center", fontsize=6.5, color=dark)
    return figure
