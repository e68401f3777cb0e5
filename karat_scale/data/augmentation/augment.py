"""The transforms of training and evaluation: a sample's draws, the view of its image, and the operations on it.

A training transform first draws what it will do, then does it. Two backends must agree on the record of draws. Every
draw comes from the sample's own seed, through `random.Random`, whose stream Python keeps stable.

RandAugment is timm's, with every choice drawn before anything is done. Its operations are in C++: they give the
same bits as Pillow, which takes several times as long.
"""

import ctypes
import importlib.util
import math
import random
import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance, ImageOps

from karat_scale.data.batch import Draw, Operation
from karat_scale.data.decoders.decode import View, centre_view, crop_view
from karat_scale.data.decoders.libraries import RESAMPLE
from karat_scale.foundation.errors import RecipeError
from karat_scale.foundation.native_build import LoadError, load
from karat_scale.recipe import AugmentConfig

SOURCE = Path(__file__).parent / "cpp" / "randaugment.cpp"
_BICUBIC = {"bilinear": 0, "bicubic": 1}
Matrix = tuple[float, float, float, float, float, float]
Pixels = npt.NDArray[np.uint8]
Planes = npt.NDArray[np.uint8]
Values = npt.NDArray[np.int64]
_VALUES = np.arange(256)
_RAMP = Image.fromarray(_VALUES.astype(np.uint8)[None])


class Compiled:
    """The operations of RandAugment in C++. Each takes planes, uint8 [3, height, width], and returns new ones.

    The interpreter's lock is released during the work. Raises LoadError where they cannot be compiled.
    """

    def __init__(self, interpolation: str, fill: Sequence[int]) -> None:
        self._library = load(SOURCE, "RandAugment in C++")
        self._bicubic = ctypes.c_int(_BICUBIC[interpolation])
        self._fill = np.array(fill, dtype=np.uint8)

    def warp(self, planes: Planes, matrix: Matrix) -> Planes:
        """Return the image whose pixel (x, y) comes from a x + b y + c, d x + e y + f, as `Image.transform` does it."""
        numbers = np.array(matrix, dtype=np.float64)
        return self._run("karat_warp", planes, _place(numbers), _place(self._fill), self._bicubic)

    def flip(self, planes: Planes) -> Planes:
        """Return the image with left and right exchanged."""
        return self._run("karat_flip", planes)

    def enhance(self, planes: Planes, name: str, factor: float) -> Planes:
        """Do the operation of Pillow's ImageEnhance that has this name."""
        if name in ("Color", "Sharpness"):
            return self._run(f"karat_{name.lower()}", planes, ctypes.c_float(factor))
        level = 0
        if name == "Contrast":
            grey = self._histogram(planes)[3]
            level = int(int(grey @ _VALUES) / int(grey.sum()) + 0.5)
        table = Image.blend(Image.new("L", _RAMP.size, level), _RAMP, factor)
        return self._look_up(planes, np.tile(np.asarray(table), 3))

    def tabled(self, planes: Planes, name: str, *arguments: Any) -> Planes:
        """Do timm's operation of this name, one of TABLES or HISTOGRAM_TABLES."""
        if name in TABLES:
            return self._look_up(planes, _table(name, *arguments))
        counts = self._histogram(planes)[:3]
        return self._look_up(planes, np.concatenate([HISTOGRAM_TABLES[name](of) for of in counts]).astype(np.uint8))

    def _histogram(self, planes: Planes) -> npt.NDArray[np.int32]:
        """Return how often red, green, blue and grey have each value, [4, 256]."""
        counts = np.zeros((4, 256), dtype=np.int32)
        self._run("karat_histogram", planes, out=counts)
        return counts

    def _look_up(self, planes: Planes, table: Planes) -> Planes:
        return self._run("karat_look_up", planes, _place(table))

    def _run(self, name: str, planes: Planes, *arguments: Any, out: npt.NDArray[Any] | None = None) -> Planes:
        planes = np.ascontiguousarray(planes)
        out = np.empty_like(planes) if out is None else out
        _, height, width = planes.shape
        sides = ctypes.c_int(width), ctypes.c_int(height)
        if getattr(self._library, name)(_place(planes), *sides, *arguments, _place(out)):
            raise MemoryError("out of memory while an image was augmented")
        return out


