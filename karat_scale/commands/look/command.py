"""Look at data: `karat show` draws one global batch as training sees it, `karat data` shows what a data set holds.

Counts cover all images of a data set; sizes, kinds, colours and oddities cover a sample. In a small data set, all
images are decoded to find those that cannot be. The page opens offline and escapes every text.
"""

import io
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image
from torch import Tensor

from karat_scale.commands.evaluate.test_set import MOST_CLASSES, Split, packed_splits
from karat_scale.commands.figures import new_figure, rendered, show_map
from karat_scale.data.batch import Batch
from karat_scale.data.decoders.decode import UndecodableImageError, decode_rgb, opened
from karat_scale.data.plan import micro_batch_of
from karat_scale.data.prepare import DECODED_BELOW
from karat_scale.data.shards.remote import RemoteUse
from karat_scale.data.shards.shard_format import DATASET_FILE, SPLIT_FOLDERS, dataset_directory, flat_fix
from karat_scale.data.shards.shards import FolderSplit
from karat_scale.engine import distributed
from karat_scale.engine.reporting.progress import Reporter, SilentDisplay
from karat_scale.foundation.console import plural, print_table, printable, progress, render_page, write_json
from karat_scale.foundation.errors import DataError, UserError
from karat_scale.foundation.files import write_atomically
from karat_scale.foundation.machine import usable_cores
from karat_scale.recipe import Recipe
from karat_scale.recipe.loading import load_recipe
from karat_scale.training.tasks.classification.task import ClassificationTask

_LEAST_WEIGHT = 0.005  # of a class in a mixed target that is worth naming
_COLUMNS = 8


@dataclass(frozen=True)
class ShownBatch:
    """A global batch, or some of its images.

    Attributes:
        images: uint8 [b, H, W, 3], as the model sees them, without normalisation.
        targets: float [b, classes].
        places: where each image is stored.
        bad: images that could not be read, and were replaced.
        least: the weight that label smoothing gives to every class.
    """

    images: npt.NDArray[np.uint8]
    targets: npt.NDArray[np.float32]
    places: list[str]
    classes: tuple[str, ...]
    bad: list[str]
    least: float

    @classmethod
    def of(cls, task: ClassificationTask, micro_batches: Iterable[tuple[Batch, Tensor, Tensor]]) -> "ShownBatch":
        """Return the batch of these micro batches, each with its normalised images [b, 3, H, W] and its targets."""
        augment = task.recipe.augment
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (augment.mean, augment.std))
        locate = getattr(task.backend, "locate", None)
        images, targets, places, bad = [], [], [], []
        for batch, seen, soft in micro_batches:
            scaled = (seen.float() * std + mean).mul(255).round().clamp(0, 255)
            images.append(scaled.to(torch.uint8).permute(0, 2, 3, 1).numpy())
            targets.append(soft.numpy())
            if batch.streamed is not None:
                places += [" in ".join(source) for source in batch.streamed.sources]
            else:
                ids = batch.sample_ids.tolist()
                places += [" in ".join(locate(number)) if locate else f"sample {number}" for number in ids]
            bad += [str(one) for one in batch.bad]
        least = augment.label_smoothing / task.recipe.model.num_classes
        return cls(np.concatenate(images), np.concatenate(targets), places, task.classes, bad, least)

    def chosen(self, numbers: Sequence[int]) -> "ShownBatch":
        """Return these images of the batch."""
        places = [self.places[number] for number in numbers]
        return replace(self, images=self.images[numbers], targets=self.targets[numbers], places=places)

    def label(self, number: int) -> str:
        """Return the classes of an image, with their weights where it is mixed."""
        row = self.targets[number]
        shares = (row - self.least) / max(float((row - self.least).sum()), 1e-9)
        order = [int(index) for index in np.argsort(-shares)[:2] if shares[index] > _LEAST_WEIGHT]
        names = [printable(self.classes[i]) if i < len(self.classes) else f"class {i}" for i in order]
        if len(order) == 1:
            return names[0]
        return " + ".join(f"{shares[index]:.2f} {name}" for index, name in zip(order, names, strict=True))


