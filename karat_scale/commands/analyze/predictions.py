"""A run's predictions of its whole validation split: accuracy, calibration, pictures of mistakes and close calls.

Accuracy is that of all images and of each class, with the classes that are taken for others. Calibration says whether
the model is right as often as its probabilities say. The pictures are the most confident mistakes and the least certain
hits, with the attention of the last block on them. Predictions are computed once, and kept in RUN/predictions.npz.
"""

import io
import math
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from PIL import Image

from karat_scale.commands.analyze.maps import LastBlock, NoMapError
from karat_scale.commands.analyze.result import Result, Settings, Table, Tile, say_cost
from karat_scale.commands.analyze.trained_run import TrainedRun
from karat_scale.commands.evaluate.command import collect, identity_of
from karat_scale.commands.evaluate.predictions import Predictions, read_predictions, write_predictions
from karat_scale.commands.figures import INK, new_axes, new_figure, show_map
from karat_scale.data.backends import ImageSpec, open_backend
from karat_scale.engine.distributed import World
from karat_scale.engine.engine import forward_for_evaluation
from karat_scale.foundation.console import plural
from karat_scale.foundation.errors import DataError
from karat_scale.models.attention_matrices import watched

FILE = "predictions.npz"
PREDICT = "predict the validation split"


def predictions_of(run: TrainedRun, settings: Settings, result: Result) -> Predictions:
    """Return the predictions of the analysed weights, as `karat eval` computes them.

    If the run's directory cannot be written, a note in `result` says so, and the next command computes them again.

    Raises:
        UserError: the run has no checkpoint, or its data cannot be read.
    """
    identity = f"{identity_of(run, **run.data_identity)} {run.data_digest}"
    path = run.path / FILE
    known: Predictions | None = run.shared.get(FILE) or read_predictions(path, identity)
    if known is not None:
        run.shared[FILE] = known
        return known
    started = time.perf_counter()

    def told(done: int, total: int, _: object) -> None:
        if done == 1:
            seconds, hint = time.perf_counter() - started, "--only leaves out accuracy, calibration and mistakes"
            say_cost(settings, "predicting the validation split", total, seconds, hint)
        settings.progress(PREDICT, done, total)

    with closing(open_backend(ImageSpec.of(run.recipe, trains=False))) as backend:
        run.refuse_other_classes(backend.classes)
        forward = forward_for_evaluation(run.model(), run.recipe.train, run.device)
        found = collect(forward, backend.eval_batches, backend.num_val, run, World(0, 1, 0, run.device), told)
    run.shared[FILE] = found = replace(found, classes=backend.classes, identity=identity)
    try:
        write_predictions(path, found)
    except OSError as error:
        result.notes.append(f"the predictions are not kept: {path}: {error.strerror}")
    return found


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
    result.numbers = {"images": len(predictions), "unreadable": predictions.bad, **scores}
    columns = {"class": "class", "images": "images", "accuracy": "accuracy, %"}
    columns |= {"precision": "precision, %", "taken_for": "most often taken for"}
    classes = class_figures(predictions, matrix)
    result.add_records("classes", classes, "Accuracy of each class", columns)
    name, images, accuracy, _, taken_for = min(classes, key=lambda row: 100.0 if row[2] is None else row[2])
    if taken_for:
        result.findings.append(
            f"The hardest class is {name}: {accuracy:.1f} % of its {plural(images, 'image')} are right, and it is most "
            f"often taken for {taken_for}."
        )
    result.arrays = {"confusion": matrix}
    caption = "Rows: the images of a class. Columns: the class that the model says, in percent of the row."
    result.figures["confusion"] = _draw_confusion(predictions, matrix), caption
    wrong = matrix - np.diag(np.diag(matrix))
    rows: list[list[Any]] = []
    for place in np.argsort(-wrong, axis=None, kind="stable")[:MOST_PAIRS].tolist():
        true, said = divmod(place, len(matrix))
        if count := int(wrong[true, said]):
            names = predictions.class_name(true), predictions.class_name(said)
            rows.append([*names, count, 100 * count / int(matrix[true].sum())])
    columns_of_pairs = ["class", "taken for", "images", "% of the class"]
    result.tables.append(Table("Classes that are confused most often", columns_of_pairs, rows))
    if predictions.bad:
        result.notes.append(f"{predictions.bad} images of the split cannot be read and are left out")
    return result


