"""The learned operators of a model: how they are made from the recipe, put into layers, and found again.

The recipe's `attention` section says what replaces softmax in a layer. Where the constructor of a model in timm takes
no attention class, the layers of the built model are converted. Parameters are listed by block.
"""

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from karat_scale.attention import FourierKaratOperator, HybridHeads, KaratOperator, ResidualHeads, make_basis
from karat_scale.attention.bound import BoundedHeads
from karat_scale.attention.functional import KERNELS_OF
from karat_scale.attention.operator import AttentionHeads, LayerCall
from karat_scale.attention.variants import ContentOperator, SmoothOperator, WithoutScores
from karat_scale.foundation.console import plural
from karat_scale.foundation.errors import RecipeError
from karat_scale.foundation.tables import ATTENTIONS, load, load_class
from karat_scale.models.layers import BIASED, LayerSize, attention_layers, cannot_be_built, refuse_dropout
from karat_scale.recipe import AttentionConfig, ModelConfig
from karat_scale.recipe.attention import OF_EACH_CLASS


def operators(model: nn.Module) -> list[KaratOperator | None]:
    """Return each attention layer's operator with functions phi; None if it has none.

    In universal mode they are all the same object. For `smooth` heads it is a plain operator with a copy of their
    functions.
    """
    return [operator_of(layer.attention) for layer in attention_layers(model)]


def operator_of(attention: nn.Module) -> KaratOperator | None:
    """Return the operator with functions phi of an attention layer, also if it is combined with something else."""
    found: Any = heads_of(attention)
    while found is not None and not isinstance(found, KaratOperator):
        found = found.plain() if isinstance(found, SmoothOperator) else getattr(found, "operator", None)
    operator: KaratOperator | None = found
    return operator


def heads_of(attention: nn.Module) -> AttentionHeads | None:
    """Return the learned heads of an attention layer, also if combined with softmax; None for plain softmax."""
    found: Any = getattr(attention, "operator", None)
    while isinstance(found, HybridHeads | ResidualHeads):
        found = found.operator
    heads: AttentionHeads | None = found
    return heads


def check_implementation(model: nn.Module, device: torch.device) -> None:
    """Raise RecipeError if the recipe's implementation of attention cannot run on a device."""
    for operator, layer in _operators_and_layers(model, device):
        if (why := operator.refusal(layer)) is not None:
            raise RecipeError(
                f"attention.implementation = {operator.implementation} cannot run here: {why}; "
                "use attention.implementation=auto"
            )


def describe_implementation(model: nn.Module, device: torch.device) -> str | None:
    """Return a line on the implementation by which learned attention runs on a device, and why not by a faster one.

    It is None if no layer is learned. `check_implementation` must have passed.
    """
    layers = Counter(operator.chosen(layer) for operator, layer in _operators_and_layers(model, device))
    if not layers:
        return None
    parts = [
        f"{plural(count, 'learned layer')}, implementation {name}"
        + (f" ({KERNELS_OF[device.type]} cannot: {why})" if why else "")
        for (name, why), count in layers.items()
    ]
    return f"attention: {'; '.join(parts)}"


def _operators_and_layers(model: nn.Module, device: torch.device) -> Iterator[tuple[AttentionHeads, LayerCall]]:
    """Yield the learned heads of each attention layer that has some, and the layer's call of them."""
    for layer in attention_layers(model):
        if (operator := heads_of(layer.attention)) is not None:
            width = round(layer.attention.scale**-2)  # d: timm scales scores by d^-1/2
            biased, masked = isinstance(layer.attention, BIASED), getattr(layer.block, "attn_mask", None) is not None
            yield operator, LayerCall(width, device, biased, masked)


def gates(model: nn.Module) -> list[nn.Parameter | None]:
    """Return each layer's gates [h] of residual attention; None for other layers."""
    layers = attention_layers(model)
    found = [[m for m in layer.attention.modules() if isinstance(m, ResidualHeads)] for layer in layers]
    return [residual[0].gate if residual else None for residual in found]


def head_parameters(model: nn.Module) -> Iterator[tuple[str, int, nn.Parameter]]:
    """Yield (name, block, parameter [h, ...]) of all parameters that attention learns by head; the projector is "W".

    A universal operator counts as that of block 0.
    """
    seen: set[int] = set()
    for block, layer in enumerate(attention_layers(model)):
        heads = heads_of(layer.attention)
        if heads is None or id(heads) in seen:
            continue
        seen.add(id(heads))
        for path, parameter in heads.named_parameters():
            name = path.rpartition(".")[2]
            yield "W" if name == "proj" else name, block, parameter


