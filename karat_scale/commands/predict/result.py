"""What was predicted for each image, as a table, JSON lines and CSV, and where the classifier looked.

That is the attention of the last block, laid over what the model saw.
"""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from karat_scale.commands.analyze.figures import new_figure, rendered, show_map
from karat_scale.commands.analyze.last_block import LastBlock
from karat_scale.foundation.console import print_table, printable, terminal
from karat_scale.foundation.files import write_atomically

# On a terminal; elsewhere all are printed.
MOST_SHOWN = 50
COLUMNS = ("image", "rank", "label", "class", "probability", "error")


@dataclass(frozen=True)
class Guess:
    """One class with its probability, from 0 to 1."""

    label: int
    name: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of an image, the first one first; or the reason why it has none."""

    image: str
    guesses: tuple[Guess, ...] = ()
    error: str = ""
    overlay: str = ""


def print_predictions(title: str, predictions: Sequence[Prediction]) -> None:
    """Print a row for each class of each image."""
    good = [prediction for prediction in predictions if prediction.guesses]
    shown = good if terminal() is None else good[:MOST_SHOWN]
    rows = [
        [printable(one.image) if rank == 0 else "", printable(guess.name), f"{100 * guess.probability:.2f} %"]
        for one in shown
        for rank, guess in enumerate(one.guesses)
    ]
    print_table(title, ["image", "class", "probability"], rows, texts=(0, 1))
    if len(shown) < len(good):
        print(f"and {len(good) - len(shown)} more images; --json FILE and --csv FILE hold all")


def write_json_lines(file: str | None, predictions: Sequence[Prediction]) -> None:
    """Write an object on each line for each image, in order; without a file, do nothing."""
    if file:
        write_atomically(Path(file), "".join(json.dumps(_plain(one)) + "\n" for one in predictions))


def _plain(one: Prediction) -> dict[str, object]:
    if one.error:
        return {"image": one.image, "error": one.error}
    guesses = [{"label": g.label, "class": g.name, "probability": g.probability} for g in one.guesses]
    return {"image": one.image, "predictions": guesses, **({"attention": one.overlay} if one.overlay else {})}


def write_csv(file: str | None, predictions: Sequence[Prediction]) -> None:
    """Write a row for each class of each image, and one for an image with an error; without a file, do nothing."""
    if not file:
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for one in predictions:
        for rank, guess in enumerate(one.guesses, 1):
            writer.writerow([one.image, rank, guess.label, guess.name, guess.probability, ""])
        if one.error:
            writer.writerow([one.image, "", "", "", "", one.error])
    write_atomically(Path(file), text.getvalue().encode("utf-8", "surrogateescape"))  # names need not be UTF-8


def write_overlay(path: Path, picture: Tensor, maps: LastBlock, row: int, title: str) -> None:
    """Write a PNG: the image uint8 [3, H, W] as the model saw it, and the dominant head's weights S over it."""
    head, weights = maps.overlay(row, (picture.shape[1], picture.shape[2]))
    figure = new_figure(6, 3.3)
    axes = figure.subplots(1, 2)
    pixels = picture.permute(1, 2, 0).numpy()
    show_map(axes[0], pixels, "image")
    show_map(axes[1], pixels, f"block {maps.block}, head {head}")
    show_map(axes[1], weights.numpy(), f"block {maps.block}, head {head}", alpha=0.55, cmap="magma")
    figure.suptitle(printable(title).replace("$", r"\$"))
    write_atomically(path, rendered(figure, dpi=100))