def confusion(predictions: Predictions) -> Counts:
    """Return the number of images by label and by predicted class, [classes, classes]."""
    from sklearn.metrics import confusion_matrix  # 1 s of import

    classes = max(len(predictions.classes), int(predictions.predicted.max()) + 1)
    counts: Counts = confusion_matrix(predictions.labels, predictions.predicted, labels=np.arange(classes))
    return counts


def class_figures(predictions: Predictions, matrix: Counts) -> list[list[Any]]:
    """Return each class's name, images, accuracy and precision in percent (None if undefined) and commonest error."""
    right, images, answers = np.diag(matrix), matrix.sum(1), matrix.sum(0)
    wrong = matrix - np.diag(right)
    rows: list[list[Any]] = []
    for label, worst in enumerate(wrong.argmax(1).tolist()):
        taken_for = f"{predictions.class_name(worst)} ({wrong[label, worst]})" if wrong[label, worst] else ""
        shares = [100 * (int(right[label]) / int(of[label])) if of[label] else None for of in (images, answers)]
        rows.append([predictions.class_name(label), int(images[label]), *shares, taken_for])
    return rows


def _draw_confusion(predictions: Predictions, matrix: Counts) -> Figure:
    shares = 100 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    count = len(matrix)
    named = count <= MOST_NAMED
    side = min(2.6 + 0.26 * count, 8.5) if named else 6.5
    figure, axes = new_axes(side + 1, side)
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


BINS = 15
FITS = 0.02
"""The difference between mean probability and accuracy up to which a model counts as calibrated."""
Floats = npt.NDArray[np.float64]


class Reliability(NamedTuple):
    """The images in bins of equal width by the probability of their most probable class.

    counts, confidence and accuracy: [bins]; the means of a bin without images are nan. error: the expected calibration
    error, from 0 to 1 (Guo et al., 2017): the mean gap, weighted by images. largest_gap: the largest gap of a bin.
    """

    edges: Floats
    counts: Floats
    confidence: Floats
    accuracy: Floats
    error: float
    largest_gap: float


def reliability(predictions: Predictions, bins: int = BINS) -> Reliability:
    """Sort the images into bins."""
    edges = np.linspace(0, 1, bins + 1)
    chances = predictions.confidence.astype(np.float64)
    places = np.clip(np.searchsorted(edges, chances, side="left") - 1, 0, bins - 1)
    counts, sums, hits = (
        np.bincount(places, weights=weights, minlength=bins).astype(np.float64)
        for weights in (np.ones(len(places)), chances, predictions.correct.astype(np.float64))
    )
    with np.errstate(invalid="ignore"):
        confidence, accuracy = sums / counts, hits / counts
    gaps = np.abs(accuracy - confidence)
    error = float((np.nan_to_num(gaps) * counts).sum() / counts.sum())
    return Reliability(edges, counts, confidence, accuracy, error, float(np.nanmax(gaps)))


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
    gaps = predictions.confidence - predictions.correct
    gap, error = confidence - accuracy, float(gaps.std()) / math.sqrt(len(gaps))
    judged = "that fits" if abs(gap) < FITS else "too sure" if gap > 0 else "not sure enough"
    if FITS <= abs(gap) < 2 * error:
        judged = f"the difference may be chance, as these are only {plural(len(gaps), 'image')}"
    sure, right = (f"{100 * share:.1f} %" for share in (confidence, accuracy))
    result.findings.append(f"The mean probability of an answer is {sure}, and {right} are right: {judged}.")
    result.arrays = {"edges": found.edges, "counts": found.counts}
    result.arrays |= {"confidence": found.confidence, "accuracy": found.accuracy}
    caption = (
        "Top: how often the model is right, by the probability that it gives; on the dashed line it is calibrated, and "
        "below it too sure. Bottom: the share of images with such a probability."
    )
    result.figures["reliability"] = _draw(found), caption
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


