"""The most confident mistakes and the least certain hits, as pictures, with the attention of the last block on them."""

import io
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from karat_scale.commands.analyze.last_block import LastBlock, NoMapError
from karat_scale.commands.analyze.own_predictions import predictions_of
from karat_scale.commands.analyze.result import Result, Settings, Tile
from karat_scale.commands.analyze.trained_run import TrainedRun
from karat_scale.commands.evaluate.predictions import Predictions
from karat_scale.foundation.errors import DataError

SHOWN = 12
STRENGTH = 0.55
"""Of the attention over the picture."""


def analyze_mistakes(run: TrainedRun, settings: Settings) -> Result:
    """Show pictures of the images of `mistakes` and `close_calls`.

    Raises:
        UserError: the run has no checkpoint, or its data cannot be read.
    """
    result = Result()
    predictions = predictions_of(run, settings, result)
    chosen = {
        "The most confident mistakes": most_confident_mistakes(predictions),
        "Hits with the lowest probability": least_certain_hits(predictions),
    }
    places = np.concatenate(list(chosen.values()))
    pictures: dict[int, bytes] = {}
    for sample_id, png in _pictures(run, settings, result, predictions.ids[places].tolist()):
        pictures[sample_id] = png
    for title, own in chosen.items():
        shown = [place for place in own.tolist() if int(predictions.ids[place]) in pictures]
        if shown:
            result.galleries[title] = [_tile(predictions, place, pictures) for place in shown]
        else:
            result.notes.append(f"{title.lower()}: none")
    names = dict(zip(("mistakes", "close_calls"), chosen.values(), strict=True))
    result.numbers = {name: [_described(predictions, place) for place in own.tolist()] for name, own in names.items()}
    return result


def most_confident_mistakes(predictions: Predictions, count: int = SHOWN) -> Any:
    """Return the places of the wrong predictions with the highest probability, the highest first."""
    wrong = np.flatnonzero(~predictions.correct)
    return wrong[np.argsort(-predictions.confidence[wrong], kind="stable")[:count]]


def least_certain_hits(predictions: Predictions, count: int = SHOWN) -> Any:
    """Return the places of the correct predictions with the lowest probability, the lowest first."""
    right = np.flatnonzero(predictions.correct)
    return right[np.argsort(predictions.confidence[right], kind="stable")[:count]]


def _described(predictions: Predictions, place: int) -> dict[str, Any]:
    return {
        "image": int(predictions.ids[place]),
        "class": predictions.class_name(int(predictions.labels[place])),
        "predicted": [
            {"class": predictions.class_name(int(label)), "probability": float(probability)}
            for label, probability in zip(
                predictions.top_labels[place, :2], predictions.top_probabilities[place, :2], strict=True
            )
        ],
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
    if not ids:
        return
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
    with maps.watching(model) if maps else nullcontext():
        for batch in raw:
            if maps:
                model(images.normalized(batch, run.device))
            for row, sample_id in enumerate(batch.sample_ids.tolist()):
                size = batch.images.shape[2], batch.images.shape[3]
                yield sample_id, _png(batch.images[row], maps.overlay(row, size)[1] if maps else None)
            done += len(batch.sample_ids)
            settings.progress("pictures", done, len(ids))


def _png(picture: Tensor, weights: Tensor | None) -> bytes:
    pixels = picture.permute(1, 2, 0).numpy()
    sides = [pixels]
    if weights is not None:
        scale = weights / weights.max().clamp(min=1e-12)
        colours = 255 * matplotlib.colormaps["magma"](scale.numpy())[..., :3]
        sides.append(((1 - STRENGTH) * pixels + STRENGTH * colours).round().astype(np.uint8))
    content = io.BytesIO()
    Image.fromarray(np.concatenate(sides, axis=1)).save(content, "png")
    return content.getvalue()
