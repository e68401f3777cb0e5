"""Convert learned attention to another number of tokens.

KArAt's parameters belong to token positions. Attention sums over every axis of tokens: H[k, p] =
sum_q phi_pq(A[k, q]) over keys, O = sum_j S[k, j] V[j] over values, whose weights are W[j, p] or, without a W,
phi_jp. Over P patches such a sum is P times the mean of a function on the image, of which the patches are samples. So
on another grid of P' patches the same function is resampled bicubically, and its factors are scaled by
P / P': the sums, and with them the variance of H and O, stay as they were, as far as images are smooth on the scale
of a patch. Class and register tokens are one term each, and stay as they are. A learned constant S has a sum over its
second axis of tokens only. Coefficients of modes of the grid are fitted to the resampled functions.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from karat_scale.attention import KaratOperator
from karat_scale.attention.form_parameters import SECOND, parameter_shapes
from karat_scale.attention.variants import SmoothOperator, StaticHeads
from karat_scale.attention.variants.smooth import mode_columns

Resizable = KaratOperator | StaticHeads | SmoothOperator


@dataclass(frozen=True)
class TokenGrid:
    """N = prefix + height width tokens: class and register tokens, then the patches row by row."""

    prefix: int
    height: int
    width: int

    @property
    def patches(self) -> int:
        """P."""
        return self.height * self.width

    @property
    def tokens(self) -> int:
        """N."""
        return self.prefix + self.patches


def square_grid(tokens: int, prefix: int) -> TokenGrid:
    """Return the grid of N tokens of a square image.

    Raises ValueError if the patches are not a square.
    """
    side = math.isqrt(max(tokens - prefix, 0))
    if side < 1 or side * side != tokens - prefix:
        raise ValueError(f"{tokens} tokens are not {prefix} and a square of patches")
    return TokenGrid(prefix, side, side)


def tokens_of(operator: Resizable, tensors: Mapping[str, Tensor]) -> int:
    """Return N of an operator's tensors by name; `operator` is the same except for N.

    Raises ValueError if they are of another operator.
    """
    for name, axes in _token_axes(operator).items():
        tensor = tensors.get(name)
        if axes and tensor is not None and tensor.dim() > axes[0]:
            tokens = tensor.shape[axes[0]]
            _check(operator, tensors, tokens)
            return tokens
    raise ValueError(f"expected {', '.join(_token_axes(operator))}, not {', '.join(tensors)}")


def resize_operator(
    operator: Resizable,
    tensors: Mapping[str, Tensor],
    old: TokenGrid,
    new: TokenGrid,
    places: Sequence[int | None] | None = None,
) -> dict[str, Tensor]:
    """Convert an operator's tensors by name to another grid. For the same grid, the tensors are returned unchanged.

    Args:
        operator: of the new size; it gives the initial values of class or register tokens that the old grid lacks.
        tensors: its parameters and buffers by name.
        old, new: the grid of the tensors, and the grid to convert to.
        places: the position of each class and register token of the new grid in the old one, or None if missing; the
            default is the first ones.

    Raises ValueError if the tensors are of another operator, or the basis does not say what multiplies phi.
    """
    _check(operator, tensors, old.tokens)
    places = range(new.prefix) if places is None else places
    if old == new and list(places) == list(range(new.prefix)):
        return dict(tensors)
    if isinstance(operator, SmoothOperator):
        return _resize_modes(operator, tensors, old, new, places)
    resized = {}
    for name, axes in _token_axes(operator).items():
        tensor = tensors[name]
        for axis in axes:
            scale = old.patches / new.patches if _is_summed(operator, name, axis) else 1.0
            tensor = resize_tokens(tensor, axis, old, new, scale, places)
        resized[name] = _with_new_tokens(getattr(operator, name), tensor, axes, places)
    return resized


def resize_tokens(
    tensor: Tensor,
    axis: int,
    old: TokenGrid,
    new: TokenGrid,
    scale: float = 1.0,
    places: Sequence[int | None] | None = None,
) -> Tensor:
    """A tensor whose `axis` is one of tokens for another grid: patches bicubic and scaled, the others as they are.

    `places` says which of the old grid's class and register tokens the new ones are, None being zero; else they are the
    first.
    """
    prefix, patches = tensor.movedim(axis, -1).split([old.prefix, old.patches], -1)
    places = range(new.prefix) if places is None else places
    prefix = functional.pad(prefix, (1, 0))[..., [0 if place is None else place + 1 for place in places]]
    if (old.height, old.width) == (new.height, new.width):
        return torch.cat((prefix, patches * scale), -1).movedim(-1, axis).contiguous()
    plane = patches.reshape(-1, 1, old.height, old.width).to(torch.promote_types(tensor.dtype, torch.float32))
    plane = functional.interpolate(plane, (new.height, new.width), mode="bicubic", antialias=True) * scale
    patches = plane.to(tensor.dtype).view(*prefix.shape[:-1], new.patches)
    return torch.cat((prefix, patches), -1).movedim(-1, axis).contiguous()


def _is_summed(operator: Resizable, name: str, axis: int) -> bool:
    """Return True if what a parameter multiplies is summed over this axis. Raises ValueError if that is not known."""
    if isinstance(operator, StaticHeads):
        return axis == 2
    if not isinstance(operator, KaratOperator):
        return True
    if not operator.basis.amplitudes:
        raise ValueError(f"the basis {type(operator.basis).__name__} has no `amplitudes`, so N cannot change")
    return name.removeprefix(SECOND) in ("proj", *operator.basis.amplitudes)


def _resize_modes(
    operator: SmoothOperator,
    tensors: Mapping[str, Tensor],
    old: TokenGrid,
    new: TokenGrid,
    places: Sequence[int | None],
) -> dict[str, Tensor]:
    """The coefficients that are nearest to the resampled functions; 0 at a token that has no place in the old grid."""
    resampled = resize_tokens(tensors["modes"].double(), 0, old, new, old.patches / new.patches, places)
    change = mode_columns(new.tokens, operator.num_modes).mT @ resampled
    fitted = {
        name: torch.tensordot(change, tensors[name].double(), ([1], [axis])).movedim(0, axis).to(tensors[name].dtype)
        for name, axis in _MODE_AXES.items()
    }
    return {"modes": operator.modes, **fitted}


def _with_new_tokens(own: Tensor, tensor: Tensor, axes: Sequence[int], places: Sequence[int | None]) -> Tensor:
    """`tensor`, but `own` wherever one of its axes of tokens is at a token that has no place in the old grid."""
    new = torch.tensor([number for number, place in enumerate(places) if place is None], dtype=torch.long)
    is_new = torch.zeros(tensor.shape, dtype=torch.bool)
    for axis in axes:
        is_new.index_fill_(axis, new, True)
    return torch.where(is_new, own.to(tensor.dtype), tensor)


_MODE_AXES = {"cos_modes": 2, "sin_modes": 2, "proj_modes": 1}
_AXES: dict[type, dict[str, list[int]]] = {
    StaticHeads: {"matrix": [1, 2]},
    SmoothOperator: {"modes": [0], **{name: [] for name in _MODE_AXES}},
}


def _shapes(operator: Resizable, tokens: int) -> dict[str, tuple[int, ...]]:
    if not isinstance(operator, KaratOperator):
        axes = _AXES[type(operator)]
        return {
            name: tuple(tokens if axis in axes[name] else size for axis, size in enumerate(parameter.shape))
            for name, parameter in operator.state_dict().items()
        }
    shapes = parameter_shapes(operator.basis, operator.form, operator.num_heads, tokens, operator.rank)
    return shapes if operator.proj is None else {**shapes, "proj": (operator.num_heads, tokens, operator.rank)}


def _token_axes(operator: Resizable) -> dict[str, list[int]]:
    """The axes of each parameter whose size follows N."""
    if not isinstance(operator, KaratOperator):
        return _AXES[type(operator)]
    one, other = _shapes(operator, operator.num_tokens), _shapes(operator, operator.num_tokens + 1)
    return {
        name: [axis for axis, sizes in enumerate(zip(shape, other[name], strict=True)) if sizes[0] != sizes[1]]
        for name, shape in one.items()
    }


def _check(operator: Resizable, tensors: Mapping[str, Tensor], tokens: int) -> None:
    expected = _shapes(operator, tokens)
    if set(tensors) != set(expected):
        raise ValueError(f"expected {', '.join(expected)}, not {', '.join(tensors)}")
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(f"{name} is {list(tensors[name].shape)} there, {list(shape)} expected")