def _place(array: npt.NDArray[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


@cache
def _table(name: str, *arguments: Any) -> Planes:
    return np.tile(TABLES[name](*arguments), 3).astype(np.uint8)


def _contrasted(counts: npt.NDArray[np.int32]) -> Values:
    low, high = np.flatnonzero(counts)[[0, -1]].tolist()
    scale = 255.0 / (high - low) if high > low else 1.0
    offset = -low * scale if high > low else 0.0
    table: Values = np.clip(_VALUES * scale + offset, 0, 255).astype(np.int64)
    return table


def _equalized(counts: npt.NDArray[np.int32]) -> Values:
    step = int(counts.sum() - counts[counts > 0][-1]) // 255
    table: Values = (step // 2 + np.cumsum(counts) - counts) // step if step else _VALUES
    return np.minimum(table, 255)


# The new values of 0 .. 255, as Pillow and timm have them, by timm's names; from an argument, or from the histogram of
# each channel.
TABLES: dict[str, Callable[..., Values]] = {
    "Invert": lambda: 255 - _VALUES,
    **dict.fromkeys(("Posterize", "PosterizeOriginal"), lambda bits: _VALUES & ~(2 ** max(8 - bits, 0) - 1)),
    "Solarize": lambda least: np.where(least > _VALUES, _VALUES, 255 - _VALUES),
    "SolarizeAdd": lambda more: np.where(_VALUES < 128, np.minimum(_VALUES + more, 255), _VALUES),
}
HISTOGRAM_TABLES = {"AutoContrast": _contrasted, "Equalize": _equalized}


def image_of(planes: Planes) -> Image.Image:
    """Return Pillow's image of planes, uint8 [3, height, width]."""
    return Image.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0)))


def planes_of(image: Image.Image) -> Planes:
    """Return the planes of an RGB image, uint8 [3, height, width]."""
    planes: Planes = np.asarray(image).transpose(2, 0, 1)
    return planes


def _fill_of(augment: AugmentConfig) -> tuple[int, ...]:
    return tuple(min(255, round(255 * value)) for value in augment.mean)


def find_compiled(augment: AugmentConfig) -> Compiled | None:
    """Return the operations in C++; None if they cannot be compiled, or if this machine's Pillow gives other bits."""
    return _find_compiled(augment.interpolation, _fill_of(augment))


@cache
def _find_compiled(interpolation: str, fill: tuple[int, ...]) -> Compiled | None:
    try:
        compiled = Compiled(interpolation, fill)
    except LoadError:
        return None
    noise = np.random.default_rng(0).integers(0, 256, (3, 19, 23), dtype=np.uint8)
    image = image_of(noise)
    matrices: tuple[Matrix, ...] = (
        (1, 0.3, 0, 0, 1, 0),
        (1, 0, 0, -0.2, 1, 0),
        (1, 0, 3.7, 0, 1, 0),
        rotation(17.0, *image.size),
    )
    for matrix in matrices:
        theirs = image.transform(image.size, Image.Transform.AFFINE, matrix, RESAMPLE[interpolation], fillcolor=fill)
        if not np.array_equal(compiled.warp(noise, matrix), planes_of(theirs)):
            return None
    for name in ENHANCEMENTS:
        for factor in (0.4, 1.9):
            theirs = getattr(ImageEnhance, name)(image).enhance(factor)
            if not np.array_equal(compiled.enhance(noise, name, factor), planes_of(theirs)):
                return None
    dim = noise // 2
    for function, *arguments in (("AutoContrast",), ("Equalize",), ("Invert",), ("Posterize", 3), ("Solarize", 99)):
        theirs = getattr(ImageOps, function.lower())(image_of(dim), *arguments)
        if not np.array_equal(compiled.tabled(dim, function, *arguments), planes_of(theirs)):
            return None
    return compiled


def rotation(degrees: float, width: int, height: int) -> Matrix:
    """Return the matrix of `Image.rotate`, about the centre, with its rounding."""
    radians = -math.radians(degrees % 360.0)
    cosine, sine = round(math.cos(radians), 15), round(math.sin(radians), 15)
    minus_sine = round(-math.sin(radians), 15)
    x, y = width / 2, height / 2
    return (
        cosine,
        sine,
        cosine * -x + sine * -y + 0.0 + x,
        minus_sine,
        cosine,
        minus_sine * -x + cosine * -y + 0.0 + y,
    )


