"""What every host supports or refuses, whatever its architecture."""

import pytest
import torch
from timm.layers import Attention

from karat_scale.foundation.errors import RecipeError
from karat_scale.models import create_model
from karat_scale.models.factory import layer_sizes
from karat_scale.models.flops import flops_per_image
from karat_scale.models.layers import attention_layers, blocks_of
from karat_scale.models.operators import operators
from karat_scale.recipe import AttentionConfig, ModelConfig

KARAT = AttentionConfig(kind="karat")


@pytest.mark.parametrize(
    ("name", "image_size", "tokens"),
    [
        ("deit_tiny_distilled_patch16_224", 64, [18] * 12),
        ("deit3_small_patch16_224", 224, [197] * 12),
        ("vit_wee_patch16_reg1_gap_256", 64, [17] * 14),  # a register, no class token
        ("vit_base_patch16_siglip_224", 64, [16] * 12),  # neither; a pooling head
        ("pit_ti_224", 64, [50] * 2 + [17] * 6 + [5] * 4),
        ("mobilevit_xs", 128, [64] * 2 + [16] * 4 + [4] * 3),
        ("convit_small", 64, [16] * 10 + [17] * 2),
    ],
)
def test_every_layer_has_functions_for_its_own_number_of_tokens(name: str, image_size: int, tokens: list[int]) -> None:
    config = ModelConfig(name=name, image_size=image_size, num_classes=7)
    assert [size.tokens for size in layer_sizes(config)] == tokens
    with torch.device("meta"):
        model = create_model(config, KARAT)
        assert model(torch.empty(2, 3, image_size, image_size)).shape == (2, 7)
    learned = [operator for operator in operators(model) if operator is not None]
    assert [operator.num_tokens for operator in learned] == tokens[-len(learned) :]
    assert len(blocks_of(model)) == len(tokens)
    assert all(type(layer.attention) is not Attention for layer in attention_layers(model))


@pytest.mark.parametrize("name", ["convit_tiny", "swin_tiny_patch4_window7_224"])
def test_operations_are_counted_by_the_papers_algebra(name: str) -> None:
    """Operations are counted layer by layer; in shifted windows, where pairs are masked, S is formed."""
    config, d, r, grid = ModelConfig(name=name), 48 if "convit" in name else 32, 12, 3
    softmax, karat = (flops_per_image(config, attention) for attention in (AttentionConfig(), KARAT))
    more = 0
    for number, size in enumerate(layer_sizes(config)):
        if "convit" in name and number < 10:
            continue
        n, is_shifted = size.tokens, "swin" in name and number % 2 == 1 and number < 10
        output = 2 * n * n * (r + d) if is_shifted else 4 * n * r * d
        more += size.sets * size.heads * (4 * n * n * grid * r + output - 2 * n * n * d)
    assert karat.forward - softmax.forward == more
    assert len(layer_sizes(config)) == 12


