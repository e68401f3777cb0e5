"""The image files that the user named, as a source for the evaluation's own reading, decoding and cropping."""

import glob
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torchvision.datasets.folder import IMG_EXTENSIONS

from karat_scale.data.batch import Batch
from karat_scale.data.decoders import Decoder, make_decoder
from karat_scale.data.decoders.decode import UndecodableImageError
from karat_scale.data.decoders.orientation import upright
from karat_scale.data.loading.assemble import EvalAssembler
from karat_scale.data.loading.base import ImageSpec
from karat_scale.data.loading.loader import OrderedLoader
from karat_scale.data.plan import BatchSlice
from karat_scale.foundation.console import plural
from karat_scale.foundation.errors import RecipeError
from karat_scale.foundation.files import read_image
from karat_scale.foundation.machine import usable_cores
from karat_scale.recipe import Recipe


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
