"""`karat predict` and `karat demo RUN`: the most probable classes of images, as text or on a page.

Both use evaluation's own preprocessing and precision. The model comes from a run, or from what `karat export` wrote.
Predictions are written as a table, JSON lines and CSV. An overlay shows where the classifier looked: the attention of
the last block, laid over what the model saw. The page classifies a picture dropped into it.
"""

import csv
import glob
import io
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from karat_scale.commands.analyze.maps import LastBlock, NoMapError
from karat_scale.commands.analyze.trained_run import device_of, open_run
from karat_scale.commands.evaluate.test_set import load_test_set
from karat_scale.commands.figures import new_figure, rendered, show_map
from karat_scale.data.augmentation.device_augment import Normalize
from karat_scale.data.batch import Batch
from karat_scale.data.decoders import make_decoder
from karat_scale.data.decoders.decode import UndecodableImageError
from karat_scale.data.decoders.jpeg_header import upright
from karat_scale.data.loading.assemble import OrderedLoader
from karat_scale.data.plan import BatchSlice
from karat_scale.data.shards.shard_files import ImageSource
from karat_scale.data.shards.shards import IMAGE_SUFFIXES, is_hidden_folder, is_image_name
from karat_scale.engine.distributed import device_name
from karat_scale.engine.engine import forward_for_evaluation
from karat_scale.engine.memory import one_line_out_of_memory
from karat_scale.foundation.console import plural, print_table, printable, progress, terminal
from karat_scale.foundation.errors import RecipeError, RunDirectoryError, UserError
from karat_scale.foundation.files import read_image, walk, write_atomically
from karat_scale.foundation.machine import usable_cores
from karat_scale.foundation.tables import EXTRAS, how_to_install, is_installed
from karat_scale.models.attention_matrices import watched
from karat_scale.recipe import Recipe
from karat_scale.recipe.files import locate, name_one
from karat_scale.recipe.loading import validate_recipe
from karat_scale.training.tasks.classification.task import top_classes
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
        return device_of(self.recipe)

    def class_name(self, label: int) -> str:
        """Return the name of a label; its number where the run recorded no names."""
        return self.classes[label] if label < len(self.classes) else str(label)


def open_classifier(source: str, checkpoint: str, weights: str) -> Classifier:
    """Open a run's directory, a folder of `karat export` or its safetensors file.

    Args:
        checkpoint: the checkpoint of a run: best, latest, or a name.
        weights: raw, ema, or auto, which is the choice of `karat eval`. An exported folder holds one kind.

    Raises:
        UserError: there is no such model, it is damaged, or it has no such weights.
    """
    try:
        path, inside = locate(source)
    except UserError:
        below = sorted(path.parent for path in Path(source).expanduser().glob("*/model.safetensors"))
        fix = f"name one in it, such as {below[0]}" if below else name_one(Path(source).expanduser())
        raise RunDirectoryError(f"{source}: neither a run's directory nor a folder of karat export; {fix}") from None
    if inside:
        run = open_run(path, weights=weights, checkpoint=checkpoint if checkpoint != "best" else inside)
        return Classifier(run.model(), run.recipe, run.directory.classes(), run.chosen, run.weights_kind)
    if path.suffix != ".safetensors":
        raise RunDirectoryError(
            f"{source}: not a .safetensors file; name the run, or what karat export wrote as safetensors, timm or "
            "hub-folder"
        )
    facts = read_facts(path)
    if facts.checkpoint is None or facts.weights is None or facts.recipe is None:
        raise RunDirectoryError(f"{path}: not a whole file of karat export; export the run again")
    recipe = validate_recipe(facts.recipe.model_dump(), str(path))
    if recipe.attention.transfer_from:
        raise RunDirectoryError(f"{path}: its attention needs its teacher, which the run keeps; name the run instead")
    wanted = {"checkpoint": (checkpoint, "best", facts.checkpoint), "weights": (weights, "auto", facts.weights)}
    for option, (asked, default, held) in wanted.items():
        if asked not in (default, held):
            raise RunDirectoryError(
                f"--{option} {asked}: {path} holds {held} only; leave out --{option}, or name the run"
            )
    return Classifier(read_exported(path), recipe, facts.classes, facts.checkpoint, facts.weights)


@dataclass
class Found:
    """Image files in the order of the arguments, each once; and places that could not be listed, with the reason."""

    files: list[str] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    others: int = 0
    """The number of files in folders whose names have no image suffix."""