VIT = {"name": "vit_mini_patch4_28", "image_size": 16}
CONVIT = {"name": "convit_tiny", "image_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2}
SWIN = {"name": "swin_mini_patch2_window4_32", "image_size": 32}
NONE_LEFT = "attention.softmax_heads = 2 leaves no"
UNEQUAL = "differ in tokens or heads and cannot share functions; use attention.mode=blockwise"
REFUSED: list[tuple[dict[str, object], dict[str, object], str]] = [
    ({"name": "resnet18"}, {}, "it has no attention that KArAt can replace"),
    ({"name": "eva02_tiny_patch14_224"}, {}, "its attention, eva.EvaAttention, cannot"),
    ({"name": "xcit_nano_12_p16_224"}, {}, "cannot be replaced with KArAt"),
    ({"name": "beit_base_patch16_224"}, {}, "its attention, beit.Attention, cannot be replaced"),
    ({"name": "swinv2_tiny_window8_256"}, {}, "its attention, swin_transformer_v2.WindowAttention, cannot be"),
    ({"name": "vit_dwee_patch16_reg1_gap_256"}, {}, "DiffAttention, cannot be replaced"),
    ({"name": "vit_base_patch16_xp_224"}, {}, "it has no attention that KArAt can replace"),
    ({"name": "crossvit_9_240"}, {}, "cannot be replaced with KArAt"),
    ({"name": "naflexvit_base_patch16_gap"}, {}, "accepts images of any size, but KArAt needs a fixed number of"),
    ({"name": "vit_intern300m_patch14_448"}, {}, "accepts images of any size"),
    ({"name": "convit_tinny"}, {}, "timm has no such model; did you mean convit_tiny?"),
    ({"name": "vit_tinny_patch16_224"}, {}, "did you mean vit_tiny_patch16_224?"),
    ({"name": "vit_tinny"}, {}, "did you mean vit_tiny_patch16_224?"),
    (
        {"name": "vit_tiny_patch16_224", "num_heads": 5},
        {"kind": "karat"},
        "model.num_heads = 5 does not divide the width 192 of vit_tiny_patch16_224; use 4 or 6",
    ),
    ({**VIT, "num_heads": 7}, {}, "model.num_heads = 7 does not divide the width"),
    ({"name": "deit_tiny_patch16_224", "embed_dim": 100}, {}, "= 100 is not a multiple of the 3 heads of deit_tin"),
    ({"name": "vit_tiny_patch16_224", "image_size": 100}, {}, "model.image_size = 100 is not a multiple of the patch"),
    ({**VIT, "pos_embed": "sincos2d", "embed_dim": 6}, {}, "positions need a width of 8, 12"),
    (VIT, {"kind": "karat", "softmax_heads": 2}, "attention.softmax_heads = 2 leaves none of 2 heads for KArAt"),
    (VIT, {"kind": "karat", "form": "smooth", "modes": 18}, "attention.modes = 18 is more than N = 17 tokens"),
    ({"name": "pit_ti_224", "depth": 3}, {}, "model.depth = 3 is not supported by pit_ti_224"),
    ({"name": "mobilevit_xs", "proj_drop": 0.1}, {}, "model.proj_drop = 0.1 is not supported by mobilevit_xs"),
    ({"name": "pit_ti_224", "image_size": 100}, {}, "does not fit pit_ti_224's patches, 16 pixels wide, 8 apart; use"),
    ({"name": "pit_ti_224", "image_size": 64}, {"kind": "karat", "mode": "universal"}, f"of pit_ti_224 {UNEQUAL}"),
    ({**CONVIT, "depth": 2}, {}, "model.depth = 2 leaves convit_tiny no gated block"),
    (
        {"name": "convit_tiny", "embed_dim": 33},
        {},
        "model.embed_dim = 33 is not a multiple of the 4 heads of convit_tiny; set model.embed_dim=32, or model.num_he",
    ),
    ({"name": "convit_tiny", "image_size": 18}, {}, "= 18 is not a multiple of the patch size of convit_tiny, 16; use"),
    (CONVIT, {"kind": "karat", "softmax_heads": 2}, f"{NONE_LEFT} head for KArAt in a layer of convit_tiny with 2"),
    (CONVIT, {"transfer_from": "runs/x"}, "only between plain ViTs"),
    ({**SWIN, "patch_size": 16}, {}, "model.patch_size = 16 is not supported by swin_mini"),
    ({**SWIN, "embed_dim": 64}, {}, "model.embed_dim = 64 is not supported by"),
    ({**SWIN, "depth": 2}, {}, "model.depth = 2 is not supported by"),
    ({**SWIN, "num_heads": 2}, {}, "model.num_heads = 2 is not supported by"),
    ({**SWIN, "image_size": 33}, {}, "model.image_size = 33 is not a multiple of the patch size of swin_mini"),
    ({**SWIN, "pool": "avg"}, {}, "model.pool = avg is not supported by swin_mini_patch2_window4_32, which is not a"),
    ({**SWIN, "pos_embed": "sincos2d"}, {}, "model.pos_embed = sincos2d is not supported by"),
    ({**SWIN, "weight_init": "jax"}, {}, "model.weight_init = jax is not supported by"),
    (SWIN, {"kind": "karat", "mode": "universal"}, f"of swin_mini_patch2_window4_32 {UNEQUAL}"),
    (SWIN, {"kind": "karat", "init": "softmax_like", "rank": 17}, "rank = 17 is more than N = 16 tokens"),
    (SWIN, {"kind": "karat", "softmax_heads": 2}, f"{NONE_LEFT} head for KArAt in a layer"),
    (SWIN, {"kind": "karat", "form": "smooth", "modes": 17}, "attention.modes = 17 is more than N = 16 tokens"),
    (SWIN, {"transfer_from": "runs/x"}, "only between plain ViTs"),
]


@pytest.mark.parametrize(("model", "attention", "part"), REFUSED)
def test_what_cannot_be_built_is_one_line(model: dict[str, object], attention: dict[str, object], part: str) -> None:
    with torch.device("meta"), pytest.raises(RecipeError) as caught:
        create_model(ModelConfig(**model), AttentionConfig(**attention))
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)
