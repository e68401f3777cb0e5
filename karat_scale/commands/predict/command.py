"""`karat predict` and `karat demo RUN`: the most probable classes of images, as text or on a page.

Both use evaluation's own preprocessing and precision. The page classifies a picture dropped into it, and shows where
the model looks.
"""

import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from karat_scale.commands.analyze.maps import LastBlock, NoMapError
from karat_scale.commands.predict.classifier import (
    Classifier,
    Guess,
    Prediction,
    bad_of,
    evaluation_batches,
    find_images,
    left_out,
    open_classifier,
    print_predictions,
    write_csv,
    write_json_lines,
    write_overlay,
)
from karat_scale.data.augmentation.device_augment import Normalize
from karat_scale.data.batch import Batch
from karat_scale.engine.devices import device_name
from karat_scale.engine.engine import forward_for_evaluation
from karat_scale.engine.memory import one_line_out_of_memory
from karat_scale.foundation.console import plural, printable, progress
from karat_scale.foundation.errors import RunDirectoryError, UserError
from karat_scale.foundation.tables import EXTRAS, how_to_install, is_installed


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
    """Predict and print; returns the exit code, 0 if at least one image was predicted, else 2.

    Args:
        model: a run's directory or what `karat export` wrote.
        images: files, folders and globs.
        top: classes of each image.
        attention: a directory for overlays.

    Raises:
        UserError: no such model, no such weights, or memory ran out.
    """
    classifier = open_classifier(model, checkpoint, weights)
    found = find_images(images)
    if notice := left_out(found):
        print(f"note: {notice}", file=sys.stderr)
    predictions = list(predict_files(classifier, found.files, top, batch, attention)) if found.files else []
    predictions += [Prediction(name, error=reason) for name, reason in found.bad]
    bad = [one for one in predictions if one.error]
    good = len(predictions) - len(bad)
    if good:
        which = f"{model} {classifier.checkpoint} ({classifier.weights} weights)"
        print_predictions(printable(f"{which} on {device_name(classifier.device)}"), predictions)
    write_json_lines(json_file, predictions)
    write_csv(csv_file, predictions)
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
            reasons |= bad_of(batch)
            for row, (number, guesses) in enumerate(
                zip(batch.sample_ids.tolist(), _guesses(classifier, logits, top), strict=True)
            ):
                if number in reasons:
                    yield Prediction(files[number], error=reasons[number])
                    continue
                overlay = ""
                if maps:
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


def _shortened(stem: str) -> str:
    """Return at most 150 bytes of a name, of which a file system takes 255 with number, suffix and temporary name."""
    return os.fsencode(stem)[:150].decode(errors="ignore")


_EXTRA = "demo"
_SHOWN = 5


def serve(model: str, checkpoint: str, weights: str, port: int) -> int:
    """Serve the page on the loopback interface until Ctrl-C; returns the exit code.

    Args:
        model: a run's directory or what `karat export` wrote.
        port: 0 for any free one.

    Raises:
        UserError: gradio is not installed, there is no such model, or the port is taken.
    """
    if not is_installed(EXTRAS[_EXTRA].module):
        raise UserError(f"karat demo needs gradio; {how_to_install(_EXTRA)}")
    classifier = open_classifier(model, checkpoint, weights)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C, so that no upload stays
    with _uploads():
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

    # A page of another site, whose name was let point to this machine, comes with that name.
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
        raise UserError(f"--port {port}: {error}; choose another") from error
    return str(url)


@contextmanager
def _uploads() -> Iterator[None]:
    """Let gradio keep uploads in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="karat-demo-", dir=os.environ.get("GRADIO_TEMP_DIR")) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        yield


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
        return {guess.name: guess.probability for guess in prediction.guesses}, overlay

    with gradio.Blocks(title=f"karat demo: {title}", analytics_enabled=False) as page:
        gradio.Markdown(f"### {title}")
        with gradio.Row():
            picture: Any = gradio.Image(type="filepath", label="picture", elem_id="picture")
            # Its own would let Pillow open any format, also those that start another program.
            picture.preprocess = lambda upload: None if upload is None else upload.path
            answers = gradio.Label(num_top_classes=_SHOWN, label="classes", elem_id="classes")
        overlay = gradio.Image(label="where the last block looks", elem_id="overlay", visible=shows_attention)
        picture.change(classify, picture, [answers, overlay], api_name="classify")
    return page
