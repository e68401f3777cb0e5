"""Swin with KArAt in the window attention of every block; each window is a set of N tokens (paper, 4).

Scores include the relative position bias. A shifted window can hold patches from two sides of the image, which do not
see each other: a masked pair (k, q) adds nothing to H[k, :] and has S[k, q] = 0. If a stage's grid is smaller than
the window, the window shrinks to it, so N can differ between blocks.
"""

from collections.abc import Mapping
from typing import Any

from timm.models.swin_transformer import WindowAttention, checkpoint_filter_fn
from torch import Tensor, nn

from karat_scale.models.host import Host, build_timm, refuse_fields
from karat_scale.models.layers import LayerSize
from karat_scale.models.operators import learn
from karat_scale.recipe import AttentionConfig, ModelConfig

# Our own small models, by name: their changes to timm's Swin-Tiny.
BASE = "swin_tiny_patch4_window7_224"
OWN_SIZES: dict[str, dict[str, Any]] = {
    "swin_mini_patch2_window4_32": {
        "patch_size": 2,
        "window_size": 4,
        "embed_dim": 32,
        "depths": (2, 2),
        "num_heads": (2, 4),
    },
}


class KaratWindowAttention(WindowAttention):
    """Swin's attention layer with softmax(A) V replaced by a learnable operator on the rows of A, bias included."""

    operator: nn.Module

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compute attention on windows [windows B, N, C]; mask [windows, N, N] is 0 for pairs that take part."""
        query, key, value, bias, keep = parts_of(self, x, mask)
        out: Tensor = self.operator(query, key, value, bias=bias, mask=keep)
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
    qkv: Tensor = attention.qkv(x)
    query, key, value = qkv.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    # timm adds the mask, 0 or -100, to softmax's scores. `len` would fix the batch size when a model is traced.
    keep = None if mask is None else (mask == 0).repeat(x.shape[0] // mask.shape[0], 1, 1).unsqueeze(1)
    return query, key, value, attention._get_rel_pos_bias(), keep


def _build(model: ModelConfig, **options: Any) -> nn.Module:
    own = OWN_SIZES.get(model.name, {})
    refuse_fields(model, "patch_size", "embed_dim", "depth", "num_heads", why="whose stages have their own sizes")
    return build_timm(
        model,
        BASE if own else model.name,
        img_size=model.image_size,
        drop_path_rate=model.drop_path,
        proj_drop_rate=model.proj_drop,
        **own,
        **options,
    )


def _learn(model: ModelConfig, attention: AttentionConfig, sizes: tuple[LayerSize, ...], **options: Any) -> nn.Module:
    return learn(_build(model, **options), model, attention, sizes, {WindowAttention: KaratWindowAttention})


def _fit(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    fitted: dict[str, Tensor] = checkpoint_filter_fn(dict(weights), model)
    return fitted


SWIN = Host(_build, _learn, _fit)