# By timm's names, from an argument and the image's width and height.
MATRICES: dict[str, Callable[[float, int, int], Matrix]] = {
    "Rotate": rotation,
    "ShearX": lambda factor, _w, _h: (1, factor, 0, 0, 1, 0),
    "ShearY": lambda factor, _w, _h: (1, 0, 0, factor, 1, 0),
    "TranslateX": lambda pixels, _w, _h: (1, 0, pixels, 0, 1, 0),
    "TranslateY": lambda pixels, _w, _h: (1, 0, 0, 0, 1, pixels),
    "TranslateXRel": lambda share, width, _h: (1, 0, share * width, 0, 1, 0),
    "TranslateYRel": lambda share, _w, height: (1, 0, 0, 0, 1, share * height),
}


# By timm's names, without "Increasing".
ENHANCEMENTS = ("Brightness", "Color", "Contrast", "Sharpness")


class _OwnRandom(threading.local):
    """Python's `random`, with a generator for each thread."""

    def __init__(self) -> None:
        self._generator = random.Random()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._generator, name)


_RANDOM = _OwnRandom()


@cache
def _timm() -> Any:
    """Return a copy of timm's module that draws from `_RANDOM`: Python's own belongs to all threads and libraries.

    Only RandAugment needs it, and importing timm takes seconds.
    """
    spec = importlib.util.find_spec("timm.data.auto_augment")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.random = _RANDOM
    return module


class RandAugment:
    """The policy of `augment.randaugment` (arXiv 1909.13719, as timm reads its string).

    Raises RecipeError for a string that timm cannot read.
    """

    def __init__(self, augment: AugmentConfig, image_size: int) -> None:
        hparams: dict[str, Any] = {
            "translate_const": int(image_size * 0.45),
            "img_mean": _fill_of(augment),
            "interpolation": RESAMPLE[augment.interpolation],
        }
        try:
            policy = _timm().rand_augment_transform(augment.randaugment, hparams)
        except ModuleNotFoundError as error:
            raise RecipeError(
                f"augment.randaugment = {augment.randaugment!r}: RandAugment needs timm; install it"
            ) from error
        except (AssertionError, ValueError, KeyError) as error:
            raise RecipeError(
                f"augment.randaugment = {augment.randaugment!r} is not a policy timm reads; "
                "use one such as rand-m9-mstd0.5-inc1, or an empty string"
            ) from error
        for op in policy.ops:
            if op.name.startswith("Posterize"):
                op.aug_fn = _posterize
        self.fill: tuple[int, ...] = hparams["img_mean"]
        self._compiled = find_compiled(augment)
        self._count = policy.num_layers
        self._ops: dict[str, Any] = {op.name: op for op in policy.ops}
        self._weights = None if policy.choice_weights is None else list(policy.choice_weights)

    @property
    def names(self) -> tuple[str, ...]:
        """timm's names of the operations that may be drawn."""
        return tuple(self._ops)

    def draw(self, rng: random.Random) -> tuple[Operation, ...]:
        """Draw the operations that one image gets, in order, with their strengths."""
        seed = rng.getrandbits(64)
        names = self._draw_names(rng)
        _RANDOM.seed(seed)
        return tuple((name, arguments) for name in names if (arguments := self._arguments(name)) is not None)

    def apply(self, planes: Planes, operation: Operation) -> Planes:
        """Do a drawn operation to an image, uint8 [3, height, width]."""
        name, arguments = operation
        op, plain = self._ops[name], name.removesuffix("Increasing")
        if self._compiled is not None:
            # Pillow turns by right angles without a filter.
            if plain in MATRICES and not (plain == "Rotate" and arguments[0] % 90 == 0):
                _, height, width = planes.shape
                return self._compiled.warp(planes, MATRICES[plain](arguments[0], width, height))
            if plain in ENHANCEMENTS:
                return self._compiled.enhance(planes, plain, arguments[0])
            if plain in TABLES or plain in HISTOGRAM_TABLES:
                return self._compiled.tabled(planes, plain, *arguments)
        return planes_of(op.aug_fn(image_of(planes), *arguments, **op.kwargs))

    def _draw_names(self, rng: random.Random) -> list[str]:
        # timm's own choice uses numpy's global generator; a weighted choice never takes an operation twice.
        names = list(self._ops)
        if self._weights is None:
            return [names[int(rng.random() * len(names))] for _ in range(self._count)]
        keys = [rng.random() ** (1 / w) if w > 0 else -1.0 for w in self._weights]
        best = sorted(range(len(names)), key=keys.__getitem__, reverse=True)[: self._count]
        return [names[i] for i in best]

    def _arguments(self, name: str) -> tuple[float, ...] | None:
        """Draw the arguments of one use of an operation; None if it is left out this time."""
        op = self._ops[name]
        if op.prob < 1 and _RANDOM.random() > op.prob:
            return None
        magnitude = float(op.magnitude)
        if op.magnitude_std == float("inf"):
            magnitude = _RANDOM.uniform(0, magnitude)
        elif op.magnitude_std > 0:
            magnitude = _RANDOM.gauss(magnitude, op.magnitude_std)
        magnitude = max(0.0, min(magnitude, op.magnitude_max or 10))
        return () if op.level_fn is None else tuple(op.level_fn(magnitude, op.hparams))


