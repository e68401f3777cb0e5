"""`karat predict`: the most probable classes of images, with evaluation's own preprocessing and precision."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from karat_scale.commands.analyze.last_block import LastBlock, NoMapError
from karat_scale.commands.predict.classifier import Classifier, open_classifier
from karat_scale.commands.predict.images import bad_of, evaluation_batches, find_images, left_out
from karat_scale.commands.predict.result import (
    Guess,
    Prediction,
    print_predictions,
    write_csv,
    write_json_lines,
    write_overlay,
)
from karat_scale.data.augmentation.normalize import Normalize
from karat_scale.data.batch import Batch
from karat_scale.engine.devices import device_name
from karat_scale.engine.memory import one_line_out_of_memory
from karat_scale.engine.precision import forward_for_evaluation
from karat_scale.foundation.console import plural, printable, progress
from karat_scale.foundation.errors import RunDirectoryError


@dataclass(frozen=True)
class Request:
    """The options of `karat predict`."""

    checkpoint: str = "best"
    weights: str = "auto"
    top: int = 5
    batch: int = 32
    json_file: str | None = None
    csv_file: str | None = None
    attention: str | None = None


def predict(source: str, arguments: Sequence[str], request: Request) -> int:
    """Predict and print; returns the exit code, 0 if at least one image was predicted, else 2.

    Args:
        source: a run's directory or what `karat export` wrote.
        arguments: files, folders and globs.

    Raises:
        UserError: no such model, no such weights, or memory ran out.
    """
    classifier = open_classifier(source, request.checkpoint, request.weights)
    found = find_images(arguments)
    if notice := left_out(found):
        print(f"note: {notice}", file=sys.stderr)
    predictions = list(predict_files(classifier, found.files, request)) if found.files else []
    predictions += [Prediction(name, error=reason) for name, reason in found.bad]
    bad = [one for one in predictions if one.error]
    good = len(predictions) - len(bad)
    if good:
        weights = f"{source} {classifier.checkpoint} ({classifier.weights} weights)"
        print_predictions(printable(f"{weights} on {device_name(classifier.device)}"), predictions)
    write_json_lines(request.json_file, predictions)
    write_csv(request.csv_file, predictions)
    for one in bad:
        print(printable(f"{one.image}: {one.error}"), file=sys.stderr)
    print(f"{plural(good, 'image')} predicted, {len(bad)} failed")
    return 0 if good else 2


def logits_of(
    classifier: Classifier, files: Sequence[str], batch_size: int, maps: LastBlock | None = None
) -> Iterator[tuple[Batch, Tensor]]:
    """Yield batches of the files in order with their float32 logits [b, classes] on the CPU.

    maps: what the last block computes is kept there until the next batch.
    """
    recipe, device = classifier.recipe, classifier.device
    forward = forward_for_evaluation(classifier.model, recipe.train, device)
    normalize = Normalize(recipe.augment.mean, recipe.augment.std)
    batches = evaluation_batches(files, recipe, batch_size)
    try:
        with maps.watching(classifier.model) if maps else nullcontext():
            for batch in batches:
                with one_line_out_of_memory(lambda: f"lower --batch (now {batch_size})"):
                    logits = forward(normalize(batch.images.to(device))).float().cpu()
                yield batch, logits
    finally:
        batches.close()


def predict_files(classifier: Classifier, files: Sequence[str], request: Request) -> Iterator[Prediction]:
    """Yield the prediction of each file, in order. Raises UserError if memory runs out or no overlay can be written."""
    maps = _maps(classifier) if request.attention else None
    folder = _made(Path(request.attention).expanduser()) if maps and request.attention else None
    digits = len(str(len(files)))
    with progress("predict", len(files), "images") as advance:
        for batch, logits in logits_of(classifier, files, request.batch, maps):
            finite = logits.isfinite().all(1)
            reasons = dict.fromkeys(batch.sample_ids[~finite].tolist(), "the model's output is not finite")
            reasons |= bad_of(batch)
            for row, (number, guesses) in enumerate(
                zip(batch.sample_ids.tolist(), _guesses(classifier, logits, request.top), strict=True)
            ):
                if number in reasons:
                    yield Prediction(files[number], error=reasons[number])
                    continue
                overlay = ""
                if maps and folder:
                    path = folder / f"{number + 1:0{digits}}-{_shortened(Path(files[number]).stem)}.png"
                    title = f"{guesses[0].name} {guesses[0].probability:.1%}"
                    try:
                        write_overlay(path, batch.images[row], maps, row, title)
                    except OSError as error:
                        raise RunDirectoryError(f"{path} cannot be written: {error.strerror or error}") from None
                    overlay = str(path)
                yield Prediction(files[number], guesses, overlay=overlay)
            advance(len(logits))


def _guesses(classifier: Classifier, logits: Tensor, top: int) -> Iterator[tuple[Guess, ...]]:
    """Yield the most probable classes of each row."""
    probabilities, labels = logits.softmax(-1).topk(min(top, logits.shape[1]))
    for row, chances in zip(labels.tolist(), probabilities.tolist(), strict=True):
        yield tuple(Guess(label, classifier.class_name(label), p) for label, p in zip(row, chances, strict=True))


def _maps(classifier: Classifier) -> LastBlock | None:
    try:
        return LastBlock.of(classifier.model, classifier.recipe.model)
    except NoMapError as reason:
        print(f"note: no attention overlays: {reason}", file=sys.stderr)
        return None


def _shortened(stem: str) -> str:
    """Return at most 150 bytes of a name, of which a file system takes 255 with number, suffix and temporary name."""
    return os.fsencode(stem)[:150].decode(errors="ignore")


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirectoryError(f"--attention {folder}: {error.strerror}; name another directory") from None
    return folder
