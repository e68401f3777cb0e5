"""The time of data_prep/make_webdataset.py over the least its result needs: `python -m benchmarks.prepare`.

With --resize, the least is to decode each image whole and to encode one of the result's size, by libjpeg-turbo alone:
no resize, check, hash or tar. Without, it is to copy the members of a tar by tarfile. With --check decode, it is to
decode each image whole by the same decoder. Processor time, in turn, one process; a ratio is the plain work's time over
ours.
"""

import contextlib
import importlib
import io
import statistics
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torchvision
from PIL import Image

from karat_scale.commands.bench.data import Contender, decode_whole, decode_whole_by_simplejpeg, each_of
from karat_scale.commands.measure.interleaved import interleaved_seconds, processor_seconds
from karat_scale.commands.measure.loading import CLASSES, prepare_images
from karat_scale.data.decoders.decode import decode_rgb, result_size
from karat_scale.data.prepare.make_webdataset import main as make_webdataset
from karat_scale.foundation.arguments import OneLineParser, count, new_file
from karat_scale.foundation.console import print_table, write_json
from karat_scale.foundation.errors import UserError, run_script
from karat_scale.foundation.machine import usable_cores

COPY = "copy of tar members"
OURS, OURS_COPY = "make_webdataset --resize", "make_webdataset, bytes kept"
DECODE, OURS_CHECK = "whole decode, Pillow", "make_webdataset --check decode"

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class PreparePlan:
    """Up to `images` JPEGs of a tar, or photo-like ones made here, and the short side in pixels to resize them to."""

    tar: str | None = None
    resize: int = 256
    quality: int = 90
    encoder: str = "auto"
    images: int = 1000
    rounds: int = 5


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a table, and write the file of `--json`. Raises UserError for what cannot be measured."""
    parser = OneLineParser(prog="python -m benchmarks.prepare", description=__doc__)
    parser.add_argument("--tar", metavar="FILE", help="a tar of JPEGs (default: photo-like images made here)")
    parser.add_argument("--resize", type=count, default=256, help="short side in pixels (default: %(default)s)")
    parser.add_argument("--quality", type=count, default=90, help="(default: %(default)s)")
    parser.add_argument("--encoder", choices=("auto", "native", "pillow"), default="auto")
    parser.add_argument("--images", type=count, default=1000, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=count, default=5, help="interleaved rounds (default: %(default)s)")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="also write all figures to this file")
    plan = vars(parser.parse_args(arguments))
    json_file = plan.pop("json")
    result = measure(PreparePlan(**plan))
    _print(result)
    write_json(json_file, result)


def measure(plan: PreparePlan) -> dict[str, Any]:
    """Return the times and their ratios. Raises UserError for what cannot be measured."""
    if plan.quality > 100:
        raise UserError(f"--quality {plan.quality}: should be from 1 to 100")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="karat-bench-") as name:
        scratch = Path(name)
        images = prepare_images(scratch, plan.images, None, plan.tar)
        source = _as_tar(scratch, images.encoded)
        results = [_resized(data, plan.resize) for data in images.encoded]

        def made(*options: str) -> Callable[[], object]:
            return lambda: _make(make_webdataset, source, *options)

        resize = ("--resize", str(plan.resize), "--quality", str(plan.quality), "--encoder", plan.encoder)
        recodings = {"torchvision": recode_by_torchvision, "simplejpeg": recode_by_simplejpeg}
        made_bases = {name: recode(images.encoded, results, plan.quality) for name, recode in recodings.items()}
        bases = {f"decode + encode, {name}": base for name, base in made_bases.items() if base}
        if not bases:
            raise UserError("nothing to compare with: this torchvision encodes no JPEGs; pip install simplejpeg")
        contenders = {
            **bases,
            OURS: made(*resize),
            COPY: lambda: _copy(source),
            OURS_COPY: made("--check", "header"),
            DECODE: each_of(images.encoded, decode_rgb),
            OURS_CHECK: made("--check", "decode"),
        }
        seconds = interleaved_seconds(contenders, plan.rounds, processor_seconds)
    base = min(bases, key=seconds.median)
    count = len(images.encoded)
    return {
        "source": images.source,
        "images": count,
        "mean_kb": images.mean_kb,
        "resize": plan.resize,
        "quality": plan.quality,
        "encoder": plan.encoder,
        "rounds": plan.rounds,
        "cores": usable_cores(),
        "base": base,
        "milliseconds_an_image": {
            name: round(1e3 * statistics.median(times) / count, 3) for name, times in seconds.items()
        },
        "resize_ratio": round(1 / seconds.ratio(OURS, base), 3),
        "copy_ratio": round(1 / seconds.ratio(OURS_COPY, COPY), 3),
        "check_ratio": round(1 / seconds.ratio(OURS_CHECK, DECODE), 3),
    }


def recode_by_simplejpeg(encoded: tuple[bytes, ...], results: list[Pixels], quality: int) -> Contender | None:
    """Decode whole images, and encode other pixels [height, width, 3]; None if simplejpeg is not installed."""
    decode = decode_whole_by_simplejpeg(encoded)
    if decode is None:
        return None
    encode = importlib.import_module("simplejpeg").encode_jpeg

    def run() -> None:
        decode()
        for pixels in results:
            encode(pixels, quality=quality, colorspace="RGB", colorsubsampling="420")

    return run


def recode_by_torchvision(encoded: tuple[bytes, ...], results: list[Pixels], quality: int) -> Contender | None:
    """Decode and encode like recode_by_simplejpeg; None if this torchvision does not encode."""
    decode, encode_jpeg = each_of(encoded, decode_whole), getattr(torchvision.io, "encode_jpeg", None)
    if encode_jpeg is None:
        return None

    def run() -> None:
        decode()
        for pixels in results:
            encode_jpeg(torch.from_numpy(pixels).permute(2, 0, 1), quality=quality)

    return run


def _as_tar(scratch: Path, encoded: tuple[bytes, ...]) -> Path:
    path = scratch / "source.tar"
    with tarfile.open(path, "w") as tar:
        for number, data in enumerate(encoded):
            _add(tar, f"class-{number % CLASSES:02d}/{number:06d}.jpg", data)
    return path


def _resized(data: bytes, short_side: int) -> npt.NDArray[np.uint8]:
    image = decode_rgb(data)
    return np.array(image.resize(result_size(*image.size, short_side), Image.Resampling.BICUBIC))


def _make(make_webdataset: Callable[[list[str]], None], source: Path, *options: str) -> None:
    with _output(source) as out, contextlib.redirect_stdout(io.StringIO()):
        make_webdataset(["--src", str(source), "--out", str(out), "--workers", "1", *options])


def _copy(source: Path) -> None:
    with _output(source) as out, tarfile.open(source) as old, tarfile.open(out / "copy.tar", "w") as new:
        for member in old:
            new.addfile(member, old.extractfile(member))


@contextlib.contextmanager
def _output(source: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=source.parent) as name:
        yield Path(name)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _print(result: dict[str, Any]) -> None:
    title = f"{result['images']} images of {result['mean_kb']:.0f} KB ({Path(result['source']).name}), one process"
    rows = [(name, f"{milliseconds:.3f}") for name, milliseconds in result["milliseconds_an_image"].items()]
    print_table(title, ("contender", "ms per image"), rows)
    print(f"--resize {result['resize']}: {result['resize_ratio']:.2f} of {result['base']}")
    print(f"bytes kept: {result['copy_ratio']:.2f} of {COPY}")
    print(f"--check decode: {result['check_ratio']:.2f} of {DECODE}")


if __name__ == "__main__":
    run_script(main)