def _posterize(image: Any, bits_to_keep: int, **_: Any) -> Any:
    # At full magnitude timm keeps no bits. Pillow 13 refuses that; before, the image came out black.
    if bits_to_keep < 1:
        return image.point([0] * 768)
    return ImageOps.posterize(image, bits_to_keep)


JITTERS = {"brightness": "Brightness", "contrast": "Contrast", "saturation": "Color"}
"""Pillow's enhancement for each kind of jitter. torchvision's jitter uses the same."""
CROP_TRIES, TENSORFLOW_CROP_TRIES = 10, 100
# Random erasing, arXiv 1708.04896 with timm's settings: share of the area, and height over width.
ERASE_AREA, ERASE_RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)


class TrainTransform:
    """Random resized crop, flip, RandAugment, colour jitter, erasing, in timm's order.

    If RandAugment and jitter are both set, both act; timm itself turns the jitter off then. Raises RecipeError for a
    RandAugment string that timm cannot read.
    """

    def __init__(self, augment: AugmentConfig, image_size: int) -> None:
        self._augment = augment
        self._size = image_size
        self._only_flips = augment.workers_only_flip
        self._fixed_crop = augment.scale == (1.0, 1.0) and augment.ratio == (1.0, 1.0)
        self._randaugment = RandAugment(augment, image_size) if augment.randaugment else None
        is_for_workers = not self._only_flips and (augment.randaugment or augment.color_jitter > 0)
        self._compiled = find_compiled(augment) if is_for_workers else None
        self._mean = 255 * np.array(augment.mean, dtype=np.float32)
        self._std = 255 * np.array(augment.std, dtype=np.float32)

    def draw(self, seed: int, width: int, height: int) -> Draw:
        """Return the draw for a sample of this seed and these source dimensions in pixels."""
        rng = random.Random(seed)
        augment = self._augment
        box = self._draw_box(rng, width, height)
        flip = augment.hflip > 0 and rng.random() < augment.hflip
        ops = self._randaugment.draw(rng) if self._randaugment else ()
        jitter: list[tuple[str, float]] = []
        if augment.color_jitter > 0:
            low, high = max(0.0, 1 - augment.color_jitter), 1 + augment.color_jitter
            jitter = [(name, low + (high - low) * rng.random()) for name in JITTERS]
            ranks = [rng.random() for _ in jitter]
            jitter = [jitter[i] for i in sorted(range(len(jitter)), key=ranks.__getitem__)]
        erase = self._draw_erase(rng) if augment.erasing > 0 and rng.random() < augment.erasing else None
        return Draw(box, flip, ops, tuple(jitter), erase)

    def _draw_box(self, rng: random.Random, width: int, height: int) -> tuple[int, int, int, int]:
        # The method of the Inception paper as torchvision has it: ten tries, then the largest centred crop.
        augment = self._augment
        if augment.crop == "big_vision":
            return _draw_tensorflow_box(rng, width, height, augment.scale, augment.ratio)
        if not self._fixed_crop:
            for _ in range(CROP_TRIES):
                w, h = _draw_sides(rng, width * height, augment.scale, augment.ratio)
                if 0 < w <= width and 0 < h <= height:
                    return int(rng.random() * (width - w + 1)), int(rng.random() * (height - h + 1)), w, h
        ratio = min(max(width / height, augment.ratio[0]), augment.ratio[1])
        w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
        return (width - w) // 2, (height - h) // 2, w, h

    def _draw_erase(self, rng: random.Random) -> tuple[int, int, int, int, int] | None:
        size = self._size
        for _ in range(CROP_TRIES):
            w, h = _draw_sides(rng, size * size, ERASE_AREA, ERASE_RATIO)
            if 0 < w < size and 0 < h < size:
                left, top = int(rng.random() * (size - w + 1)), int(rng.random() * (size - h + 1))
                return left, top, w, h, rng.getrandbits(32)
        return None

    def view(self, draw: Draw) -> View:
        """Return the part of the image that the draw asks for."""
        return crop_view(draw.box, self._size)

    def choose(self, seed: int, width: int, height: int) -> tuple[View, Draw]:
        """Return the view of a sample of this seed and these dimensions in pixels, and what was drawn."""
        draw = self.draw(seed, width, height)
        return self.view(draw), draw

    def finish(self, pixels: Pixels, draw: Draw | None) -> Pixels:
        """Apply the workers' part of the draw to the view, uint8 [size, size, 3]; returns uint8 [3, size, size].

        The view itself does not change.
        """
        assert draw is not None
        planes: Planes = pixels.transpose(2, 0, 1)
        compiled = self._compiled
        if draw.flip:
            # numpy's copy of a flipped image takes ten times as long.
            planes = compiled.flip(planes) if compiled is not None else planes[:, :, ::-1]
        if self._only_flips:
            return planes
        for operation in draw.ops:
            assert self._randaugment is not None
            planes = self._randaugment.apply(planes, operation)
        for name, factor in draw.jitter:
            if compiled is not None:
                planes = compiled.enhance(planes, JITTERS[name], factor)
            else:
                planes = planes_of(getattr(ImageEnhance, JITTERS[name])(image_of(planes)).enhance(factor))
        return planes if draw.erase is None else self._erased(planes, draw.erase)

    def _erased(self, planes: Planes, erase: tuple[int, int, int, int, int]) -> Planes:
        left, top, width, height, seed = erase
        # RandomState is the numpy generator whose stream is frozen for good.
        noise = np.random.RandomState(seed).standard_normal((height, width, 3)).astype(np.float32)
        filling = np.clip(noise * self._std + self._mean, 0, 255)
        erased: Planes = planes.copy()
        erased[:, top : top + height, left : left + width] = filling.transpose(2, 0, 1)
        return erased