def find_images(arguments: Sequence[str]) -> Found:
    """Return the files that paths and globs name. Folders are searched with all folders below them."""
    found = Found()
    seen: set[Path] = set()
    for argument in arguments:
        path = os.path.expanduser(argument)  # noqa: PTH111  # Path's refuses a name like ~$x.png
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
    problems, images = len(found.bad), 0
    visited: set[str] = set()

    def note(error: OSError) -> None:
        found.bad.append((str(error.filename), f"cannot be read: {error.strerror}"))

    for directory, below, files in walk(folder, note):
        if (real := os.path.realpath(directory)) in visited:  # a link to a folder that is in here, too
            below.clear()
            continue
        visited.add(real)
        below[:] = sorted(name for name in below if not is_hidden_folder(name))
        for name in sorted(name for name in files if name[0] != "."):
            if is_image_name(name):
                images += 1
                yield Path(directory, name)
            else:
                found.others += 1
    if not images and len(found.bad) == problems:
        found.bad.append((str(folder), "a folder without images"))


class FileSource(ImageSource):
    """Files as samples. A file that cannot be read counts as an image that cannot be decoded. See ImageSource."""

    def __init__(self, files: Sequence[str]) -> None:
        self._files = np.array([os.fsencode(file) for file in files])  # as FolderSplit keeps its paths
        self.labels = np.zeros(len(files), dtype=np.int32)
        self.classes = ()

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


def evaluation_batches(files: Sequence[str], recipe: Recipe, batch_size: int) -> OrderedLoader:
    """Return batches of the files in order, decoded, resized and cropped as `karat eval` does."""
    ids = np.arange(len(files), dtype=np.int64)
    starts = range(0, len(files), batch_size)
    slices = [BatchSlice(0, number, ids[start : start + batch_size]) for number, start in enumerate(starts)]
    workers = min(recipe.data.workers, usable_cores()) if len(slices) > 1 else 0
    recipe = recipe.changed(data__on_bad_sample="skip", data__workers=workers)
    try:
        make_decoder(recipe.data, recipe.augment.interpolation)
    except RecipeError as error:  # the recipe's cannot run here
        recipe = recipe.changed(data__decoder="auto")
        decoder = make_decoder(recipe.data, recipe.augment.interpolation)
        print(f"note: {error}; {decoder.name} decodes these images", file=sys.stderr)
    return load_test_set(FileSource(files), recipe)(slices)


# On a terminal; elsewhere all are printed.
MOST_SHOWN = 50
COLUMNS = ("image", "rank", "label", "class", "probability", "error")


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of an image, the most probable first; or the reason why it has none.

    guesses: each with its `label`, `class` and `probability` from 0 to 1.
    """

    image: str
    guesses: Sequence[Mapping[str, Any]] = ()
    error: str = ""
    overlay: str = ""


def print_predictions(title: str, predictions: Sequence[Prediction]) -> None:
    """Print a row for each class of each image."""
    good = [prediction for prediction in predictions if prediction.guesses]
    shown = good if terminal() is None else good[:MOST_SHOWN]
    rows = [
        ["" if rank else printable(one.image), printable(guess["class"]), f"{100 * guess['probability']:.2f} %"]
        for one in shown
        for rank, guess in enumerate(one.guesses)
    ]
    print_table(title, ["image", "class", "probability"], rows, texts=(0, 1))
    if len(shown) < len(good):
        print(f"and {len(good) - len(shown)} more images; --json FILE and --csv FILE hold all")


def json_lines(predictions: Sequence[Prediction]) -> str:
    """Return an object on each line for each image, in order."""
    lines = []
    for one in predictions:
        found = {"error": one.error} if one.error else {"predictions": one.guesses}
        line = {"image": one.image, **found, **({"attention": one.overlay} if one.overlay else {})}
        lines.append(json.dumps(line) + "\n")
    return "".join(lines)


def csv_lines(predictions: Sequence[Prediction]) -> bytes:
    """Return a row for each class of each image, and one for an image with an error."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for one in predictions:
        writer.writerows([one.image, rank, *guess.values(), ""] for rank, guess in enumerate(one.guesses, 1))
        if one.error:
            writer.writerow([one.image, "", "", "", "", one.error])
    return text.getvalue().encode("utf-8", "surrogateescape")  # names need not be UTF-8


