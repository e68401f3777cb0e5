"""`karat demo RUN`: a page that classifies a picture dropped into it, and shows where the model looks."""

import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from karat_scale.commands.analyze.last_block import LastBlock, NoMapError
from karat_scale.commands.predict.classifier import Classifier, open_classifier
from karat_scale.commands.predict.command import Request, predict_files
from karat_scale.foundation.errors import UserError
from karat_scale.foundation.tables import EXTRAS, how_to_install, is_installed

_EXTRA = "demo"
_SHOWN = 5


def serve(source: str, checkpoint: str, weights: str, port: int) -> int:
    """Serve the page on the loopback interface until Ctrl-C; returns the exit code.

    Args:
        source: a run's directory or what `karat export` wrote.
        port: 0 for any free one.

    Raises:
        UserError: gradio is not installed, there is no such model, or the port is taken.
    """
    if not is_installed(EXTRAS[_EXTRA].module):
        raise UserError(f"karat demo needs gradio; {how_to_install(_EXTRA)}")
    classifier = open_classifier(source, checkpoint, weights)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C, so that no upload stays
    with _uploads():
        page = build_page(classifier, f"{source}, {classifier.checkpoint} ({classifier.weights} weights)")
        url = open_page(page, port)
        print(f"{url} classifies pictures with {source}; Ctrl-C ends it", flush=True)
        page.block_thread()
    return 0


def open_page(page: Any, port: int) -> str:
    """Serve a page to this machine's browsers; returns its address. Raises UserError if the port is taken."""
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    # A page of another site, whose name was let point to this machine, comes with that name.
    only_here = Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
    try:
        _, url, _ = page.launch(
            server_name="127.0.0.1",
            server_port=port or None,
            theme=_theme(),
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

    shows_attention = _has_map(classifier)

    def classify(path: str | None) -> tuple[dict[str, float], Any]:
        if path is None:
            return {}, None
        with tempfile.TemporaryDirectory() as folder:
            request = Request(top=_SHOWN, attention=folder if shows_attention else None)
            (prediction,) = predict_files(classifier, [path], request)
            if prediction.error:
                raise gradio.Error(f"{Path(path).name}: {prediction.error}", print_exception=False)
            overlay = _kept(prediction.overlay)
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


def _theme() -> Any:
    """Return gradio's theme with the fonts of this machine; its own come from another server."""
    import gradio

    return gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])


def _has_map(classifier: Classifier) -> bool:
    try:
        LastBlock.of(classifier.model, classifier.recipe.model)
    except NoMapError:
        return False
    return True


def _kept(overlay: str) -> Any:
    """Return the pixels of an overlay, whose file is about to be removed."""
    if not overlay:
        return None
    from PIL import Image

    with Image.open(overlay) as image:
        return image.convert("RGB").copy()