class EvalTransform:
    """Resize the short side to image_size / eval_crop, then crop the centre."""

    def __init__(self, augment: AugmentConfig, image_size: int) -> None:
        self._size = image_size
        self._short_side = math.floor(image_size / augment.eval_crop)

    def view(self, width: int, height: int) -> View:
        """Return the part of an image of these dimensions that is evaluated."""
        return centre_view(width, height, self._short_side, self._size)

    def choose(self, _seed: int, width: int, height: int) -> tuple[View, None]:
        """Return the view; nothing is drawn."""
        return self.view(width, height), None

    def finish(self, pixels: Pixels, _draw: Draw | None) -> Pixels:
        """Return the view, uint8 [size, size, 3], as uint8 [3, size, size]."""
        planes: Pixels = pixels.transpose(2, 0, 1)
        return planes


def _draw_sides(
    rng: random.Random, area: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int]:
    """Draw width and height of a box: a share of the area within `scale`, width over height within `ratio`."""
    share = area * (scale[0] + (scale[1] - scale[0]) * rng.random())
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = math.exp(low + (high - low) * rng.random())
    return round(math.sqrt(share * aspect)), round(math.sqrt(share / aspect))


def _draw_tensorflow_box(
    rng: random.Random, width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Draw left, top, width and height as TensorFlow's sample_distorted_bounding_box does, which big_vision uses.

    The aspect ratio is uniform, not its logarithm, and the height, not the area, so there are more small crops than in
    torchvision. A crop narrower than the image never has its last column, and one lower never its last row. After 100
    tries without a box, the box is the whole image, whatever its ratio.
    """
    least, most = (share * width * height for share in scale)
    for _ in range(TENSORFLOW_CROP_TRIES):
        aspect = ratio[0] + (ratio[1] - ratio[0]) * rng.random()
        highest = min(height, round(math.sqrt(most / aspect)), int((width + 0.5 - 1e-7) / aspect))
        h = min(round(math.sqrt(least / aspect)), highest)
        h += int(rng.random() * (highest - h + 1))
        h += h * round(h * aspect) < least  # by rounding
        h -= h * round(h * aspect) > most
        w = round(h * aspect)
        if least <= w * h <= most and 0 < w <= width and 0 < h <= height:
            return int(rng.random() * (width - w)), int(rng.random() * (height - h)), w, h
    return 0, 0, width, height
