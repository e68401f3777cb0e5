"""What `make_webdataset.py --resize S` saves and changes, for several S: `python -m benchmarks.resizing --tar FILE`.

The bytes of an image; the speed of decoding it with a random resized crop to 224 px and a flip, in processor time,
interleaved, over that of the image as it was; and how the pixels that the model sees differ. The same part of the
picture is cropped from both, once as training crops, at random, and once as evaluation does, in the centre.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from karat_scale.commands.bench.data import Contender
from karat_scale.commands.measure.interleaved import interleaved_seconds, processor_seconds
from karat_scale.commands.measure.loading import AUGMENTS, SIZE, prepare_images
from karat_scale.data.augmentation.augment import EvalTransform, TrainTransform
from karat_scale.data.decoders import Decoder, make_decoder
from karat_scale.data.decoders.decode import View
from karat_scale.data.decoders.jpeg_header import read_frame
from karat_scale.data.plan import sample_seed
from karat_scale.data.prepare.images import choose_encoder, resized_jpeg
from karat_scale.foundation.arguments import OneLineParser, count, new_file
from karat_scale.foundation.console import print_table, write_json
from karat_scale.foundation.errors import run_script
from karat_scale.recipe import DataConfig

AS_IT_WAS = "as it was"
AUGMENT = AUGMENTS["crop"]


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a table, and write the file of `--json`. Raises UserError for what cannot be measured."""
    parser = OneLineParser(prog="python -m benchmarks.resizing", description=__doc__)
    parser.add_argument("--tar", metavar="FILE", help="a tar of JPEGs (default: photo-like images made here)")
    parser.add_argument("--resize", type=count, nargs="+", default=[256, 320, 384], help="short sides in pixels")
    parser.add_argument("--quality", type=count, default=90, help="(default: %(default)s)")
    parser.add_argument("--images", type=count, default=512, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=count, default=7, help="interleaved rounds (default: %(default)s)")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="also write all figures to this file")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="karat-bench-") as scratch:
        images = prepare_images(Path(scratch), options.images, None, options.tar)
    sets = {AS_IT_WAS: images.encoded}
    for side in options.resize:
        sets[str(side)] = _shrunk(images.encoded, side, options.quality)
    decoder = make_decoder(DataConfig(backend="synthetic"), AUGMENT.interpolation)
    passes = {name: _pass(encoded, decoder) for name, encoded in sets.items()}
    seconds = interleaved_seconds(passes, options.rounds, processor_seconds)
    rows = [
        {
            "short_side": name,
            "mean_kb": round(statistics.mean(map(len, encoded)) / 1e3, 1),
            "speed": round(1 / seconds.ratio(name, AS_IT_WAS), 2),
            "images_per_core_second": round(len(encoded) / seconds.median(name), 1),
            **_differences(images.encoded, encoded, decoder),
        }
        for name, encoded in sets.items()
    ]
    result = {"source": images.source, "images": len(images.encoded), "quality": options.quality, "rows": rows}
    _print(result)
    write_json(options.json, result)


def _shrunk(encoded: tuple[bytes, ...], short_side: int, quality: int) -> tuple[bytes, ...]:
    """Return the images as make_webdataset.py stores them. A smaller image keeps its size, but is encoded again."""
    encoder = choose_encoder("auto")
    return tuple(resized_jpeg(data, short_side, quality, encoder) for data in encoded)


def _pass(encoded: tuple[bytes, ...], decoder: Decoder) -> Contender:
    transform = TrainTransform(AUGMENT, SIZE)

    def run() -> None:
        for number, data in enumerate(encoded):
            draw = None

            def choose(width: int, height: int) -> View:
                nonlocal draw
                draw = transform.draw(sample_seed(0, 0, number), width, height)  # noqa: B023
                return transform.view(draw)

            view = decoder.read(data, choose)
            assert draw is not None
            transform.finish(view, draw)

    return run


def _differences(originals: tuple[bytes, ...], shrunk: tuple[bytes, ...], decoder: Decoder) -> dict[str, float]:
    """Return the mean difference of the crops in grey levels, and the share of training crops that are enlarged."""
    training, evaluation, enlarged = [], [], 0
    train, centre = TrainTransform(AUGMENT, SIZE), EvalTransform(AUGMENT, SIZE)
    for number, (original, small) in enumerate(zip(originals, shrunk, strict=True)):
        frame, now = read_frame(original), read_frame(small)
        assert frame is not None
        assert now is not None
        view = train.view(train.draw(sample_seed(0, 0, number), frame.width, frame.height))
        same = _same_part(view, now.width / frame.width, now.height / frame.height, now.width, now.height)
        enlarged += min(same.box[2] - same.box[0], same.box[3] - same.box[1]) < SIZE
        training.append(_difference(decoder, (original, view), (small, same)))
        views = centre.view(frame.width, frame.height), centre.view(now.width, now.height)
        evaluation.append(_difference(decoder, (original, views[0]), (small, views[1])))
    return {
        "training_levels": round(statistics.mean(training), 2),
        "evaluation_levels": round(statistics.mean(evaluation), 2),
        "enlarged": round(enlarged / len(originals), 2),
    }


def _same_part(view: View, across: float, down: float, width: int, height: int) -> View:
    """Return the view of the same part of a picture that was scaled by these factors, with its filter's margin."""
    left, top, right, bottom = view.box
    box = left * across, top * down, right * across, bottom * down
    margin = 1 + 2 * max(1.0, (box[2] - box[0]) / SIZE, (box[3] - box[1]) / SIZE)
    region = (
        max(0, int(box[0] - margin)),
        max(0, int(box[1] - margin)),
        min(width, int(box[2] + margin) + 1),
        min(height, int(box[3] + margin) + 1),
    )
    return View(region, box, view.size)


def _difference(decoder: Decoder, one: tuple[bytes, View], two: tuple[bytes, View]) -> float:
    return float(np.abs(_decoded(decoder, *one) - _decoded(decoder, *two)).mean())


def _decoded(decoder: Decoder, data: bytes, view: View) -> npt.NDArray[np.int16]:
    return decoder.read(data, lambda _width, _height: view).astype(np.int16)


def _print(result: dict[str, Any]) -> None:
    print(f"{result['images']} images of {result['source']}, JPEG quality {result['quality']}")
    columns = ("short side", "KB", "speed", "images/core s", "training differs", "evaluation differs", "enlarged crops")
    rows = [tuple(str(figure) for figure in row.values()) for row in result["rows"]]
    print_table("make_webdataset.py --resize", columns, rows)


if __name__ == "__main__":
    run_script(main)
