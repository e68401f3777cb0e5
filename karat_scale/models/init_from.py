"""Start a model from the weights of another: other classes, another image size, softmax weights for KArAt.

Some differences between models do not show in weights, only in recipes: heads, and functions without parameters.

Learned operators are adapted to the model's grid and prefix tokens, because KArAt's parameters belong to token
positions. Attention sums over every axis of tokens: H[k, p] = sum_q phi_pq(A[k, q]) over keys, O = sum_j S[k, j] V[j]
over values, whose weights are W[j, p] or, without a W, phi_jp. Over P patches such a sum is P times the mean of a
function on the image, of which the patches are samples. So on another grid of P' patches the same function is
resampled bicubically, and its factors are scaled by P / P'. The sums, and with them the variance of H and O, stay as
they were, as far as images are smooth on the scale of a patch. Class and register tokens are one term each, and stay
as they are. A learned constant S has a sum over its second axis of tokens only, and a position bias over none.
Coefficients of modes of the grid are fitted to the resampled functions.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from karat_scale.attention import AttentionHeads, KaratOperator
from karat_scale.attention.forms import SECOND, parameter_shapes
from karat_scale.attention.variants import SmoothOperator, mode_columns
from karat_scale.foundation.errors import OtherModelError, RecipeError, one_line
from karat_scale.models.factory import layer_sizes
from karat_scale.models.hosts import host_of
from karat_scale.models.layers import attention_layers, fit_prefix, is_sincos_2d, prefix_tokens
from karat_scale.recipe import AttentionConfig, ModelConfig

Places = Sequence[int | None]
"""For each class and register token of one grid: its position in another grid, or None if it is not there."""


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


def tokens_of(operator: AttentionHeads, tensors: Mapping[str, Tensor]) -> int:
    """Return N of an operator's tensors by name; `operator` is the same except for N.

    Raises ValueError if they are of another operator.
    """
    for name, axes in _token_axes(operator).items():
        tensor = tensors.get(name)
        if axes and tensor is not None and tensor.dim() > axes[0]:
            tokens = tensor.shape[axes[0]]
            _check_positions(operator, tensors, tokens)
            return tokens
    raise ValueError(f"expected {', '.join(_token_axes(operator))}, not {', '.join(tensors)}")


def resize_operator(
    operator: AttentionHeads,
    tensors: Mapping[str, Tensor],
    old: TokenGrid,
    new: TokenGrid,
    places: Places,
    gradients: bool = False,
) -> dict[str, Tensor]:
    """Convert an operator's tensors by name to another grid. For the same grid, the tensors are returned unchanged.

    Args:
        operator: an operator of the new size, with initial values for class or register tokens that the old grid lacks.
        tensors: the parameters and buffers to convert, by name.
        old, new: the grid of the tensors, and the grid to convert to.
        places: the places of the new grid's tokens in the old one.
        gradients: the tensors are moments of gradients, which do not become smaller as N grows, and are not scaled.

    Raises ValueError if the tensors are of another operator, or the basis does not say what multiplies phi.
    """
    _check_positions(operator, tensors, old.tokens)
    if old == new and list(places) == list(range(new.prefix)):
        return dict(tensors)
    if isinstance(operator, SmoothOperator):
        return _resize_modes(operator, tensors, old, new, 1.0 if gradients else old.patches / new.patches, places)
    resized = dict(tensors)
    for name, axes in _token_axes(operator).items():
        tensor = tensors[name]
        for axis in axes:
            scale = old.patches / new.patches if _is_summed(operator, name, axis) and not gradients else 1.0
            tensor = resize_tokens(tensor, axis, old, new, scale, places)
        resized[name] = _with_new_tokens(getattr(operator, name), tensor, axes, places)
    return resized


def resize_tokens(tensor: Tensor, axis: int, old: TokenGrid, new: TokenGrid, scale: float, places: Places) -> Tensor:
    """Convert a tensor's axis of tokens to another grid: patches bicubically and scaled, other tokens unchanged.

    Tokens that have no place in the old grid are zero.
    """
    prefix, patches = tensor.movedim(axis, -1).split([old.prefix, old.patches], -1)
    prefix = functional.pad(prefix, (1, 0))[..., [0 if place is None else place + 1 for place in places]]
    if (old.height, old.width) == (new.height, new.width):
        return torch.cat((prefix, patches * scale), -1).movedim(-1, axis).contiguous()
    plane = patches.reshape(-1, 1, old.height, old.width).to(torch.promote_types(tensor.dtype, torch.float32))
    plane = functional.interpolate(plane, (new.height, new.width), mode="bicubic", antialias=True) * scale
    patches = plane.to(tensor.dtype).view(*prefix.shape[:-1], new.patches)
    return torch.cat((prefix, patches), -1).movedim(-1, axis).contiguous()


def _is_summed(operator: AttentionHeads, name: str, axis: int) -> bool:
    """Return True if what a parameter multiplies is summed over this axis. Raises ValueError if that is not known."""
    if not isinstance(operator, KaratOperator):
        return axis in operator.summed_axes.get(name, ())
    if not operator.basis.amplitudes:
        raise ValueError(f"the basis {type(operator.basis).__name__} has no `amplitudes`, so N cannot change")
    return name.removeprefix(SECOND) in ("proj", *operator.basis.amplitudes)


def _resize_modes(
    operator: SmoothOperator,
    tensors: Mapping[str, Tensor],
    old: TokenGrid,
    new: TokenGrid,
    scale: float,
    places: Places,
) -> dict[str, Tensor]:
    """The coefficients nearest to the resampled, scaled functions; 0 at a token that has no place in the old grid."""
    resampled = resize_tokens(tensors["modes"].double(), 0, old, new, scale, places)
    change = mode_columns(new.tokens, operator.num_modes).mT @ resampled
    fitted = {
        name: torch.tensordot(change, tensors[name].double(), ([1], [axis])).movedim(0, axis).to(tensors[name].dtype)
        for name, axis in _MODE_AXES.items()
    }
    return {"modes": operator.modes, **fitted}


def _with_new_tokens(own: Tensor, tensor: Tensor, axes: Sequence[int], places: Places) -> Tensor:
    """Return `tensor`, but `own` wherever an axis of tokens is at a token that has no place in the old grid."""
    new = torch.tensor([number for number, place in enumerate(places) if place is None], dtype=torch.long)
    is_new = torch.zeros(tensor.shape, dtype=torch.bool)
    for axis in axes:
        is_new.index_fill_(axis, new, True)
    return torch.where(is_new, own.to(tensor.dtype), tensor)


_MODE_AXES = {"cos_modes": 2, "sin_modes": 2, "proj_modes": 1}


def _shapes(operator: AttentionHeads, tokens: int) -> dict[str, tuple[int, ...]]:
    if not isinstance(operator, KaratOperator):
        return {
            name: tuple(
                tokens if axis in operator.token_axes.get(name, ()) else size
                for axis, size in enumerate(parameter.shape)
            )
            for name, parameter in operator.state_dict().items()
            if not name.startswith(_WRAPPED)
        }
    shapes = parameter_shapes(operator.basis, operator.form, operator.num_heads, tokens, operator.rank)
    return shapes if operator.proj is None else {**shapes, "proj": (operator.num_heads, tokens, operator.rank)}


def _token_axes(operator: AttentionHeads) -> Mapping[str, Sequence[int]]:
    """The axes of each parameter whose size follows N."""
    if not isinstance(operator, KaratOperator):
        return operator.token_axes
    one, other = _shapes(operator, operator.num_tokens), _shapes(operator, operator.num_tokens + 1)
    return {
        name: [axis for axis, sizes in enumerate(zip(shape, other[name], strict=True)) if sizes[0] != sizes[1]]
        for name, shape in one.items()
    }


def _check_positions(operator: AttentionHeads, tensors: Mapping[str, Tensor], tokens: int) -> None:
    expected = _shapes(operator, tokens)
    if set(tensors) != set(expected):
        raise ValueError(f"expected {', '.join(expected)}, not {', '.join(tensors)}")
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(f"{name} is {list(tensors[name].shape)} there, {list(shape)} expected")


OPERATOR = ".operator."
_WRAPPED = "operator."  # parameters of heads within heads, which are adapted separately


def spread_operator(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights with an operator for each layer, if they hold a shared one in the first layer only.

    A folder of `karat export` stores shared operators once.
    """
    own = model.state_dict()
    there, here = _layers(weights), _layers(own)
    first = next((name.partition(OPERATOR)[0] for name in own if OPERATOR in name), None)
    if there != {first}:
        return dict(weights)
    stored = f"{min(there)}{OPERATOR}"
    shared = {name.removeprefix(stored): x for name, x in weights.items() if name.startswith(stored)}
    return {**weights, **{f"{layer}{OPERATOR}{name}": x for layer in here for name, x in shared.items()}}