SHOWN = 12
STRENGTH = 0.55
"""The opacity of the attention over the picture."""


def analyze_mistakes(run: TrainedRun, settings: Settings) -> Result:
    """Show pictures of the images of `mistakes` and `close_calls`.

    Raises:
        UserError: the run has no checkpoint, or its data cannot be read.
    """
    result = Result()
    predictions = predictions_of(run, settings, result)
    chosen = {
        "mistakes": ("The most confident mistakes", most_telling(predictions, hits=False).tolist()),
        "close_calls": ("Hits with the lowest probability", most_telling(predictions, hits=True).tolist()),
    }
    ids = [int(predictions.ids[place]) for _, places in chosen.values() for place in places]
    pictures = dict(_pictures(run, settings, result, ids))
    for name, (title, places) in chosen.items():
        shown = [place for place in places if int(predictions.ids[place]) in pictures]
        if shown:
            result.galleries[title] = [_tile(predictions, place, pictures) for place in shown]
        else:
            result.notes.append(f"{title.lower()}: none")
        result.numbers[name] = [_described(predictions, place) for place in places]
    return result


def most_telling(predictions: Predictions, hits: bool, count: int = SHOWN) -> Any:
    """Return the places of the most confident mistakes, or of the least certain hits, the most telling one first."""
    places = np.flatnonzero(predictions.correct == hits)
    confidence = predictions.confidence[places]
    return places[np.argsort(confidence if hits else -confidence, kind="stable")[:count]]


def _described(predictions: Predictions, place: int) -> dict[str, Any]:
    labels, chances = predictions.top_labels[place, :2].tolist(), predictions.top_probabilities[place, :2].tolist()
    names = map(predictions.class_name, labels)
    return {
        "image": int(predictions.ids[place]),
        "class": predictions.class_name(int(predictions.labels[place])),
        "predicted": [{"class": name, "probability": p} for name, p in zip(names, chances, strict=True)],
    }


def _tile(predictions: Predictions, place: int, pictures: dict[int, bytes]) -> Tile:
    one = _described(predictions, place)
    first, *second = one["predicted"]
    lines = [f"{first['class']} {first['probability']:.0%}"]
    if first["class"] != one["class"]:
        lines.append(f"is {one['class']} ({np.exp(-float(predictions.losses[place])):.1%})")
    else:
        lines += [f"or {other['class']} {other['probability']:.0%}" for other in second]
    lines.append(f"image {one['image']}")
    return Tile(f"image_{one['image']}", lines, pictures[one["image"]])


@torch.no_grad()
def _pictures(run: TrainedRun, settings: Settings, result: Result, ids: list[int]) -> Iterator[tuple[int, bytes]]:
    """Yield the id and the picture of each image: as the model sees it, and the same with the attention on it."""
    model = run.model()
    maps: LastBlock | None = None
    try:
        maps = LastBlock.of(model, run.recipe.model)
    except NoMapError as reason:
        result.notes.append(f"no attention on the pictures: {reason}")
    try:
        images = run.images(len(ids), tuple(ids))
        raw = list(images.raw(settings.batch))
    except DataError as error:
        result.notes.append(f"no pictures: {error}")
        return
    done = 0
    with watched(model, maps.visit) if maps else nullcontext():
        for batch in raw:
            if maps:
                model(images.normalized(batch, run.device))
            for row, sample_id in enumerate(batch.sample_ids.tolist()):
                pixels = batch.images[row].permute(1, 2, 0).numpy()
                sides = [pixels]
                if maps:
                    weights = maps.overlay(row, (pixels.shape[0], pixels.shape[1]))[1]
                    scale = weights / weights.max().clamp(min=1e-12)
                    colours = 255 * matplotlib.colormaps["magma"](scale.numpy())[..., :3]
                    sides.append(((1 - STRENGTH) * pixels + STRENGTH * colours).round().astype(np.uint8))
                content = io.BytesIO()
                Image.fromarray(np.concatenate(sides, axis=1)).save(content, "png")
                yield sample_id, content.getvalue()
            done += len(batch.sample_ids)
            settings.progress("pictures", done, len(ids))
