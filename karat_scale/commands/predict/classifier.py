"""A trained classifier on image files: the model, the files that the user named, and the output of its predictions.

The model comes from a run, or from what `karat export` wrote. Files are read, decoded and cropped as in an evaluation.
Predictions are written as a table, JSON lines and CSV. An overlay shows where the classifier looked: the attention of
the last block, laid over what the model saw.
"""

import csv
import glob
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torchvision.datasets.folder import IMG_EXTENSIONS

from karat_scale.commands.analyze.maps import LastBlock
from karat_scale.commands.analyze.trained_run import open_run
from karat_scale.commands.figures import new_figure, rendered, show_map
from karat_scale.data.batch import Batch
from karat_scale.data.decoders import Decoder, make_decoder
from karat_scale.data.decoders.decode import UndecodableImageError
from karat_scale.data.decoders.orientation import upright
from karat_scale.data.loading.assemble import EvalAssembler, ImageSpec
from karat_scale.data.loading.loader import OrderedLoader
from karat_scale.data.plan import BatchSlice
from karat_scale.foundation.console import plural, print_table, printable, terminal
from karat_scale.foundation.errors import RecipeError, RunDirectoryError, UserError
from karat_scale.foundation.files import read_image, write_atomically
from karat_scale.foundation.machine import usable_cores
from karat_scale.recipe import Recipe
from karat_scale.recipe.loading import validate_recipe
from karat_scale.training.initial_weights import locate
from karat_scale.training.weights_file import read_exported, read_facts


@dataclass(frozen=True)
class Classifier:
    """A model, the recipe that it was trained with, its class names, and which weights these are."""

    model: nn.Module
    recipe: Recipe
    classes: tuple[str, ...]
    checkpoint: str
    weights: str

    @property
    def device(self) -> torch.device:
        """A GPU if the recipe allows it and there is one."""
        use_cuda = self.recipe.run.device != "cpu" and torch.cuda.is_available()
        return torch.device("cuda" if use_cuda else "cpu")

    def class_name(self, label: int) -> str:
        """Return the name of a label; its number where the run recorded no names."""
        return self.classes[label] if label < len(self.classes) else str(label)


def open_classifier(source: str, checkpoint: str, weights: str) -> Classifier:
    """Open a run's directory, a folder of `karat export` or its safetensors file.

    Args:
        checkpoint: of a run: best, latest, or a name.
        weights: raw, ema, or auto, which is the choice of `karat eval`. An exported folder holds one kind.

    Raises:
        UserError: there is nothing like that, it is damaged, or it has no such weights.
    """
    try:
        path, inside = locate(source)
    except UserError:
        raise RunDirectoryError(f"{source}: neither a run's directory nor a folder of karat export; name one") from None
    if inside:
        return _of_run(path, checkpoint if checkpoint != "best" else inside, weights)
    return _of_export(path, checkpoint, weights)


def _of_run(path: Path, checkpoint: str, weights: str) -> Classifier:
    run = open_run(path, weights=weights, checkpoint=checkpoint)
    return Classifier(run.model(), run.recipe, run.directory.classes(), run.chosen, run.weights_kind)


def _of_export(path: Path, checkpoint: str, weights: str) -> Classifier:
    facts = read_facts(path)
    if facts.checkpoint is None or facts.weights is None or facts.recipe is None:
        raise RunDirectoryError(f"{path}: not a whole file of karat export; export the run again")
    held = {"checkpoint": facts.checkpoint, "weights": facts.weights}
    recipe = validate_recipe(facts.recipe, str(path))
    if recipe.attention.transfer_from:
        raise RunDirectoryError(f"{path}: its attention needs its teacher, which the run keeps; name the run instead")
    wanted = {"checkpoint": (checkpoint, "best"), "weights": (weights, "auto")}
    for option, (asked, default) in wanted.items():
        if asked not in (default, held[option]):
            raise RunDirectoryError(
                f"--{option} {asked}: {path} holds {held[option]} only; leave out --{option}, or name the run"
            )
    return Classifier(read_exported(path), recipe, facts.classes, **held)


@dataclass
class Found:
    """Image files in the order of the arguments, each once; what could not be listed, with the reason."""

    files: list[str] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    others: int = 0
    """Files in folders whose names have no image suffix."""


