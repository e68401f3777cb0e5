"""ConViT with KArAt in its last blocks, which are plain self-attention.

The gated positional blocks do not change (paper, 4). The class token joins the patches after the gated blocks, so the
two kinds see P and P + 1 tokens.
"""

from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.convit import GPSA, MHSA
from torch import Tensor, nn

from karat_scale.foundation.errors import RecipeError
from karat_scale.models.host import Host, build_timm
from karat_scale.models.layers import LayerSize, attention_layers
from karat_scale.models.operators import learn
from karat_scale.recipe import AttentionConfig, ModelConfig

# timm's models have 12 blocks, of which 10 are gated.
PLAIN_BLOCKS = 2


class KaratMHSA(MHSA):
    """ConViT's plain attention layer with softmax(A) V replaced by a learnable operator on the rows of A."""

    operator: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Compute attention: tokens [B, N, D] to tokens [B, N, D]."""
        query, key, value = query_key_value(self, x)
        out: Tensor = self.operator(query, key, value)
        tokens: Tensor = self.proj_drop(self.proj(out.transpose(1, 2).reshape(x.shape)))
        return tokens


def query_key_value(attention: Any, x: Tensor) -> tuple[Tensor, ...]:
    """Return query, key and value [B, h, N, d] of an MHSA layer for tokens [B, N, D]."""
    qkv: Tensor = attention.qkv(x)
    parts: tuple[Tensor, ...] = qkv.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return parts


def _build(model: ModelConfig, **options: Any) -> nn.Module:
    sizes: dict[str, Any] = {} if model.patch_size is None else {"patch_size": model.patch_size}
    if model.depth is not None:
        if model.depth <= PLAIN_BLOCKS:
            raise RecipeError(
                f"model.depth = {model.depth} leaves {model.name} no gated block before its {PLAIN_BLOCKS} plain ones; "
                f"use at least {PLAIN_BLOCKS + 1}"
            )
        sizes |= {"depth": model.depth, "local_up_to_layer": model.depth - PLAIN_BLOCKS}
    if model.num_heads is not None or model.embed_dim is not None:
        own_heads, own_width = _own_sizes(model.name)
        heads, width = model.num_heads or own_heads, model.embed_dim or own_width
        if width % heads:
            raise RecipeError(f"model.embed_dim = {width} is not a multiple of the {heads} heads")
        sizes |= {"num_heads": heads, "embed_dim": width // heads}  # timm's is the width of a head
    network: Any = build_timm(
        model,
        model.name,
        img_size=model.image_size,
        drop_path_rate=model.drop_path,
        proj_drop_rate=model.proj_drop,
        **sizes,
        **options,
    )
    for layer in attention_layers(network):
        if isinstance(layer.attention, GPSA):  # else it is made in the first forward pass, in whatever mode that runs
            index = layer.attention.get_rel_indices(network.num_patches)
            del layer.attention.rel_indices  # a plain attribute in older versions, so it would not move to a GPU
            layer.attention.register_buffer("rel_indices", index, persistent=False)
    built: nn.Module = network
    return built


def _own_sizes(name: str) -> tuple[int, int]:
    """Return a model's number of heads and width."""
    with torch.device("meta"):
        network: Any = timm.create_model(name)
    return int(network.blocks[0].attn.num_heads), int(network.embed_dim)


def _learn(model: ModelConfig, attention: AttentionConfig, sizes: tuple[LayerSize, ...], **options: Any) -> nn.Module:
    return learn(_build(model, **options), model, attention, sizes, {MHSA: KaratMHSA})


def _fit(weights: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    fitted = dict(weights)
    if "pos_embed" in fitted:  # of the patches only
        fitted["pos_embed"] = resample_abs_pos_embed(
            fitted["pos_embed"], new_size=model.patch_embed.grid_size, num_prefix_tokens=0
        )
    return fitted


CONVIT = Host(_build, _learn, _fit)
