"""timm's RandAugment, with every choice drawn before anything is done."""

import importlib.util
import random
import threading
from typing import Any

from PIL import Image, ImageOps

from karat_scale.data.augmentation.draw import Operation
from karat_scale.data.augmentation.warp import find_warp, matrix_of
from karat_scale.data.decoders.pillow import RESAMPLE
from karat_scale.foundation.errors import RecipeError
from karat_scale.recipe import AugmentConfig


class _OwnRandom(threading.local):
    """Python's `random`, with a generator for each thread."""

    def __init__(self) -> None:
        self._generator = random.Random()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._generator, name)


def _timm_with(generator: _OwnRandom) -> Any:
    """Return a copy of timm's module that draws from `generator`: Python's own belongs to all threads and libraries."""
    spec = importlib.util.find_spec("timm.data.auto_augment")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.random = generator
    return module


_RANDOM = _OwnRandom()
_TIMM = _timm_with(_RANDOM)


class RandAugment:
    """The policy of `augment.randaugment` (arXiv 1909.13719, as timm reads its string).

    Raises RecipeError for a string that timm cannot read.
    """

    def __init__(self, augment: AugmentConfig, image_size: int) -> None:
        hparams: dict[str, Any] = {
            "translate_const": int(image_size * 0.45),
            "img_mean": tuple(min(255, round(255 * value)) for value in augment.mean),
            "interpolation": RESAMPLE[augment.interpolation],
        }
        try:
            policy = _TIMM.rand_augment_transform(augment.randaugment, hparams)
        except (AssertionError, ValueError, KeyError) as error:
            raise RecipeError(
                f"augment.randaugment = {augment.randaugment!r} is not a policy timm reads; "
                "use one such as rand-m9-mstd0.5-inc1, or an empty string"
            ) from error
        for op in policy.ops:
            if op.name.startswith("Posterize"):
                op.aug_fn = _posterize
        self.fill: tuple[int, ...] = hparams["img_mean"]
        self._warp = find_warp(augment.interpolation, self.fill)
        self._count = policy.num_layers
        self._ops: dict[str, Any] = {op.name: op for op in policy.ops}
        self._weights = None if policy.choice_weights is None else list(policy.choice_weights)

    @property
    def names(self) -> tuple[str, ...]:
        """timm's names of the operations that may be drawn."""
        return tuple(self._ops)

    def draw(self, rng: random.Random) -> tuple[Operation, ...]:
        """The operations that one image gets, in order, with their strengths."""
        seed = rng.getrandbits(64)
        names = self._draw_names(rng)
        _RANDOM.seed(seed)
        return tuple((name, arguments) for name in names if (arguments := self._arguments(name)) is not None)

    def apply(self, image: Image.Image, operation: Operation) -> Image.Image:
        """Do a drawn operation to an RGB image."""
        name, arguments = operation
        if self._warp is not None and (matrix := matrix_of(name, arguments, *image.size)) is not None:
            return self._warp(image, matrix)
        op = self._ops[name]
        result: Image.Image = op.aug_fn(image, *arguments, **op.kwargs)
        return result

    def _draw_names(self, rng: random.Random) -> list[str]:
        # timm's own choice uses numpy's global generator; a weighted choice never takes an operation twice.
        names = list(self._ops)
        if self._weights is None:
            return [names[int(rng.random() * len(names))] for _ in range(self._count)]
        keys = [rng.random() ** (1 / w) if w > 0 else -1.0 for w in self._weights]
        best = sorted(range(len(names)), key=keys.__getitem__, reverse=True)[: self._count]
        return [names[i] for i in best]

    def _arguments(self, name: str) -> tuple[float, ...] | None:
        """The arguments of one use of an operation, or None where it is left out this time."""
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


def _posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    # At full magnitude timm keeps no bits. Pillow 13 refuses that; before, the image came out black.
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return ImageOps.posterize(image, bits_to_keep)