def write_overlay(path: Path, picture: Tensor, maps: LastBlock, row: int, title: str) -> None:
    """Write a PNG: the image uint8 [3, H, W] as the model saw it, and the dominant head's weights S over it."""
    head, weights = maps.overlay(row, (picture.shape[1], picture.shape[2]))
    figure = new_figure(6, 3.3)
    axes = figure.subplots(1, 2)
    pixels = picture.permute(1, 2, 0).numpy()
    show_map(axes[0], pixels, "image")
    show_map(axes[1], pixels, f"block {maps.block}, head {head}")
    show_map(axes[1], weights.numpy(), f"block {maps.block}, head {head}", vmin=0, alpha=0.55, cmap="magma")
    figure.suptitle(printable(title).replace("$", r"\$"))
    write_atomically(path, rendered(figure, dpi=100))


def predict(
    model: str,
    images: Sequence[str],
    top: int,
    batch: int,
    checkpoint: str,
    weights: str,
    json_file: str | None,
    csv_file: str | None,
    attention: str | None,
) -> int:
    """Predict and print; returns the exit code: 0 if all images were predicted, 1 if some were, 2 if none was.

    Args:
        model: a run's directory or what `karat export` wrote.
        images: files, folders and globs.
        top: the number of classes for each image.
        attention: a directory for overlays.

    Raises:
        UserError: no such model, no such weights, or memory ran out.
    """
    classifier = open_classifier(model, checkpoint, weights)
    found = find_images(images)
    if found.others:
        suffixes = ", ".join(IMAGE_SUFFIXES)
        print(f"note: {plural(found.others, 'file')} in folders left out: no suffix of {suffixes}", file=sys.stderr)
    predictions = list(predict_files(classifier, found.files, top, batch, attention)) if found.files else []
    predictions += [Prediction(name, error=reason) for name, reason in found.bad]
    bad = [one for one in predictions if one.error]
    good = len(predictions) - len(bad)
    try:  # before printing, which a closed pipe may stop
        if json_file:
            write_atomically(Path(json_file), json_lines(predictions))
        if csv_file:
            write_atomically(Path(csv_file), csv_lines(predictions))
    finally:  # the predictions are printed even if the disk is full
        if good:
            which = f"{model} {classifier.checkpoint} ({classifier.weights} weights)"
            print_predictions(printable(f"{which} on {device_name(classifier.device)}"), predictions)
        for one in bad:
            print(printable(f"{one.image}: {one.error}"), file=sys.stderr)
        print(f"{plural(good, 'image')} predicted, {len(bad)} failed")
    return int(bool(bad)) if good else 2


def logits_of(
    classifier: Classifier, files: Sequence[str], batch_size: int, maps: LastBlock | None = None
) -> Iterator[tuple[Batch, Tensor]]:
    """Yield batches of the files in order with their float32 logits [b, classes] on the CPU.

    maps: keeps what the last block computes until the next batch.
    """
    recipe, device = classifier.recipe, classifier.device
    forward = forward_for_evaluation(classifier.model, recipe.train, device)
    normalize = Normalize(recipe.augment.mean, recipe.augment.std)
    with (
        closing(evaluation_batches(files, recipe, batch_size)) as batches,
        watched(classifier.model, maps.visit) if maps else nullcontext(),
    ):
        for batch in batches:
            with one_line_out_of_memory(lambda: f"lower --batch (now {batch_size})"):
                logits = forward(normalize(batch.images.to(device))).float().cpu()
            yield batch, logits


def predict_files(
    classifier: Classifier, files: Sequence[str], top: int, batch_size: int = 32, attention: str | None = None
) -> Iterator[Prediction]:
    """Yield the prediction of each file, in order. Raises UserError if memory runs out or no overlay can be written."""
    maps, folder = None, Path(attention or "").expanduser()
    if attention:
        try:
            maps = LastBlock.of(classifier.model, classifier.recipe.model)
            folder.mkdir(parents=True, exist_ok=True)
        except NoMapError as reason:
            print(f"note: no attention overlays: {reason}", file=sys.stderr)
        except OSError as error:
            raise RunDirectoryError(f"--attention {folder}: {error.strerror}; name another directory") from None
    digits = len(str(len(files)))
    with progress("predict", len(files), "images") as advance:
        for batch, logits in logits_of(classifier, files, batch_size, maps):
            finite = logits.isfinite().all(1)
            reasons = dict.fromkeys(batch.sample_ids[~finite].tolist(), "the model's output is not finite")
            reasons |= {sample.sample_id: sample.reason for sample in batch.bad}
            tops = top_classes(logits, top)
            chances = logits.softmax(-1).gather(1, tops)
            for row, number in enumerate(batch.sample_ids.tolist()):
                if number in reasons:
                    yield Prediction(files[number], error=reasons[number])
                    continue
                guesses = [
                    {"label": label, "class": classifier.class_name(label), "probability": chance}
                    for label, chance in zip(tops[row].tolist(), chances[row].tolist(), strict=True)
                ]
                overlay = ""
                if maps:
                    # A file system takes 255 bytes of a name with number, suffix and temporary name.
                    stem = os.fsencode(Path(files[number]).stem)[:150].decode(errors="ignore")
                    path = folder / f"{number + 1:0{digits}}-{stem}.png"
                    title = f"{guesses[0]['class']} {guesses[0]['probability']:.1%}"
                    try:
                        write_overlay(path, batch.images[row], maps, row, title)
                    except OSError as error:
                        raise RunDirectoryError(f"{path} cannot be written: {error.strerror or error}") from None
                    overlay = str(path)
                yield Prediction(files[number], guesses, overlay=overlay)
            advance(len(logits))