def show_batch(recipe: str, overrides: Sequence[str], step: int, images: int, out: str | None) -> int:
    """Draw the images of a training step into a PNG, and list them; returns the exit code.

    Args:
        step: the step, counted from 1 as `karat train` logs it.
        images: the largest number of images.
        out: the PNG; next to the run's directory if None.

    Raises:
        UserError: the recipe, its data or the step is not right, or the file cannot be written.
    """
    loaded = load_recipe(recipe, overrides)
    shown = read_batch(loaded, step, images)
    path = Path(out or f"{Path(loaded.run.dir).expanduser().resolve()}-step-{step}.png")
    try:
        if not out:
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, draw(shown))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; choose another place by --out") from error
    rows = [[str(number), shown.label(number), place] for number, place in enumerate(shown.places)]
    print_table(f"{loaded.run.name}, step {step}: {len(rows)} images", ["", "target", "from"], rows, (1, 2))
    for bad in shown.bad:
        print(printable(f"replaced: {bad}"))
    print(f"\n{path}")
    return 0


def read_batch(recipe: Recipe, step: int, count: int) -> ShownBatch:
    """Return the first images of a training step. Raises UserError if there is no such step."""
    if recipe.data.is_stream and step > 1:
        raise UserError(f"--step {step}: a stream (data.order = stream) is read from its start; use --step 1")
    recipe = recipe.changed(data=recipe.data.on_a_cpu().changed(workers=recipe.data.fewest_workers))
    with (
        distributed.joined("cpu") as world,
        closing(ClassificationTask(recipe, world, Reporter(SilentDisplay(), None)).at(step - 1)) as task,
    ):
        plan = task.plan()
        last = plan.steps_per_epoch * recipe.train.epochs
        if not 1 <= step <= last:
            raise UserError(f"--step {step}: the recipe has steps 1 to {last:,}")
        wanted = -(-min(count, recipe.train.global_batch) // micro_batch_of(recipe, world.size))
        slices = [one for one, _ in zip(plan.slices(step - 1, step), range(wanted), strict=False)]
        taken = ((batch, *task.as_trained(batch)) for batch in task.backend.train_batches(slices))
        shown = ShownBatch.of(task, taken)
        return shown.chosen(range(min(count, len(shown.images))))


def draw(shown: ShownBatch) -> bytes:
    """Return the grid of images with their targets, as a PNG."""
    columns = min(_COLUMNS, len(shown.images))
    rows = -(-len(shown.images) // columns)
    figure = new_figure(1.7 * columns, 1.95 * rows)
    for number, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        if number < len(shown.images):
            title = shown.label(number).replace(" + ", "\n").replace("$", r"\$")
            show_map(axes, shown.images[number], title)
        else:
            axes.axis("off")
    return rendered(figure)


@dataclass
class SplitFacts:
    """The contents of a split."""

    name: str
    images: int
    sampled: int
    decoded: int
    notice: str
    per_class: dict[str, int]
    sizes: list[tuple[int, int, int]] = field(default_factory=list)
    """Width, height and bytes of the sampled images that can be decoded."""
    kinds: Counter[str] = field(default_factory=Counter)
    odd: list[tuple[str, str]] = field(default_factory=list)
    """Keys of images that cannot be decoded, and of sampled ones that are unusual, with the reason."""

    @property
    def per_each(self) -> str:
        """The number of images of a class, or the range of these numbers."""
        fewest, most = min(self.per_class.values()), max(self.per_class.values())
        return str(most) if fewest == most else f"{fewest} to {most}"

    def numbers(self) -> dict[str, Any]:
        """Return plain data."""
        width, height, file_bytes = np.array(self.sizes, np.float64).reshape(-1, 3).T
        return {
            "images": self.images,
            "classes": len(self.per_class),
            "smallest_class": min(self.per_class.values()),
            "largest_class": max(self.per_class.values()),
            "empty_classes": [name for name, count in self.per_class.items() if not count],
            "sampled": self.sampled,
            "decoded": self.decoded,
            "width": _percentiles(width),
            "height": _percentiles(height),
            "aspect_ratio": _percentiles(width / height),
            "bytes": _percentiles(file_bytes),
            "kinds": dict(self.kinds),
            "odd": [{"image": key, "what": what} for key, what in self.odd],
            "per_class": self.per_class,
        }


def _percentiles(values: npt.NDArray[np.float64]) -> dict[str, float]:
    if not len(values):
        return {}
    found = np.percentile(values, [0, 5, 50, 95, 100])
    return {name: round(float(x), 4) for name, x in zip(("min", "p5", "median", "p95", "max"), found, strict=True)}


_AT_ONCE = 32  # encoded images in memory


def examine(name: str, split: Split, most: int, decodes_all: bool) -> SplitFacts:
    """Return the contents of a split, from all labels and from a sample of at most `most` images.

    It decodes the sample, or all images if `decodes_all`. Raises DataError.
    """
    counts = np.bincount(split.labels, minlength=len(split.classes)).tolist()
    per_class = dict(zip(map(printable, split.classes), counts, strict=True))
    sample = set(np.linspace(0, len(split) - 1, min(most, len(split))).round().astype(int).tolist())
    ids: Sequence[int] = range(len(split)) if decodes_all else sorted(sample)
    facts = SplitFacts(name, len(split), len(sample), len(ids), printable(split.notice), per_class)
    split.prepare(ids)
    keys = split.keys()  # `locate` reads an index for each sample
    cores = ThreadPoolExecutor(usable_cores())  # decoding lets other threads run
    with progress(f"{name}: looking at images", len(ids), "images") as advance, cores:
        for start in range(0, len(ids), _AT_ONCE):
            part = ids[start : start + _AT_ONCE]
            encoded = [split.read(number) for number in part]
            for number, data, (size, kind, what) in zip(part, encoded, cores.map(_look, encoded), strict=True):
                if number in sample or size is None:
                    facts.odd += [(printable(keys[number]), one) for one in what]
                if number in sample and size is not None:
                    facts.sizes.append((*size, len(data)))
                    facts.kinds[kind] += 1
            advance(len(part))
    return facts


def _look(data: bytes) -> tuple[tuple[int, int] | None, str, list[str]]:
    """Decode an image; return its size, kind and what is unusual, or None and why it cannot be decoded."""
    try:
        with opened(data) as image:
            found = image.size, f"{image.format} {image.mode}", _oddness(image)
        decode_rgb(data, at_least=(1, 1))  # so a JPEG is read to its end, but not all of its pixels are computed
    except UndecodableImageError as error:
        return None, "", [f"cannot be decoded: {error}"]
    return found


def _oddness(image: Image.Image) -> list[str]:
    """Return what is unusual about an image, from its header."""
    found = []
    if image.mode not in ("RGB", "L"):
        found.append(f"its mode is {image.mode}")
    if getattr(image, "n_frames", 1) > 1:
        found.append("it has several frames")
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a damaged block makes Pillow raise nearly any error
        found.append("its EXIF cannot be read")
    else:
        if turned not in (0, 1):
            found.append(f"its EXIF orientation is {turned}: training sees it as it is stored")
    width, height = image.size
    if min(width, height) < 32:
        found.append(f"it is small: {width} x {height}")
    if max(width, height) > 4 * min(width, height):
        found.append(f"it is narrow: {width} x {height}")
    return found


def _charts(facts: SplitFacts) -> bytes:
    """Return histograms of the sampled sizes and of the classes' sizes, as a PNG."""
    figure = new_figure(12, 2.6)
    left, middle, right = figure.subplots(1, 3)
    if facts.sizes:
        width, height, _ = np.array(facts.sizes).T
        left.scatter(width, height, s=4, alpha=0.4)
        middle.hist(width / height, bins=40)
    left.set(xlabel="width", ylabel="height", title="pixels")
    middle.set(xlabel="width / height", ylabel="images", title="aspect ratio")
    right.xaxis.get_major_locator().set_params(integer=True)
    right.yaxis.get_major_locator().set_params(integer=True)
    right.plot(sorted(facts.per_class.values(), reverse=True))
    right.set(xlabel="class, largest first", ylabel="images", title="images of a class", ylim=(0, None))
    return rendered(figure, dpi=110)


def look_at_data(path: str, images: int, classes: int, out: str, json_file: str | None) -> int:
    """Print what a data set holds and write an HTML page; returns the exit code.

    Args:
        images: the number of images of each split whose sizes are read; in a small data set, all are decoded.
        classes: the number of classes of which the page has pictures.

    Raises:
        DataError: there is no data set at the path, or it is damaged.
    """
    directory = dataset_directory(path)
    facts, pictures = [], {}
    with ExitStack() as opened_splits:
        splits = {name: opened_splits.enter_context(closing(of())) for name, of in open_splits(directory).items()}
        decodes_all = isinstance(directory, Path) and sum(map(len, splits.values())) < DECODED_BELOW
        for name, split in splits.items():
            facts.append(examine(name, split, images, decodes_all))
            pictures[name] = _pictures(split, classes)
    write_json(json_file, {one.name: one.numbers() for one in facts})
    for one in facts:
        _print_split(one)
        if unknown := one.per_class.keys() - facts[0].per_class.keys():
            print(f"{one.name} has classes that {facts[0].name} does not have: {', '.join(sorted(unknown)[:5])}")
        if missing := facts[0].per_class.keys() - one.per_class.keys():
            print(f"{one.name} lacks classes that {facts[0].name} has: {', '.join(sorted(missing)[:5])}")
    values = {"place": printable(str(directory)), "splits": facts, "pictures": pictures}
    charts = {one.name: _charts(one) for one in facts}
    try:
        page = render_page("karat_scale.commands.look", "data.html.j2", **values, charts=charts)
        write_atomically(Path(out), page)
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror}; choose another --out") from error
    print(f"\npage: {out}")
    return 0


def open_splits(directory: Path | str) -> dict[str, Callable[[], Split]]:
    """Return functions that open each split of shards, betons or an image folder. Raises DataError."""
    if (packed := packed_splits(directory, RemoteUse())) is not None:
        return packed
    directory = Path(directory)
    folders = [name for name in SPLIT_FOLDERS if (directory / name).is_dir()]
    if not folders:
        flat = f", or {flat_fix(directory)}" if any(directory.glob("*/")) else ""
        raise DataError(
            f"{directory} is not a data set: no {DATASET_FILE}, no *.beton, no folder {' or '.join(SPLIT_FOLDERS)}; "
            f"name the directory that has one{flat}"
        )
    return {name: partial(FolderSplit, directory, name, MOST_CLASSES) for name in folders}


def _pictures(split: Split, classes_shown: int, each: int = 6) -> dict[str, list[bytes]]:
    """Return some images of the first classes, as small JPEGs."""
    pictures: dict[str, list[bytes]] = {}
    ids = [np.flatnonzero(split.labels == label)[:each].tolist() for label in range(len(split.classes[:classes_shown]))]
    split.prepare(itertools.chain(*ids))
    for numbers, name in zip(ids, split.classes, strict=False):
        shown: list[bytes] = []
        for number in numbers:
            try:
                small = decode_rgb(split.read(number), at_least=(96, 96))
            except UndecodableImageError:
                continue  # among the odd ones, if it was sampled
            small.thumbnail((96, 96))
            content = io.BytesIO()
            small.save(content, "JPEG", quality=80)
            shown.append(content.getvalue())
        pictures[printable(name)] = shown
    return pictures


def _print_split(facts: SplitFacts) -> None:
    numbers = facts.numbers()
    empty = numbers["empty_classes"]
    counts = f"\n{facts.name}: {plural(facts.images, 'image')} of {plural(numbers['classes'], 'class')}, "
    counts += f"{facts.per_each} each"
    print(printable(counts + (f"; without images: {', '.join(empty[:5])}" if empty else "")))
    if facts.notice:
        print(f"  {facts.notice}")
    names = ("width", "height", "aspect_ratio", "bytes")
    rows = [
        [name.replace("_", " "), *(f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in numbers[name].values())]
        for name in names
    ]
    rows = [row for row in rows if len(row) > 1]
    print_table(f"of {numbers['sampled']} sampled images", ["", "smallest", "5 %", "median", "95 %", "largest"], rows)
    print("  " + ", ".join(f"{count} {kind}" for kind, count in facts.kinds.most_common()))
    if facts.decoded < facts.images:
        print(f"  checked by decoding: these only; --images {facts.images} checks all, and names truncated ones")
    else:
        print(f"  checked by decoding: all {facts.images:,}")
    alike: dict[str, list[str]] = {}
    for key, what in sorted(facts.odd, key=lambda one: not one[1].startswith("cannot")):  # what stops a training first
        alike.setdefault(what, []).append(key)
    for what, keys in itertools.islice(alike.items(), 10):
        print(printable(f"  odd: {keys[0]}{f' and {len(keys) - 1:,} more' if len(keys) > 1 else ''}: {what}"))
    if len(alike) > 10:
        print(f"  and {sum(map(len, [*alike.values()][10:])):,} more; the page lists all")
