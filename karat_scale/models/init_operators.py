"""Adapt the learned operators in other weights to a model's grid and prefix tokens."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from karat_scale.foundation.errors import RecipeError
from karat_scale.models.interpolate import Resizable, TokenGrid, resize_operator, square_grid, tokens_of
from karat_scale.models.layers import attention_layers
from karat_scale.models.prefix_tokens import places_of, prefix_tokens

OPERATOR = ".operator."


def spread_operator(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights with an operator for each layer, if they hold one for all layers.

    A folder of `karat export` stores shared operators once.
    """
    there, here = _layers(weights), _layers(model.state_dict())
    if len(there) != 1 or not there <= here:
        return dict(weights)
    stored = f"{min(there)}{OPERATOR}"
    shared = {name.removeprefix(stored): x for name, x in weights.items() if name.startswith(stored)}
    return {**weights, **{f"{layer}{OPERATOR}{name}": x for layer in here for name, x in shared.items()}}


def operators_for(
    model: nn.Module, weights: Mapping[str, Tensor], there: Sequence[str]
) -> tuple[dict[str, Tensor], list[TokenGrid]]:
    """Return the operators' tensors for a model's grids and prefix tokens, and the other grids that they came from.

    Args:
        model: its operators give the initial values of prefix tokens that only it has.
        weights: a state dict with operators.
        there: the prefix tokens of the weights, as `prefix_tokens` names them.

    Raises:
        RecipeError: the operators are of other layers or of another kind.
    """
    own = model.state_dict()
    _check_layers(_layers(weights), _layers(own))
    _check_kinds(model, weights)
    here = prefix_tokens(own)
    places = places_of(here, there)
    resized: dict[str, Tensor] = {}
    taken: dict[int, tuple[str, dict[str, Tensor]]] = {}
    others: list[TokenGrid] = []
    for prefix, operator in _operators(model):
        tensors = {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}
        first, shared = taken.setdefault(id(operator), (prefix, tensors))
        if any(not torch.equal(shared[name], x) for name, x in tensors.items() if name in shared):
            raise RecipeError(
                f"{first} and {prefix} differ in the weights, but the model has one (attention.mode = universal); "
                "use attention.mode=blockwise"
            )
        try:
            new = square_grid(operator.num_tokens, len(here))
            old = square_grid(tokens_of(operator, tensors), len(there))
            tensors = resize_operator(operator, tensors, old, new, places)
        except ValueError as error:
            raise RecipeError(
                f"{prefix.removesuffix('.')}: {error}; use the model and attention sections it was trained with"
            ) from error
        resized |= {prefix + name: x for name, x in tensors.items()}
        is_resized = (old.height, old.width) != (new.height, new.width)
        others += [old] if is_resized and old not in others else []
    return resized, others


def _operators(model: nn.Module) -> Iterator[tuple[str, Resizable]]:
    """Yield every block's operator with its parameters' prefix; a shared operator comes once for each block."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Resizable):
            yield f"{name}.", module


def _layers(state: Mapping[str, Tensor]) -> set[str]:
    """Return the attention layers that have an operator."""
    return {name.partition(OPERATOR)[0] for name in state if OPERATOR in name}


def _check_layers(there: set[str], here: set[str]) -> None:
    for layers, what, model in ((here - there, "no operator", "has one"), (there - here, "an operator", "has none")):
        if layers:
            more = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
            raise RecipeError(
                f"the weights have {what} for {min(layers)}{more}, but the model {model}; "
                "use the model.name and model.depth they were trained with"
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
                    f"{prefix.removesuffix('.')} was trained with {trained}, but the recipe differs; use that"
                )


def _keys(state: Mapping[str, Tensor], prefix: str, heads: int) -> tuple[str, ...]:
    """Return the keys of the recipe that an operator's parameters show, of a layer with this many heads."""
    names = [name.removeprefix(prefix) for name in state]
    residual, content = (any(name.rpartition(".")[2] == own for name in names) for own in ("gate", "psi_constant"))
    # Softmax heads, a softmax part, psi, and scores of 0 each wrap what is learned.
    others = max(name.count("operator.") for name in names) - residual - content
    # The first axis of a parameter is always that of the heads.
    learned = next(x for name, x in state.items() if not name.endswith("operator.modes")).shape[:1].numel()
    softmax_heads = max(heads - learned, 0) if others else 0
    return (
        f"attention.residual={str(residual).lower()}",
        f"attention.softmax_heads={softmax_heads}",
        "attention.form=content" if content else "another attention.form than content",
        f"attention.scores={str(others == (softmax_heads > 0)).lower()}",
    )