def operator_maker(attention: AttentionConfig) -> Callable[[int, int, int], nn.Module]:
    """Return a function that makes the operator of a layer with N tokens and h heads of width d, given as (N, h, d).

    Blockwise (B): a new one each time. Universal (U): all layers of the same N, h and d share one, so its
    parameters are counted and stepped once (paper, the modular operator).

    Raises:
        RecipeError: the basis cannot be built. The returned function raises it if the operator cannot be built.
    """
    try:
        make_heads = _karat_maker(attention) if attention.kind == "karat" else _maker_of_kind(attention)
    except ValueError as error:
        raise RecipeError(f"attention.{error}") from error
    own_gate = None if attention.row is None else attention.row.gate
    gate = 0.0 if attention.residual else own_gate

    def make(num_tokens: int, num_heads: int, width: int) -> nn.Module:
        softmax_heads = attention.softmax_heads
        if softmax_heads >= num_heads:
            none = f"attention.softmax_heads = {softmax_heads} leaves none of {num_heads} heads for KArAt"
            raise RecipeError(f"{none}; set at most {num_heads - 1}")
        try:
            operator = make_heads(num_tokens, num_heads - softmax_heads, width, width * num_heads)
        except ValueError as error:
            raise RecipeError(f"attention.{error}") from error
        if attention.bound is not None and attention.has_functions:
            operator = BoundedHeads(operator, attention.bound)
        learned: AttentionHeads | ResidualHeads = operator if gate is None else ResidualHeads(operator, gate)
        return HybridHeads(learned, softmax_heads) if softmax_heads else learned

    return functools.cache(make) if attention.mode == "universal" else make


# Makes heads for N tokens, h heads that learn, their width d, and the model's width D.
_Maker = Callable[[int, int, int, int], AttentionHeads]


def _maker_of_kind(attention: AttentionConfig) -> _Maker:
    """Return a maker of a kind's class, with the sizes and the recipe's settings that its constructor names.

    This function and the maker raise ValueError if there is no such class, or if it refuses these arguments.
    """
    kind = attention.kind
    of_user = kind not in ATTENTIONS
    built: Any = load_class("kind", kind, AttentionHeads) if of_user else load(ATTENTIONS[kind].place)
    taken = inspect.signature(built).parameters
    if of_user:
        try:
            attention.refuse_keys([*taken, *OF_EACH_CLASS])
        except ValueError as error:
            raise ValueError(str(error).removeprefix("attention.")) from None
        inputs = ["query", "key", "value", "bias", "mask", *(["x"] if built.sees_input else [])]
        try:
            inspect.signature(built.forward).bind(None, *inputs[:3], **dict.fromkeys(inputs[3:]))
        except TypeError as error:
            told = f"its forward must take {', '.join(inputs)} by these names, and here: {error}"
            raise ValueError(f"kind = {kind!r}: {told}") from error

    def make(num_tokens: int, num_heads: int, width: int, embed_dim: int) -> AttentionHeads:
        sizes = {"num_tokens": num_tokens, "num_heads": num_heads, "width": width, "embed_dim": embed_dim}
        known = {**dict(attention), **sizes}
        try:
            heads: AttentionHeads = built(**{name: value for name, value in known.items() if name in taken})
        except TypeError as error:
            raise ValueError(f"kind = {kind!r}: cannot be built: {error}") from error
        for name in ("num_heads", *(["num_tokens"] if heads.token_axes else [])):
            if getattr(heads, name, None) != sizes[name]:
                raise ValueError(f"kind = {kind!r}: its constructor must set self.{name}, here to {sizes[name]}")
        if of_user:
            for name, parameter in heads.named_parameters():
                if parameter.shape[:1] != (num_heads,):
                    told = f"the first axis of its parameter {name} {[*parameter.shape]} must be the {num_heads} heads"
                    raise ValueError(f"kind = {kind!r}: {told}")
            heads.register_forward_hook(functools.partial(_check_output, kind))
        return heads

    return make


