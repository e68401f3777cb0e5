"""`karat bench prepare`: what data_prep/make_webdataset.py costs over the least that its work could cost.

With --resize, over a whole decode of each image and an encode of one of the result's size by libjpeg-turbo alone, with
no resize, check, hash or tar. Without, over copying the members of a tar by tarfile. With --check decode, over a whole
decode of each image by the same decoder. Processor time, in turn, one process; a ratio is the plain work's time over
ours.
"""

import contextlib
import importlib
import io
import json
import statistics
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from karat_scale.bench.data_peers import recode_by_simplejpeg, recode_by_torchvision
from karat_scale.bench.interleave import interleaved_seconds, median_ratio, processor_seconds
from karat_scale.bench.sample_images import CLASSES, prepare_images
from karat_scale.data.decode import decode_rgb
from karat_scale.data.decoders.recoder import result_size
from karat_scale.errors import UserError
from karat_scale.files import write_atomically
from karat_scale.machine import usable_cores
from karat_scale.shipped import shipped_directory

SCRIPTS = shipped_directory("data_prep")
COPY = "copy of tar members"
OURS, OURS_COPY = "make_webdataset --resize", "make_webdataset, bytes kept"
DECODE, OURS_CHECK = "whole decode, Pillow", "make_webdataset --check decode"


@dataclass(frozen=True)
class PreparePlan:
    """What is measured: up to `images` JPEGs of a tar, or photo-like ones made here, to this short side in pixels."""

    tar: str | None = None
    resize: int = 256
    quality: int = 90
    encoder: str = "auto"
    images: int = 1000
    rounds: int = 5


def bench_prepare(plan: PreparePlan, json_file: str | None) -> int:
    """Measure, print a table, and write `json_file`; returns 0. Raises UserError for what cannot be measured."""
    if plan.quality > 100:
        raise UserError(f"--quality {plan.quality}: should be from 1 to 100")
    make_webdataset = _script()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="karat-bench-") as name:
        scratch = Path(name)
        images = prepare_images(scratch, plan.images, None, plan.tar)
        source = _as_tar(scratch, images.encoded)
        results = [_resized(data, plan.resize) for data in images.encoded]

        def made(*options: str) -> Callable[[], object]:
            return lambda: _make(make_webdataset, source, *options)

        resize = ("--resize", str(plan.resize), "--quality", str(plan.quality), "--encoder", plan.encoder)
        bases = {"decode + encode, torchvision": recode_by_torchvision(images.encoded, results, plan.quality)}
        if simple := recode_by_simplejpeg(images.encoded, results, plan.quality):
            bases["decode + encode, simplejpeg"] = simple
        contenders = {
            **bases,
            OURS: made(*resize),
            COPY: lambda: _copy(source),
            OURS_COPY: made(),
            DECODE: lambda: _decode(images.encoded),
            OURS_CHECK: made("--check", "decode"),
        }
        seconds = interleaved_seconds(contenders, plan.rounds, processor_seconds)
    base = min(bases, key=lambda found: statistics.median(seconds[found]))
    count = len(images.encoded)
    result = {
        "source": images.source,
        "images": count,
        "mean_kb": round(1e3 * images.megabytes / count, 1),
        "resize": plan.resize,
        "quality": plan.quality,
        "encoder": plan.encoder,
        "rounds": plan.rounds,
        "cores": usable_cores(),
        "base": base,
        "milliseconds_an_image": {
            name: round(1e3 * statistics.median(times) / count, 3) for name, times in seconds.items()
        },
        "resize_ratio": round(1 / median_ratio(seconds, OURS, base), 3),
        "copy_ratio": round(1 / median_ratio(seconds, OURS_COPY, COPY), 3),
        "check_ratio": round(1 / median_ratio(seconds, OURS_CHECK, DECODE), 3),
    }
    _print(result)
    if json_file:
        write_atomically(Path(json_file), json.dumps(result, indent=2) + "\n")
    return 0


def _script() -> Callable[[list[str]], None]:
    """The script's main function."""
    if str(SCRIPTS) not in sys.path:
        sys.path.insert(0, str(SCRIPTS))
    found: Callable[[list[str]], None] = importlib.import_module("make_webdataset").main
    return found


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


def _decode(encoded: tuple[bytes, ...]) -> None:
    for data in encoded:
        decode_rgb(data)


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
    table = Table(title=title)
    table.add_column("contender")
    table.add_column("ms an image", justify="right")
    for name, milliseconds in result["milliseconds_an_image"].items():
        table.add_row(name, f"{milliseconds:.3f}")
    console = Console()
    console.print(table)
    console.print(f"--resize {result['resize']}: {result['resize_ratio']:.2f} of {result['base']}", markup=False)
    console.print(f"bytes kept: {result['copy_ratio']:.2f} of {COPY}")
    console.print(f"--check decode: {result['check_ratio']:.2f} of {DECODE}", markup=False)
