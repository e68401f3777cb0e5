"""timm's vision transformers with a KArAt operator instead of softmax."""

import functools
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from timm.layers import Attention
from timm.models import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from karat_scale.models.host import Host, build_timm, cannot_be_built
from karat_scale.models.layers import LayerSize, refuse_dropout, sincos_2d
from karat_scale.models.operators import operator_maker
from karat_scale.recipe import AttentionConfig, ModelConfig

# Our own small models, by name: their changes to timm's ViT-Tiny.
BASE = "vit_tiny_patch16_224"
OWN_SIZES: dict[str, dict[str, int]] = {
    "vit_mini_patch4_28": {"patch_size": 4, "embed_dim": 128, "depth": 4, "num_heads": 2},
}
# Makes the operator of a layer with so many heads, for the model that is being built. A class of its own for each model
# would do it too, but pickle could not find that class.
_MAKE_OPERATOR: ContextVar[Callable[[int], nn.Module]] = ContextVar("make_operator")


class KaratAttention(Attention):
    """timm's attention layer with softmax(A) V replaced by a learnable operator on the rows of A.

    timm calls this class with its own arguments while `_learn` builds a model.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse_dropout(self)
        self.operator = _MAKE_OPERATOR.get()(self.num_heads)

    def forward(
        self,
        x: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        """Compute attention on tokens [B, N, D].

        A boolean `attn_mask` keeps pairs. A float one is added to scores; as in PyTorch, -inf keeps a pair out.
        """
        if is_causal:
            raise ValueError("is_causal is not supported: KArAt is tied to the positions of image tokens")
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        # CUDA's autocast, unlike a CPU's, norms in float32; scores of wider queries would take slower products.
        query, key = (x.to(value.dtype) for x in (self.q_norm(query), self.k_norm(key)))
        bias, mask = None, attn_mask
        if attn_mask is not None and attn_mask.dtype != torch.bool:
            bias, mask = attn_mask, ~attn_mask.isneginf()
        out = self.operator(query, key, value, bias=bias, mask=mask)
        return join_heads(self, x, out)


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
    own = OWN_SIZES.get(model.name, {})
    asked = {name: getattr(model, name) for name in ("patch_size", "embed_dim", "depth", "num_heads")}
    sizes = {name: value for name, value in asked.items() if value is not None}
    settings: dict[str, Any] = {**own, **sizes, **_plain_options(model), **options}
    if attn_layer is not None:
        settings["attn_layer"] = attn_layer
    network = build_timm(
        model,
        BASE if own else model.name,
        img_size=model.image_size,
        drop_path_rate=model.drop_path,
        proj_drop_rate=model.proj_drop,
        **settings,
    )
    try:
        _start(network, model)
    except ValueError as error:
        raise cannot_be_built(model, error) from error
    return network


def _plain_options(model: ModelConfig) -> dict[str, Any]:
    """Return timm's options for the input of the head and the first weights."""
    options: dict[str, Any] = {} if model.weight_init is None else {"weight_init": model.weight_init}
    if model.pool is not None:
        # The average of normed patches, as in arXiv 2205.01580; timm's default is the norm of their average.
        options |= {"global_pool": model.pool, "class_token": model.pool == "token", "fc_norm": False}
    return options


@torch.no_grad()
def _start(network: Any, model: ModelConfig) -> None:
    """Apply settings without an option in timm to a new model. Raises ValueError if they are not supported."""
    if model.weight_init == "jax":
        for module in network.modules():
            if isinstance(module, Attention) and hasattr(module, "qkv"):  # three matrices in JAX, one in timm
                for matrix in module.qkv.weight.chunk(3):
                    nn.init.xavier_uniform_(matrix)
    if model.pos_embed == "sincos2d":
        if getattr(network, "pos_embed", None) is None:
            raise ValueError("it has no position embedding for pos_embed = sincos2d")
        height, width = network.patch_embed.grid_size
        grid = sincos_2d(height, width, network.embed_dim)
        prefix = grid.new_zeros(network.pos_embed.shape[1] - len(grid), network.embed_dim)
        network.pos_embed.copy_(torch.cat([prefix, grid])[None]).requires_grad_(False)


def _learn(model: ModelConfig, attention: AttentionConfig, sizes: tuple[LayerSize, ...], **options: Any) -> nn.Module:
    token = _MAKE_OPERATOR.set(functools.partial(operator_maker(attention), sizes[0].tokens))
    try:
        return build_vit(model, KaratAttention, **options)
    finally:
        _MAKE_OPERATOR.reset(token)


def _fit(weights: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    fitted: dict[str, Tensor] = checkpoint_filter_fn(dict(weights), model, adapt_layer_scale=True)
    return fitted


VIT = Host(build_vit, _learn, _fit, blocks_are_alike=True)
