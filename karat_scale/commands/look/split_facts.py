"""What a split of a data set holds: counts, and the sizes, kinds and oddities of sampled images."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from PIL import Image

from karat_scale.data.decoders.decode import UndecodableImageError, opened
from karat_scale.data.loading.assemble import PreparesSamples
from karat_scale.data.shards.beton import BetonSplit
from karat_scale.data.shards.folder import FolderSplit
from karat_scale.data.shards.shards import ShardSplit
from karat_scale.foundation.console import printable, progress

_ORIENTATION = 274  # the EXIF tag
Split = ShardSplit | BetonSplit | FolderSplit


@dataclass
class SplitFacts:
    """What a split holds. Sizes are [n, 2] (width, height) of the sampled images that can be read."""

    name: str
    images: int
    per_class: dict[str, int]
    sizes: npt.NDArray[np.int64]
    file_bytes: npt.NDArray[np.int64]
    kinds: Counter[str] = field(default_factory=Counter)
    odd: list[tuple[str, str]] = field(default_factory=list)
    """Keys of sampled images that are unusual, with the reason."""

    def numbers(self) -> dict[str, object]:
        """Return plain data."""
        ratios = self.sizes[:, 0] / self.sizes[:, 1]
        counts = np.array(list(self.per_class.values()))
        return {
            "images": self.images,
            "classes": len(self.per_class),
            "smallest_class": int(counts.min()),
            "largest_class": int(counts.max()),
            "empty_classes": [name for name, count in self.per_class.items() if not count],
            "sampled": len(self.sizes) + sum(reason.startswith("cannot") for _, reason in self.odd),
            "width": _percentiles(self.sizes[:, 0]),
            "height": _percentiles(self.sizes[:, 1]),
            "aspect_ratio": _percentiles(ratios),
            "bytes": _percentiles(self.file_bytes),
            "kinds": dict(self.kinds),
            "odd": [{"image": key, "what": what} for key, what in self.odd],
            "per_class": self.per_class,
        }


def _percentiles(values: npt.NDArray[np.generic]) -> dict[str, float]:
    if not len(values):
        return {}
    found = np.percentile(values.astype(np.float64), [0, 5, 50, 95, 100])
    return {name: round(float(x), 4) for name, x in zip(("min", "p5", "median", "p95", "max"), found, strict=True)}


def examine(name: str, split: Split, ids: npt.NDArray[np.int64]) -> SplitFacts:
    """Return what a split holds, from these samples and all labels. Raises DataError."""
    counts = np.bincount(split.labels, minlength=len(split.classes))
    sizes, lengths = [], []
    facts = SplitFacts(
        name,
        len(split),
        {printable(label): int(count) for label, count in zip(split.classes, counts, strict=True)},
        np.empty((0, 2), np.int64),
        np.empty(0, np.int64),
    )
    if isinstance(split, PreparesSamples):
        split.prepare(ids.tolist())
    keys = split.keys()  # `locate` reads an index for each sample
    with progress(f"{name}: looking at images", len(ids), "images") as advance:
        for number in ids.tolist():
            data = split.read(number)
            key = printable(keys[number])
            advance(1)
            try:
                with opened(data) as image:
                    size, kind, what = image.size, f"{image.format} {image.mode}", _oddness(image)
            except UndecodableImageError as error:
                facts.odd.append((key, f"cannot be read: {error}"))
                continue
            sizes.append(size)
            lengths.append(len(data))
            facts.kinds[kind] += 1
            facts.odd += [(key, one) for one in what]
    facts.sizes = np.array(sizes, np.int64).reshape(-1, 2)
    facts.file_bytes = np.array(lengths, np.int64)
    return facts


def _oddness(image: Image.Image) -> list[str]:
    """Return what is unusual about an image, from its header."""
    found = []
    if image.mode not in ("RGB", "L"):
        found.append(f"its mode is {image.mode}")
    if getattr(image, "n_frames", 1) > 1:
        found.append("it has several frames")
    if (turned := image.getexif().get(_ORIENTATION, 1)) not in (0, 1):
        found.append(f"its EXIF orientation is {turned}: training sees it as it is stored")
    width, height = image.size
    if min(width, height) < 32:
        found.append(f"it is small: {width} x {height}")
    if max(width, height) > 4 * min(width, height):
        found.append(f"it is narrow: {width} x {height}")
    return found