def operators_for(
    model: nn.Module, weights: Mapping[str, Tensor], there: Sequence[str], gradients: bool = False
) -> tuple[dict[str, Tensor], list[TokenGrid]]:
    """Return the operators' tensors for a model's grids and prefix tokens, and the other grids that they came from.

    Args:
        model: the model, whose operators give initial values to prefix tokens that the weights lack.
        weights: a state dict with operators.
        there: the prefix tokens of the weights, as `prefix_tokens` names them.
        gradients: as in `resize_operator`.

    Raises:
        RecipeError: the operators are of other layers or of another kind.
    """
    own = model.state_dict()
    _check_layers(_layers(weights), _layers(own))
    _check_kinds(model, weights)
    here = prefix_tokens(own)
    places = [there.index(token) if token in there else None for token in here]
    resized: dict[str, Tensor] = {}
    taken: dict[int, tuple[str, dict[str, Tensor]]] = {}
    others: list[TokenGrid] = []
    for prefix, operator in _operators(model):
        own_names = {name: name.removeprefix(prefix) for name in weights if name.startswith(prefix)}
        tensors = {short: weights[name] for name, short in own_names.items() if not short.startswith(_WRAPPED)}
        first, shared = taken.setdefault(id(operator), (prefix, tensors))
        if any(not torch.equal(shared[name], x) for name, x in tensors.items() if name in shared):
            raise RecipeError(
                f"the operators {first} and {prefix} differ in the weights, but attention.mode = universal has one; "
                "use attention.mode=blockwise"
            )
        try:
            new = square_grid(operator.num_tokens, len(here))
            old = square_grid(tokens_of(operator, tensors), len(there))
            tensors = resize_operator(operator, tensors, old, new, places, gradients)
        except ValueError as error:
            raise OtherModelError(
                f"{prefix.removesuffix('.')}: {error}; use the model and attention sections it was trained with"
            ) from error
        resized |= {prefix + name: x for name, x in tensors.items()}
        is_resized = (old.height, old.width) != (new.height, new.width)
        others += [old] if is_resized and old not in others else []
    return resized, others