_EXTRA = "demo"
_SHOWN = 5


def serve(model: str, checkpoint: str, weights: str, port: int) -> int:
    """Serve the page on the loopback interface until Ctrl-C; returns the exit code.

    Args:
        model: a run's directory or what `karat export` wrote.
        port: the port of the page; 0 for any free one.

    Raises:
        UserError: gradio is not installed, there is no such model, or the port is taken.
    """
    if not is_installed(EXTRAS[_EXTRA].module):
        raise UserError(f"karat demo needs gradio; {how_to_install(_EXTRA)}")
    classifier = open_classifier(model, checkpoint, weights)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C, so that no upload stays
    with tempfile.TemporaryDirectory(prefix="karat-demo-", dir=os.environ.get("GRADIO_TEMP_DIR")) as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads  # where gradio keeps them
        page = build_page(classifier, f"{model}, {classifier.checkpoint} ({classifier.weights} weights)")
        url = open_page(page, port)
        print(f"{url} classifies pictures with {model}; Ctrl-C ends it", flush=True)
        page.block_thread()
    return 0


def open_page(page: Any, port: int) -> str:
    """Serve a page to this machine's browsers; returns its address. Raises UserError if the port is taken."""
    import gradio
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    # A page of another site, whose name was made to point to this machine, asks for that name.
    only_here = Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
    try:
        _, url, _ = page.launch(
            server_name="127.0.0.1",
            server_port=port or None,
            # Its own fonts come from another server.
            theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            app_kwargs={"middleware": [only_here]},
            quiet=True,
            show_error=True,  # such as that a file is no picture
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise UserError(f"--port {port} is in use or not allowed; choose another, or 0 for any free one") from error
    except OverflowError:
        raise UserError(f"--port {port}: the highest is 65535; choose another, or 0 for any free one") from None
    return str(url)


def build_page(classifier: Classifier, title: str) -> Any:
    """Return gradio's page for a classifier. It loads nothing from other machines."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    import gradio

    shows_attention = True
    try:
        LastBlock.of(classifier.model, classifier.recipe.model)
    except NoMapError:
        shows_attention = False

    def classify(path: str | None) -> tuple[dict[str, float], Any]:
        if path is None:
            return {}, None
        with tempfile.TemporaryDirectory() as folder:
            overlays = folder if shows_attention else None
            (prediction,) = predict_files(classifier, [path], _SHOWN, attention=overlays)
            if prediction.error:
                raise gradio.Error(f"{Path(path).name}: {prediction.error}", print_exception=False)
            overlay = None
            if prediction.overlay:
                with Image.open(prediction.overlay) as image:  # whose file is about to be removed
                    overlay = image.convert("RGB").copy()
        # Of classes with the same name, the most probable counts, which comes first.
        return {guess["class"]: guess["probability"] for guess in reversed(prediction.guesses)}, overlay

    with gradio.Blocks(title=f"karat demo: {title}", analytics_enabled=False) as page:
        gradio.Markdown(f"### {title}")
        with gradio.Row():
            picture: Any = gradio.Image(type="filepath", label="picture", elem_id="picture")
            # Gradio's own would let Pillow open any format, also those that start another program.
            picture.preprocess = lambda upload: None if upload is None else upload.path
            answers = gradio.Label(num_top_classes=_SHOWN, label="classes", elem_id="classes")
        overlay = gradio.Image(label="where the last block looks", elem_id="overlay", visible=shows_attention)
        picture.change(classify, picture, [answers, overlay], api_name="classify")
    return page
