"""The families of timm models that can use KArAt, each a `Host`: how a model is built, which layers become KArAt.

Plain ViTs, ConViT, Swin, and all others with timm's own attention, such as PiT or MobileViT.

ConViT has KArAt in its last blocks, which are plain self-attention. The gated positional blocks do not change (paper,
4). The class token joins the patches after the gated blocks, so the two kinds see P and P + 1 tokens.

Swin has KArAt in the window attention of every block; each window is a set of N tokens (paper, 4). Scores include the
relative position bias. A shifted window can hold patches from two sides of the image, which do not see each other: a
masked pair (k, q) adds nothing to H[k, :] and has S[k, q] = 0. If a stage's grid is smaller than the window, the window
shrinks to it, so N can differ between blocks.
"""

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar

import timm
import torch
from timm.layers import Attention, PatchEmbed, resample_abs_pos_embed
from timm.models import VisionTransformer, swin_transformer, vision_transformer
from timm.models.convit import GPSA, MHSA
from timm.models.naflexvit import NaFlexVit
from timm.models.pit import ConvEmbedding
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn
from torch.nn.functional import embedding, interpolate
from torch.overrides import TorchFunctionMode

from karat_scale.attention.operator import layer_input
from karat_scale.foundation.errors import RecipeError, nearest
from karat_scale.models import layers
from karat_scale.models.operators import learn, operator_maker
from karat_scale.recipe import AttentionConfig, ModelConfig
from karat_scale.recipe.schema import fitting

# Attention that pools patches into the classifier's input once, after all blocks, so it is not between tokens.
_POOLS = ("AttentionPoolLatent", "AttentionPool2d")