def _operators(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield every block's operator with its parameters' prefix; a shared operator comes once for each block."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, AttentionHeads) and _token_axes(module):
            yield f"{name}.", module


def _layers(state: Mapping[str, Tensor]) -> set[str]:
    """Return the attention layers that have an operator."""
    return {name.partition(OPERATOR)[0] for name in state if OPERATOR in name}


def _check_layers(there: set[str], here: set[str]) -> None:
    for layers, what, model in ((here - there, "no operator", "has one"), (there - here, "an operator", "has none")):
        if layers:
            more = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
            raise OtherModelError(
                f"the weights have {what} for {min(layers)}{more}, but the model {model}; "
                "use the model.name, model.depth and attention.blocks they were trained with"
            )


def _check_kinds(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Check the keys of a recipe that show in the operators' names and numbers of heads."""
    own = model.state_dict()
    for layer in attention_layers(model):
        prefix, heads = f"{layer.name}{OPERATOR}", layer.attention.num_heads
        there, here = ({n: x for n, x in state.items() if n.startswith(prefix)} for state in (weights, own))
        if not here:
            continue
        for trained, built in zip(_keys(there, prefix, heads), _keys(here, prefix, heads), strict=True):
            if trained != built:
                raise RecipeError(
                    f"{prefix.removesuffix('.')} was trained with {trained}, but the recipe has {built}; use the "
                    "attention section it was trained with"
                )


def _keys(state: Mapping[str, Tensor], prefix: str, heads: int) -> tuple[str, ...]:
    """Return the keys of the recipe that an operator's parameters show, for a layer with `heads` heads."""
    names = [name.removeprefix(prefix) for name in state]
    own = {name.rpartition(".")[2] for name in names}
    residual, content, bounded, centred = (name in own for name in ("gate", "psi_constant", "tau_logit", "left"))
    # Softmax heads, a softmax part, psi, a bound, a constant part, and scores of 0 each wrap what is learned.
    others = max(name.count("operator.") for name in names) - residual - content - bounded - centred
    # The first axis of a parameter is always that of the heads.
    learned = next(x for name, x in state.items() if not name.endswith("operator.modes")).shape[:1].numel()
    softmax_heads = max(heads - learned, 0) if others else 0
    return (
        "attention.kind=centred" if centred else "another attention.kind than centred",
        "attention.residual=true or attention.kind=static_softmax"
        if residual
        else "attention.residual=false and no attention.kind=static_softmax",
        f"attention.softmax_heads={softmax_heads}",
        "attention.form=content" if content else "another attention.form than content",
        "a number as attention.bound" if bounded else "attention.bound=null",
        f"attention.scores={str(others == (softmax_heads > 0)).lower()}",
    )


# Keys of an operator that can differ while all parameters have the same names and shapes.
KEYS_OF_OPERATORS = ("basis", "form", "simplex", "base", "range", "grid", "degree", "bound", "blocks")
_FIX = "use the model and attention sections it was trained with"
_PATCHES = "patch_embed.proj.weight"
_POSITIONS = "pos_embed"


@torch.no_grad()
def take_weights(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    new_head: bool = True,
    attention: AttentionConfig | None = None,
    gradients: bool = False,
) -> str:
    """Copy weights into a model, in place, adapted to its image size and classes.

    Position embeddings, the patch embedding and the attention operators are interpolated. Prefix tokens that the model
    does not have are left out; those that only the model has keep their values. The operators of a KArAt model keep
    their values if the weights are a softmax model's. With `new_head`, so does a classifier for another number of
    classes.

    Args:
        model: a freshly initialised model, not partitioned.
        weights: a state dict of timm's or ours, by parameter name.
        new_head: True if the classes may differ; else the weights are of this model at another image size.
        attention: the attention that the weights were trained with; None, or softmax, if that is not known.
        gradients: as in `resize_operator`.

    Returns:
        A log line: what was interpolated, and what keeps its values.

    Raises:
        RecipeError: the weights are of another model; one line names the first parameter that differs.
    """
    own = model.state_dict()
    left = set()
    _check_axes(weights, own)
    _check_values(weights, own)
    there = prefix_tokens(weights)
    weights, notes = fit_prefix(model, weights)
    if _PATCHES in weights and _PATCHES in own:
        sides, ours = (" x ".join(map(str, state[_PATCHES].shape[2:])) for state in (weights, own))
        notes += [f"the patch embedding is resampled from {sides} pixels"] if sides and sides != ours else []
    weights = _fit(model, weights)
    _check_depth(weights, own)
    positions = getattr(model, _POSITIONS, None)
    is_fixed = isinstance(positions, nn.Parameter) and not positions.requires_grad
    if new_head and is_fixed and _POSITIONS in weights and not is_sincos_2d(weights[_POSITIONS]):
        notes.append("its position embedding is not the computed one, and stays as it is (model.pos_embed)")
    if any(OPERATOR in name for name in own):
        if any(OPERATOR in name for name in weights):
            if attention is None or not attention.learns or attention.mode == "universal":
                weights = spread_operator(model, weights)
            operators, grids = operators_for(model, weights, there, gradients)
            notes += [f"interpolated from {grid.height} x {grid.width} patches" for grid in grids]
            weights = {**weights, **operators}
        else:
            left |= {name for name in own if OPERATOR in name}
            notes.append("the attention operators keep their initial values, since the weights have none")
    heads = _classifiers(model)
    head = {name for name in {**own, **weights} if name.startswith(tuple(f"{head}." for head in heads))}
    bias = f"{heads[0]}.bias"
    classes = [len(w[bias]) if bias in w else 0 for w in (weights, own)]
    if new_head and classes[0] != classes[1]:
        left |= head
        weights = {name: tensor for name, tensor in weights.items() if name not in head}
        notes.append(f"the head is new: the weights have {classes[0]} classes, the model {classes[1]}")
    _check(weights, {name: tensor for name, tensor in own.items() if name not in left})
    for name, tensor in weights.items():
        own[name].copy_(tensor)
    return "; ".join(notes)


def _fit(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    try:
        return host_of(model).fit(weights, model)
    except Exception as error:  # timm's conversions expect complete weights, and can raise anything
        reason = one_line(error)
        raise OtherModelError(f"the weights cannot be adapted to a {type(model).__name__}: {reason}; {_FIX}") from error


def _classifiers(model: Any) -> list[str]:
    """Return the names of the layers that give logits; a distilled model has two."""
    found = model.get_classifier()
    layers = found if isinstance(found, tuple) else (found,)
    return [name for name, module in model.named_modules() if any(module is layer for layer in layers)]


def _check_axes(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Check that tensors to adapt have the expected axes; timm's old patch embeddings are matrices."""
    for name, tensor in own.items():
        axes = weights[name].dim() if name in weights else tensor.dim()
        if axes != tensor.dim() and not (name == _PATCHES and axes == 2):
            raise _other_shape(name, weights[name], tensor)


def _check_values(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    for name, tensor in weights.items():
        if name in own and own[name].is_floating_point() and not tensor.is_floating_point():
            raise RecipeError(f"{name} in the weights is {tensor.dtype}, not floating point; use other weights")
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise RecipeError(f"{name} in the weights has numbers that are not finite; use other weights")


def _check_depth(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    there, here = _blocks(weights), _blocks(own)
    if there and here and there != here and there == set(range(len(there))):
        raise RecipeError(
            f"the weights have {len(there)} blocks, the model has {len(here)}; use model.depth={len(there)}"
        )


def _blocks(state: Mapping[str, Tensor]) -> set[int]:
    """Return the numbers of a ViT's blocks."""
    return {int(found[1]) for found in map(re.compile(r"blocks\.(\d+)\.").match, state) if found}


def _check(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for names, what in ((expected.keys() - weights.keys(), "lack"), (weights.keys() - expected.keys(), "have")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            other = "which the model has" if what == "lack" else "which the model lacks"
            raise OtherModelError(f"the weights {what} {min(names)}{more}, {other}; {_FIX}")
    for name, tensor in expected.items():
        if weights[name].shape != tensor.shape:
            raise _other_shape(name, weights[name], tensor)


def _other_shape(name: str, there: Tensor, here: Tensor) -> OtherModelError:
    return OtherModelError(f"{name} is {list(there.shape)} in the weights and {list(here.shape)} in the model; {_FIX}")


def check_heads(there: ModelConfig, here: ModelConfig) -> None:
    """Raise RecipeError if weights of the same widths have another number of heads."""
    for theirs, ours in zip(layer_sizes(there), layer_sizes(here), strict=False):
        if theirs.heads != ours.heads:
            same_width = (there.name, there.embed_dim) == (here.name, here.embed_dim)
            fix = f"model.num_heads={theirs.heads}" if same_width else "the model section they were trained with"
            raise RecipeError(
                f"the weights are of {there.name} with {theirs.heads} heads per layer, the model has {ours.heads}; "
                f"use {fix}"
            )


def differences(there: tuple[ModelConfig, AttentionConfig], here: tuple[ModelConfig, AttentionConfig]) -> list[str]:
    """Return the differences in how the same parameters are used: `attention.base = silu in the weights, zero here`."""
    pairs: list[tuple[str, Any, Any]] = [("model.name", there[0].name, here[0].name)]
    rows = there[1].row, here[1].row
    if there[1].kind != here[1].kind and any(row is None or row.by_rows for row in rows):  # without parameters
        pairs += [("attention.kind", there[1].kind, here[1].kind)]
    if all(row is not None and row.by_rows for row in rows):
        pairs += [("attention.softmax_heads", there[1].softmax_heads, here[1].softmax_heads)]
    if (there[1].kind == here[1].kind and here[1].learns) or there[1].blocks != here[1].blocks:
        taken = [key for key in KEYS_OF_OPERATORS if key == "blocks" or rows[1] is None or key in rows[1].keys]
        pairs += [(f"attention.{key}", getattr(there[1], key), getattr(here[1], key)) for key in taken]
    return [
        f"{key} = {_text(theirs)} in the weights, {_text(ours)} here" for key, theirs, ours in pairs if theirs != ours
    ]


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