def find_images(arguments: Sequence[str]) -> Found:
    """Return the files that paths and globs name. Folders are searched with all folders below them."""
    found = Found()
    seen: set[Path] = set()
    for argument in arguments:
        path = str(Path(argument).expanduser())
        matches = [path] if os.path.lexists(path) else sorted(glob.glob(path, recursive=True))  # noqa: PTH207
        if not matches:
            found.bad.append((argument, "no such file, and nothing matches it"))
        for match in map(Path, matches):
            for file in _in_folder(match, found) if match.is_dir() else [match]:
                if (whole := file.absolute()) not in seen:
                    seen.add(whole)
                    found.files.append(str(file))
    return found


def _in_folder(folder: Path, found: Found) -> Iterator[Path]:
    """Yield the images below a folder, by name. Hidden files are left out, as in training."""
    problems = len(found.bad)
    visited, images = set(), 0
    for directory, below, files in os.walk(folder, onerror=partial(_note, found), followlinks=True):
        if (real := os.path.realpath(directory)) in visited:  # a link that leads back
            below.clear()
            continue
        visited.add(real)
        below[:] = sorted(name for name in below if name[0] != ".")
        for name in sorted(name for name in files if name[0] != "."):
            if name.lower().endswith(IMG_EXTENSIONS):
                images += 1
                yield Path(directory, name)
            else:
                found.others += 1
    if not images and len(found.bad) == problems:
        found.bad.append((str(folder), "a folder without images"))


def _note(found: Found, error: OSError) -> None:
    found.bad.append((str(error.filename), f"cannot be read: {error.strerror}"))


class FileSource:
    """Files as samples. A file that cannot be read counts as an image that cannot be decoded. See ImageSource."""

    def __init__(self, files: Sequence[str]) -> None:
        self._files = np.array([os.fsencode(file) for file in files])  # as FolderSplit keeps its paths
        self.labels: npt.NDArray[np.int32] = np.zeros(len(files), dtype=np.int32)
        self.classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self._files)

    def read(self, sample_id: int) -> bytes:
        """Return the bytes of a regular file, turned upright. Raises UndecodableImageError for anything else."""
        path = Path(self.file_of(sample_id))
        try:
            return upright(read_image(path))
        except OSError as error:
            raise UndecodableImageError(error.strerror or str(error)) from error

    def locate(self, sample_id: int) -> tuple[str, str]:
        """Return the file's name and its folder."""
        folder, name = os.path.split(self.file_of(sample_id))
        return name, folder

    def file_of(self, sample_id: int) -> str:
        """Return the file's path."""
        return os.fsdecode(bytes(self._files[sample_id]))

    def close(self) -> None:
        """Do nothing: no file is open."""


def evaluation_batches(files: Sequence[str], recipe: Recipe, batch_size: int) -> OrderedLoader:
    """Return batches of the files in order, decoded, resized and cropped as `karat eval` does."""
    spec = ImageSpec.of(recipe.changed(data__on_bad_sample="skip"))
    make = EvalAssembler(FileSource(files), spec, _decoder(recipe))
    ids = np.arange(len(files), dtype=np.int64)
    slices = [
        BatchSlice(0, number, ids[start : start + batch_size])
        for number, start in enumerate(range(0, len(files), batch_size))
    ]
    workers = min(recipe.data.workers, usable_cores()) if len(slices) > 1 else 0
    return OrderedLoader(make, slices, workers, recipe.data.prefetch, recipe.data.timeout)


def bad_of(batch: Batch) -> dict[int, str]:
    """Return the reasons of a batch's unreadable files by their number."""
    return {sample.sample_id: sample.reason for sample in batch.bad}


def _decoder(recipe: Recipe) -> Decoder:
    """Return the recipe's decoder; where it cannot run here, another one."""
    try:
        return make_decoder(recipe.data, recipe.augment.interpolation)
    except RecipeError as error:
        decoder = make_decoder(recipe.changed(data__decoder="auto").data, recipe.augment.interpolation)
        print(f"note: {error}; {decoder.name} decodes these images", file=sys.stderr)
        return decoder


def left_out(found: Found) -> str:
    """Return a line about files in folders that are no images by their names; "" if there are none."""
    if not found.others:
        return ""
    return f"{plural(found.others, 'file')} in folders left out: no suffix of {', '.join(IMG_EXTENSIONS)}"


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
