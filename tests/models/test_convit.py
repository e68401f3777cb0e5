import copy

import pytest
import torch
from timm.models.convit import GPSA

from karat_scale.engine.optimizers import layer_scales
from karat_scale.models import create_model, no_weight_decay_names, parameter_count
from karat_scale.models.factory import layer_sizes
from karat_scale.models.hosts import KaratMHSA
from karat_scale.models.init_from import take_weights
from karat_scale.models.layers import attention_layers
from karat_scale.models.operators import head_parameters, operators
from karat_scale.recipe import AttentionConfig, ModelConfig
from tests.models.plain import learned_attention

SIZE = ModelConfig(name="convit_tiny", image_size=16, patch_size=4, embed_dim=32, depth=4, num_heads=2, num_classes=4)
KARAT = AttentionConfig(kind="karat", grid=2, rank=4)
UNIVERSAL = KARAT.model_copy(update={"mode": "universal"})


def convit(attention: AttentionConfig = KARAT, **sizes) -> torch.nn.Module:
    torch.manual_seed(0)
    return create_model(SIZE.model_copy(update=sizes), attention)


def test_the_last_two_blocks_become_karat_and_compute_the_equations() -> None:
    model, calls = convit().eval(), []
    kinds = [type(layer.attention) for layer in attention_layers(model)]
    assert kinds == [GPSA, GPSA, KaratMHSA, KaratMHSA]
    assert [size.tokens for size in layer_sizes(SIZE)] == [16, 16, 17, 17]
    for block in model.blocks[2:]:
        block.attn.register_forward_hook(lambda module, inputs, out: calls.append((module, inputs[0], out)))
    with torch.no_grad():
        model(torch.randn(2, 3, 16, 16))
        for module, x, out in calls:
            attention = copy.deepcopy(module).double()
            query, key, value = attention.qkv(x.double()).reshape(2, 17, 3, 2, 16).permute(2, 0, 3, 1, 4)
            heads = learned_attention(attention.operator, query @ key.mT / 4) @ value
            expected = attention.proj(heads.transpose(1, 2).reshape(2, 17, 32))
            torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("mode", "sets"), [("softmax", 0), ("blockwise", 2), ("universal", 1)])
def test_parameter_counts_are_the_equations(mode: str, sets: int) -> None:
    attention = AttentionConfig() if mode == "softmax" else AttentionConfig(kind="karat", mode=mode)
    with torch.device("meta"):
        model = create_model(ModelConfig(name="convit_tiny"), attention)
    assert parameter_count(model) == 5_710_512 + sets * 7 * 12 * 197 * 4  # (2 G + 1) r N h


def test_a_universal_operator_is_one_of_the_last_block() -> None:
    model = convit(UNIVERSAL)
    assert [operator is None for operator in operators(model)] == [True, True, False, False]
    assert [block for _, block, _ in head_parameters(model)] == [2, 2, 2]
    scales = layer_scales(model, 0.5)
    assert scales["blocks.2.attn.operator.cos_coef"] == scales["blocks.3.attn.qkv.weight"]
    exempt = no_weight_decay_names(model, decay_karat=False)
    assert {"blocks.2.attn.operator.proj", "pos_embed", "cls_token", "blocks.0.attn.gating_param"} <= exempt
    assert "blocks.0.attn.pos_proj.weight" not in exempt


def test_weights_of_another_image_size_interpolate_positions_and_operators() -> None:
    source, target = convit(), convit(image_size=24)
    assert "interpolated from 4 x 4 patches" in take_weights(target, source.state_dict())
    assert target.pos_embed.shape == (1, 36, 32)
    assert torch.equal(target.blocks[2].attn.operator.proj[:, 0], source.blocks[2].attn.operator.proj[:, 0])
    assert target(torch.randn(1, 3, 24, 24)).isfinite().all()


def test_positions_are_there_before_the_first_pass() -> None:
    """Positions are there before the first pass.

    If the first pass made them, they could be an inference tensor, and its batch would allocate more than the next.
    """
    index = convit().blocks[0].attn.rel_indices
    assert index.shape == (1, 16, 16, 3)
    assert index[0, 0, 5].tolist() == [1, 1, 2]


def test_the_number_of_heads_does_not_change_the_width() -> None:
    with torch.device("meta"):
        model = create_model(ModelConfig(name="convit_tiny", num_heads=8), AttentionConfig())
    assert model.embed_dim == 192