class Host:
    """A family of models; a subclass defines what differs from timm's build and from timm's names of weights."""

    blocks_are_alike = False
    """Whether all attention layers of a model have the same size."""
    classes: ClassVar[dict[type[nn.Module], type[nn.Module]]] = {}
    """The classes of timm's attention layers, and those of the learned layers in their places."""

    def build(self, model: ModelConfig, **options: Any) -> nn.Module:
        """Return timm's model for a recipe's `model` section and timm's options."""
        raise NotImplementedError

    def learn(
        self, model: ModelConfig, attention: AttentionConfig, sizes: tuple[layers.LayerSize, ...], **options: Any
    ) -> nn.Module:
        """Return the model with KArAt where it is supported; `sizes` are those of all attention layers."""
        return learn(self.build(model, **options), model, attention, sizes, self.classes)

    def fit(self, weights: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
        """Adapt a state dict of this model at another image size, or from another library, to the model's names."""
        return dict(weights)

    def softmax(self, model: ModelConfig, **options: Any) -> nn.Module:
        """Return timm's own model.

        Raises:
            RecipeError: it cannot be built at these sizes, or its attention is not supported.
        """
        network = self.build(model, **options)
        check_attention(network, model)
        _check_patches(network, model)
        return network

    @functools.cache  # noqa: B019  # hosts are few and live as long as the program
    def sizes(self, model: ModelConfig, **options: Any) -> tuple[layers.LayerSize, ...]:
        """Return the sizes of the model's attention layers. Raises like `softmax`."""
        if self.blocks_are_alike and model.depth and model.depth > 1:
            return self.sizes(model.changed(depth=1), **options) * model.depth
        with shapes_alone():
            network = self.softmax(model, **options).eval()
            try:
                return layers.measure_layers(network, model.image_size)
            except (AssertionError, RuntimeError, ValueError) as error:
                raise layers.cannot_be_built(model, error) from error


@contextmanager
def shapes_alone() -> Iterator[None]:
    """Build models on the meta device, and skip the operations that give their tensors values."""
    with torch.device("meta"), _WithoutValues():
        yield


class _WithoutValues(TorchFunctionMode):
    """Skips in-place operations on the meta device, where torch works out each one in Python."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FILLS and args[0].is_meta and not any(isinstance(other, Tensor) for other in args[1:]):
            return args[0]
        return func(*args, **(kwargs or {}))


_FILLS = {
    getattr(Tensor, f"{name}_") for name in ("add", "clamp", "erfinv", "fill", "mul", "normal", "uniform", "zero")
}


def usual_settings(model: ModelConfig) -> dict[str, Any]:
    """Return timm's arguments for the recipe's image size and drop rates."""
    return {"img_size": model.image_size, "drop_path_rate": model.drop_path, "proj_drop_rate": model.proj_drop}


def build_timm(model: ModelConfig, name: str, **settings: Any) -> nn.Module:
    """Return timm's model `name`, freshly initialised; the number of classes is the recipe's unless `settings` has one.

    Raises:
        RecipeError: timm cannot build it.
    """
    try:
        network: nn.Module = timm.create_model(name, pretrained=False, **{"num_classes": model.num_classes, **settings})
        return network
    except (AssertionError, TypeError, ValueError, RuntimeError) as error:
        raise layers.cannot_be_built(model, error) from error


def refuse_fields(model: ModelConfig, *fields: str, why: str) -> None:
    """Raise RecipeError if the recipe sets a key that this host's models do not support."""
    for field in fields:
        if (value := getattr(model, field)) is not None:
            raise RecipeError(f"model.{field} = {value} is not supported by {model.name}, {why}; remove it")


def check_attention(network: nn.Module, model: ModelConfig) -> None:
    """Raise RecipeError unless all of the model's attention can be replaced."""
    if getattr(network, "dynamic_img_size", False) or isinstance(network, NaFlexVit):
        raise RecipeError(
            f"model.name = {model.name!r} accepts images of any size, but KArAt needs a fixed number of tokens; use a "
            "model of one size, such as vit_small_patch16_224"
        )
    known = {id(layer.attention) for layer in layers.attention_layers(network)}
    others = {
        f"{type(module).__module__.rpartition('.')[2]}.{type(module).__name__}"
        for module in network.modules()
        if id(module) not in known
        and (isinstance(module, layers.KNOWN) or re.search(r"Attention|Attn", type(module).__name__))
        and type(module).__name__ not in _POOLS
    }
    if others or not known:
        what = "it has no attention that KArAt can replace"
        if others:
            what = f"its attention, {min(others)}, cannot be replaced with KArAt"
        raise RecipeError(
            f"model.name = {model.name!r}: {what}; use a model with timm's "
            "own Attention in each block, a convit_* or a swin_* (docs/models.md)"
        )


def _check_patches(network: Any, model: ModelConfig) -> None:
    """Check that patches tile the image: pixels beyond the last whole patch would be dropped silently."""
    embed = getattr(network, "patch_embed", None)
    if isinstance(embed, ConvEmbedding):  # of PiT, whose patches overlap
        (side, *_), (step, *_) = embed.conv.kernel_size, embed.conv.stride
        if rest := (model.image_size - side) % step:
            raise RecipeError(
                f"model.image_size = {model.image_size} does not fit {model.name}'s patches, {side} pixels wide, "
                f"{step} apart; use {model.image_size - rest}"
            )
    if isinstance(embed, PatchEmbed) and model.image_size % embed.patch_size[0]:
        side = embed.patch_size[0]
        nearest = max(model.image_size // side, 1) * side
        raise RecipeError(
            f"model.image_size = {model.image_size} is not a multiple of the patch size of {model.name}, {side}; "
            f"use {nearest}"
        )


# Our own small models, by name: their changes to timm's ViT-Tiny.
VIT_BASE = "vit_tiny_patch16_224"
VIT_SIZES: dict[str, dict[str, int]] = {
    "vit_mini_patch4_28": {"patch_size": 4, "embed_dim": 128, "depth": 4, "num_heads": 2},
}
# Makes the operator of a layer, given the number and width of its heads, for the model that is being built. A separate
# class for each model would do it too, but pickle could not find that class.
_MAKE_OPERATOR: ContextVar[Callable[[int, int], nn.Module]] = ContextVar("make_operator")


class KaratAttention(Attention):
    """timm's attention layer with softmax(A) V replaced by a learnable operator on the rows of A.

    timm calls this class with its own arguments while `Vit` builds a model.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        layers.refuse_dropout(self)
        self.operator = _MAKE_OPERATOR.get()(self.num_heads, self.head_dim)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Compute attention on tokens [B, N, D].

        A boolean `attn_mask` keeps pairs. A float one is added to scores; as in PyTorch, -inf keeps a pair out.
        """
        if is_causal:
            raise ValueError("is_causal is not supported: KArAt is tied to the positions of image tokens")
        query, key, value = query_key_value(self, x)
        bias, mask = None, attn_mask
        if attn_mask is not None and attn_mask.dtype != torch.bool:
            bias, mask = attn_mask, ~attn_mask.isneginf()
        out = self.operator(query, key, value, bias=bias, mask=mask, **layer_input(self.operator, x))
        return join_heads(self, x, out)


def query_key_value(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value [B, h, N, d] of a layer with one product for all three, for tokens [B, N, D].

    Query and key are normed if the layer has norms for them, and have the value's dtype.
    """
    qkv: Tensor = attention.qkv(x)
    query, key, value = qkv.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    if isinstance(attention, Attention):
        # CUDA's autocast, unlike a CPU's, norms in float32; scores of wider queries would take slower products.
        query, key = (normed.to(value.dtype) for normed in (attention.q_norm(query), attention.k_norm(key)))
    return query, key, value


def join_heads(attention: Attention, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Return tokens [B, N, D] from the heads' outputs [B, h, N, d], as timm's attention layer of input x does."""
    out = attention.norm(out.transpose(1, 2).reshape(*x.shape[:2], attention.attn_dim))
    if attention.gate is not None:
        out = out * attention.gate(x).sigmoid()
    tokens: torch.Tensor = attention.proj_drop(attention.proj(out))
    return tokens


def num_tokens(model: VisionTransformer) -> int:
    """N: patches, class token and registers."""
    return int(model.patch_embed.num_patches + model.num_prefix_tokens)


def build_vit(model: ModelConfig, attn_layer: type[Attention] | None = None, **options: Any) -> nn.Module:
    """Return a timm ViT of the recipe's size, with layers of class `attn_layer` if given, and timm's `options`.

    Raises:
        RecipeError: timm cannot build the model at these sizes.
    """
    own = VIT_SIZES.get(model.name, {})
    asked = {name: getattr(model, name) for name in ("patch_size", "embed_dim", "depth", "num_heads")}
    settings: dict[str, Any] = {**own, **{name: value for name, value in asked.items() if value is not None}}
    if model.weight_init == "jax":
        settings["weight_init"] = "jax"
    if model.pool is not None:
        # The average of normed patches, as in arXiv 2205.01580; timm's default is the norm of their average.
        settings |= {"global_pool": model.pool, "class_token": model.pool == "token", "fc_norm": False}
    if attn_layer is not None:
        settings["attn_layer"] = attn_layer
    name = VIT_BASE if own else model.name
    try:
        network = build_timm(model, name, **usual_settings(model), **{**settings, **options})
    except RecipeError:
        if model.num_heads is not None or model.embed_dim is not None:
            with torch.device("meta"):
                plain: Any = timm.create_model(name)
            heads = next(module.num_heads for module in plain.modules() if hasattr(module, "num_heads"))
            _refuse_remainder(model, settings.get("embed_dim", plain.embed_dim), settings.get("num_heads", heads))
        raise
    try:
        _start(network, model)
    except ValueError as error:
        raise layers.cannot_be_built(model, error) from error
    return network


def _refuse_remainder(model: ModelConfig, width: int, heads: int) -> None:
    """Raise RecipeError if the heads do not divide the width; the recipe sets one of the two."""
    if width % heads == 0:
        return
    near, fits = fitting(heads, width)
    if model.num_heads is None:
        raise RecipeError(
            f"model.embed_dim = {width} is not a multiple of the {heads} heads of {model.name}; set "
            f"model.embed_dim={fits}, or model.num_heads too"
        )
    raise RecipeError(f"model.num_heads = {heads} does not divide the width {width} of {model.name}; use {near}")


@torch.no_grad()
def _start(network: Any, model: ModelConfig) -> None:
    """Apply settings without an option in timm to a new model. Raises ValueError if they are not supported."""
    if model.weight_init == "jax":
        for module in network.modules():
            if isinstance(module, Attention) and hasattr(module, "qkv"):  # three matrices in JAX, one in timm
                for matrix in module.qkv.weight.chunk(3):
                    nn.init.xavier_uniform_(matrix)
    if model.weight_init == "mimetic":
        for module in network.modules():
            if isinstance(module, Attention):
                _mimic_trained(module)
    positions = getattr(network, "pos_embed", None)
    if model.pos_embed == "sincos2d" and positions is None:
        raise ValueError("it has no position embedding for pos_embed = sincos2d")
    if positions is not None and (model.pos_embed == "sincos2d" or model.weight_init == "mimetic"):
        height, width = network.patch_embed.grid_size
        grid = layers.sincos_2d(height, width, network.embed_dim)
        prefix = grid.new_zeros(positions.shape[1] - len(grid), network.embed_dim)
        positions.copy_(torch.cat([prefix, grid])[None]).requires_grad_(model.pos_embed is None)


def _mimic_trained(attention: Any) -> None:
    """Give an attention layer of timm's, or a student's, the initial values of arXiv 2305.09828, in place.

    With Z ~ N(0, 1 / D), drawn anew for each product: W_q W_k^T = 0.7 Z + 0.7 I for each head, as far as its width
    allows, and W_v W_proj = 0.4 Z - 0.4 I for all heads together. Matrices act on row vectors here; torch's weights are
    transposed.
    """
    width, inner = attention.proj.weight.shape
    if hasattr(attention, "qkv"):
        queries, keys, value = attention.qkv.weight.split(inner)
        heads = attention.num_heads
        for query, key in zip(queries.chunk(heads), keys.chunk(heads), strict=True):
            left, right = _factors(0.7, 0.7, width, len(query))
            query.copy_(left.mT)
            key.copy_(right)
    else:  # attention transfer
        value = attention.value.weight
    left, right = _factors(0.4, -0.4, width, inner)
    value.copy_(left.mT)
    attention.proj.weight.copy_(right.mT)


def _factors(noise: float, identity: float, width: int, rank: int) -> tuple[Tensor, Tensor]:
    """L [D, rank] and R [rank, D], whose product is the best approximation of this rank to noise Z + identity I."""
    wanted = noise * torch.randn(width, width) / width**0.5 + identity * torch.eye(width)
    left, values, right = torch.linalg.svd(wanted)
    share = values[:rank].sqrt()
    return left[:, :rank] * share, share[:, None] * right[:rank]


class Vit(Host):
    """timm's plain ViTs; the layers of class `KaratAttention` are made while timm builds the model."""

    blocks_are_alike = True
    classes: ClassVar = {Attention: KaratAttention}

    def build(self, model: ModelConfig, **options: Any) -> nn.Module:
        """See `build_vit`."""
        return build_vit(model, **options)

    def learn(
        self, model: ModelConfig, attention: AttentionConfig, sizes: tuple[layers.LayerSize, ...], **options: Any
    ) -> nn.Module:
        """See `Host`. If blocks differ, layers are converted as in other models."""
        if attention.blocks:
            return super().learn(model, attention, sizes, **options)
        token = _MAKE_OPERATOR.set(functools.partial(operator_maker(attention), sizes[0].tokens))
        try:
            return build_vit(model, KaratAttention, **options)
        finally:
            _MAKE_OPERATOR.reset(token)

    def fit(self, weights: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
        """See `Host`."""
        fitted: dict[str, Tensor] = vision_transformer.checkpoint_filter_fn(
            dict(weights), model, adapt_layer_scale=True
        )
        return fitted


# timm's models have 12 blocks, of which 10 are gated.
PLAIN_BLOCKS = 2


class KaratMHSA(MHSA):
    """ConViT's plain attention layer with softmax(A) V replaced by a learnable operator on the rows of A."""

    operator: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Compute attention: tokens [B, N, D] to tokens [B, N, D]."""
        query, key, value = query_key_value(self, x)
        out: Tensor = self.operator(query, key, value, **layer_input(self.operator, x))
        tokens: Tensor = self.proj_drop(self.proj(out.transpose(1, 2).reshape(x.shape)))
        return tokens


class Convit(Host):
    """timm's ConViTs: the plain layers, which are last, become KArAt."""

    classes: ClassVar = {MHSA: KaratMHSA}

    def build(self, model: ModelConfig, **options: Any) -> nn.Module:
        """See `Host`."""
        sizes: dict[str, Any] = {} if model.patch_size is None else {"patch_size": model.patch_size}
        if model.depth is not None:
            if model.depth <= PLAIN_BLOCKS:
                raise RecipeError(
                    f"model.depth = {model.depth} leaves {model.name} no gated block before its {PLAIN_BLOCKS} plain "
                    f"ones; use at least {PLAIN_BLOCKS + 1}"
                )
            sizes |= {"depth": model.depth, "local_up_to_layer": model.depth - PLAIN_BLOCKS}
        if model.num_heads is not None or model.embed_dim is not None:
            with torch.device("meta"):
                own: Any = timm.create_model(model.name)
            heads = model.num_heads or own.blocks[0].attn.num_heads
            width = model.embed_dim or own.embed_dim
            _refuse_remainder(model, width, heads)
            sizes |= {"num_heads": heads, "embed_dim": width // heads}  # timm's is the width of a head
        network = build_timm(model, model.name, **usual_settings(model), **sizes, **options)
        for layer in layers.attention_layers(network):
            # Else it is made in the first forward pass, in whatever mode that runs.
            if isinstance(layer.attention, GPSA):
                index = layer.attention.get_rel_indices(network.num_patches)  # type: ignore[arg-type]  # an int
                del layer.attention.rel_indices  # a plain attribute in older versions, so it would not move to a GPU
                layer.attention.register_buffer("rel_indices", index, persistent=False)
        return network

    def fit(self, weights: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
        """See `Host`."""
        fitted = dict(weights)
        if "pos_embed" in fitted:  # of the patches only
            fitted["pos_embed"] = resample_abs_pos_embed(
                fitted["pos_embed"], new_size=model.patch_embed.grid_size, num_prefix_tokens=0
            )
        return fitted


# Our own small Swins, by name: their changes to timm's Swin-Tiny.
SWIN_BASE = "swin_tiny_patch4_window7_224"
SWIN_SIZES: dict[str, dict[str, Any]] = {
    "swin_mini_patch2_window4_32": {
        "patch_size": 2,
        "window_size": 4,
        "embed_dim": 32,
        "depths": (2, 2),
        "num_heads": (2, 4),
    },
}


class SteadyWindowAttention(WindowAttention):
    """timm's attention layer of Swin, whose gradients have the same bits each time on a CPU with several threads."""

    def _get_rel_pos_bias(self) -> Tensor:
        """The bias [1, h, N, N]. The backward pass of timm's, which indexes the table, adds in no fixed order."""
        index: Any = self.relative_position_index
        return embedding(index, self.relative_position_bias_table).permute(2, 0, 1).contiguous().unsqueeze(0)


class KaratWindowAttention(SteadyWindowAttention):
    """Swin's attention layer with softmax(A) V replaced by a learnable operator on the rows of A, bias included."""

    operator: nn.Module

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compute attention on windows [windows B, N, C]; mask [windows, N, N] is 0 for pairs that take part."""
        query, key, value, bias, keep = parts_of(self, x, mask)
        out: Tensor = self.operator(query, key, value, bias=bias, mask=keep, **layer_input(self.operator, x))
        tokens: Tensor = self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))
        return tokens


def parts_of(
    attention: Any, x: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Return the inputs of a window attention layer's computation for tokens [windows B, N, C].

    Returns:
        query, key and value [windows B, h, N, d]; the bias [1, h, N, N]; the mask [windows B, 1, N, N], true where a
        pair takes part, or None.
    """
    query, key, value = query_key_value(attention, x)
    # timm adds the mask, 0 or -100, to softmax's scores. `len` would fix the batch size when a model is traced.
    keep = None if mask is None else (mask == 0).repeat(x.shape[0] // mask.shape[0], 1, 1).unsqueeze(1)
    return query, key, value, attention._get_rel_pos_bias(), keep


class Swin(Host):
    """timm's Swins, whose stages differ in size."""

    classes: ClassVar = dict.fromkeys((WindowAttention, SteadyWindowAttention), KaratWindowAttention)

    def build(self, model: ModelConfig, **options: Any) -> nn.Module:
        """See `Host`."""
        own = SWIN_SIZES.get(model.name, {})
        refuse_fields(model, "patch_size", "embed_dim", "depth", "num_heads", why="whose stages have their own sizes")
        name = SWIN_BASE if own else model.name
        network = build_timm(model, name, **usual_settings(model), **own, **options)
        for layer in layers.attention_layers(network):
            layer.attention.__class__ = SteadyWindowAttention
        return network

    def fit(self, weights: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
        """See `Host`."""
        fitted: dict[str, Tensor] = swin_transformer.checkpoint_filter_fn(dict(weights), model)
        return fitted


class Other(Host):
    """Models with timm's own attention that have no class here, at timm's own sizes."""

    classes: ClassVar = {Attention: KaratAttention}

    def build(self, model: ModelConfig, **options: Any) -> nn.Module:
        """See `Host`."""
        with torch.device("meta"):
            network = timm.create_model(model.name)
        check_attention(network, model)  # before its keys: another model is needed then, and not other keys
        refuse_fields(model, "patch_size", "embed_dim", "depth", "num_heads", why="which is built at timm's own sizes")
        taken = inspect.signature(type(network)).parameters
        usual = usual_settings(model)
        for field in ("drop_path", "proj_drop"):
            rate = usual[f"{field}_rate"]
            if rate and f"{field}_rate" not in taken:
                raise RecipeError(
                    f"model.{field} = {rate:g} is not supported by {model.name}, which has no {field}_rate; use 0"
                )
        return build_timm(model, model.name, **{name: x for name, x in usual.items() if name in taken}, **options)

    def fit(self, weights: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
        """See `Host`."""
        fitted, own = dict(weights), getattr(model, "pos_embed", None)
        there = fitted.get("pos_embed")
        if own is not None and there is not None and there.dim() == 4:  # [1, D, height, width] of PiT's patches
            sides = own.shape[2:]
            fitted["pos_embed"] = interpolate(there.float(), sides, mode="bicubic", antialias=True).to(there.dtype)
        return fitted


VIT, CONVIT, SWIN, OTHER = Vit(), Convit(), Swin(), Other()
# Hosts by the names of timm's modules.
HOSTS = {
    "vision_transformer": VIT,
    "vision_transformer_hybrid": VIT,
    "deit": VIT,
    "convit": CONVIT,
    "swin_transformer": SWIN,
}
# Names of our own small models, and the timm models that they resize.
OWN = {**dict.fromkeys(VIT_SIZES, VIT_BASE), **dict.fromkeys(SWIN_SIZES, SWIN_BASE)}


def host_of_name(name: str) -> Host:
    """Return the host that builds the model of a name. Raises RecipeError if timm does not have the model."""
    base = OWN.get(name, name.partition(".")[0])
    if not timm.is_model(base):
        close = nearest(base, [*OWN, *timm.list_models()])
        hint = f"did you mean {close[0]}?" if close else "`timm.list_models('vit_*')` lists some of them"
        raise RecipeError(f"model.name = {name!r}: timm has no such model; {hint}")
    return _host_of_module(timm.model_entrypoint(base).__module__)


def host_of(network: nn.Module) -> Host:
    """Return the host of a model that was built."""
    return _host_of_module(type(network).__module__)


def _host_of_module(module: str) -> Host:
    return HOSTS.get(module.rpartition(".")[2], OTHER)