def _check_output(kind: str, _: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    """Raise RecipeError unless the output of a user's class has the shape of its input value, [B, h, N, d]."""
    shape, right = getattr(output, "shape", None), inputs[2].shape
    if shape != right:
        found = f"a {type(output).__name__}" if shape is None else list(shape)
        raise RecipeError(f"attention.kind = {kind!r}: its forward returned {found}, not [B, h, N, d] = {list(right)}")


def _karat_maker(attention: AttentionConfig) -> _Maker:
    settings = {name: getattr(attention, name) for name in ("grid", "degree", "range", "orders", "gains")}
    basis = make_basis(attention.basis, **settings)

    def make(num_tokens: int, num_heads: int, *_: int) -> AttentionHeads:
        named: dict[str, Any] = {name: getattr(attention, name) for name in ("rank", "implementation")}
        named |= {"num_tokens": num_tokens, "num_heads": num_heads}
        operator: AttentionHeads
        if attention.form == "smooth":
            operator = SmoothOperator(**named, grid=attention.grid, modes=attention.modes)
        else:
            named |= {"base": attention.base, "init": attention.init}
            if attention.is_modular_series:
                operator = FourierKaratOperator(**named, grid=attention.grid, gains=attention.gains)
                operator = ContentOperator(operator) if attention.form == "content" else operator
            else:
                operator = KaratOperator(**named, basis=basis, form=attention.form, simplex=attention.simplex)
        return operator if attention.scores else WithoutScores(operator)

    return make


Classes = Mapping[type[nn.Module], type[nn.Module]]
"""The classes of timm's attention layers, and of the learned layers in their places."""


def learn(
    network: nn.Module, model: ModelConfig, attention: AttentionConfig, sizes: tuple[LayerSize, ...], classes: Classes
) -> nn.Module:
    """Give an `operator` to each attention layer whose class is in `classes`, and set its class to the one there.

    Other layers and all parameters do not change. `sizes` are those of all the model's layers.

    Raises:
        RecipeError: a layer has too few heads or dropout of its attention matrix, layers that would share an operator
            differ in size or settings, or a block cannot be what `attention.blocks` says.
    """
    layers = [layer.attention for layer in attention_layers(network)]
    _check_blocks(attention, model, [type(layer) in classes for layer in layers])
    groups: list[tuple[AttentionConfig, list[tuple[Any, LayerSize]]]] = []
    for number, (layer, size) in enumerate(zip(layers, sizes, strict=True)):
        section = attention.of_block(number)
        if type(layer) not in classes or section.kind == "softmax":
            continue
        if not any(section == known for known, _ in groups):
            groups.append((section, []))
        next(turned for known, turned in groups if section == known).append((layer, size))
    if attention.mode == "universal" and len(groups) > 1:
        raise RecipeError(
            "attention.mode = universal: all blocks share one operator, but attention.blocks gives them "
            f"{len(groups)} different ones; use attention.mode=blockwise"
        )
    made = [operator for section, turned in groups for operator in _operators_of(model, section, turned)]
    learning = [layer for _, turned in groups for layer, _ in turned]
    for layer, operator in zip(learning, made, strict=True):  # only now, as some section may have been refused
        # A new class, as in torch's parametrizations: names and weights stay timm's.
        layer.__class__ = classes[type(layer)]
        layer.operator = operator
    return network


def _check_blocks(attention: AttentionConfig, model: ModelConfig, can_learn: Sequence[bool]) -> None:
    """Raise RecipeError for a range of blocks that the model does not have, or that cannot learn their attention."""
    for text, numbers, section in attention.ranges():
        if numbers[-1] >= len(can_learn):
            last = len(can_learn) - 1
            raise RecipeError(f"attention.blocks.{text}: {model.name} has the blocks 0 to {last}; name some of those")
        stuck = [number for number in numbers if not can_learn[number]]
        if stuck and section.kind != "softmax":
            able = [str(number) for number, can in enumerate(can_learn) if can]
            raise RecipeError(
                f"attention.blocks.{text}: block {stuck[0]} of {model.name} keeps its own attention; only "
                f"{', '.join(able)} can have another"
            )


def _operators_of(
    model: ModelConfig, attention: AttentionConfig, turned: Sequence[tuple[Any, LayerSize]]
) -> list[nn.Module]:
    """Return the operators of the layers of one section."""
    shapes = {(size.tokens, size.heads) for _, size in turned}
    if attention.mode == "universal" and len(shapes) > 1:
        raise RecipeError(
            f"attention.mode = universal: the layers of {model.name} differ in tokens or heads and cannot share "
            "functions; use attention.mode=blockwise"
        )
    fewest = min(heads for _, heads in shapes)
    if attention.softmax_heads >= fewest:
        raise RecipeError(
            f"attention.softmax_heads = {attention.softmax_heads} leaves no head for KArAt in a layer of {model.name} "
            f"with {fewest} heads; use fewer"
        )
    make = operator_maker(attention)
    try:
        for layer, _ in turned:
            refuse_dropout(layer)
        return [make(size.tokens, size.heads, size.width) for _, size in turned]
    except ValueError as error:
        raise cannot_be_built(model, error) from error
