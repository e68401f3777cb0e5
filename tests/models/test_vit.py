"""What a recipe changes in a plain ViT of timm's besides its attention."""

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from karat_scale.models import create_model
from karat_scale.models.factory import no_weight_decay_names, parameter_count
from karat_scale.models.layers import sincos_2d
from karat_scale.recipe import AttentionConfig, ModelConfig

SIZES = {"image_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 5}
PLAIN = {"pool": "avg", "pos_embed": "sincos2d", "weight_init": "jax"}
KARAT = AttentionConfig(kind="karat", rank=3, grid=2)


def build(attention: AttentionConfig = KARAT, **settings: Any) -> Any:
    torch.manual_seed(0)
    return create_model(ModelConfig(**{**SIZES, **settings}), attention)


def test_the_head_sees_the_average_of_normed_patches() -> None:
    model = build(**PLAIN)
    assert model.cls_token is None
    assert model.blocks[0].attn.operator.num_tokens == 16
    torch.nn.init.normal_(model.head.weight)
    model.norm.weight.data.uniform_()
    images = torch.randn(3, 3, 32, 32)
    tokens = model.blocks(model.patch_embed(images) + sincos_2d(4, 4, 64))
    expected = model.head(model.norm(tokens).mean(1))
    torch.testing.assert_close(model(images), expected)


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_computed_positions_do_not_learn(pool: str) -> None:
    model = build(**{**PLAIN, "pool": pool})
    positions = model.pos_embed.detach().clone()
    prefix = int(pool == "token")
    torch.testing.assert_close(positions[0, prefix:], sincos_2d(4, 4, 64))
    assert not positions[0, :prefix].any()
    learned = build(**{**PLAIN, "pool": pool, "pos_embed": None})
    assert parameter_count(learned) - parameter_count(model) == positions.numel()
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert model.pos_embed.grad is None
    assert "pos_embed" in no_weight_decay_names(model, decay_karat=False)


def test_jaxs_start_is_also_that_of_a_student() -> None:
    model = build(AttentionConfig(transfer_from="run"), **PLAIN, embed_dim=256)
    value = model.blocks[1].attn.value.weight
    assert 0.99 < value.abs().max() / (6 / sum(value.shape)) ** 0.5 <= 1


@pytest.mark.parametrize("attention", [AttentionConfig(), KARAT])
def test_jaxs_start_is_xaviers_and_a_head_of_zeros(attention: AttentionConfig) -> None:
    model = build(attention, **PLAIN, embed_dim=256)
    assert not model(torch.randn(2, 3, 32, 32)).any()
    block = model.blocks[1]
    for matrix in (*block.attn.qkv.weight.chunk(3), block.attn.proj.weight, block.mlp.fc1.weight):
        bound = (6 / sum(matrix.shape)) ** 0.5
        assert 0.99 * bound < matrix.abs().max() <= bound
        assert matrix.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert block.mlp.fc1.bias.std().item() == pytest.approx(1e-6, rel=0.2)
    assert not block.attn.qkv.bias.any()
    patches = model.patch_embed.proj.weight
    assert patches.std().item() == pytest.approx((3 * 8 * 8) ** -0.5, rel=0.03)


@pytest.mark.parametrize(
    "attention",
    [AttentionConfig(), KARAT, AttentionConfig(kind="static"), AttentionConfig(transfer_from="run")],
    ids=["softmax", "karat", "static", "student"],
)
def test_the_mimetic_start_is_its_formula(attention: AttentionConfig) -> None:
    width, heads = 256, 4
    model = build(attention, weight_init="mimetic", embed_dim=width, num_heads=heads)
    torch.testing.assert_close(model.pos_embed[0, 1:], sincos_2d(4, 4, width))
    assert model.pos_embed.requires_grad
    layer, identity = model.blocks[1].attn, torch.eye(width)
    is_student = bool(attention.transfer_from)
    value = (layer.value.weight if is_student else layer.qkv.weight.chunk(3)[2]).mT
    noise = (value @ layer.proj.weight.mT + 0.4 * identity) / 0.4
    assert noise.mean().item() == pytest.approx(0, abs=1e-3)
    assert noise.std().item() == pytest.approx(width**-0.5, rel=0.02)
    if not is_student:
        query, key, _ = layer.qkv.weight.chunk(3)
        for q, k in zip(query.chunk(heads), key.chunk(heads), strict=True):
            torch.testing.assert_close(q @ q.mT, k @ k.mT, rtol=1e-3, atol=1e-4)  # both have the singular values' roots
            # The product has the largest quarter of the singular values of 0.7 (Z + I). The largest of Z is about 2.
            product = (q.mT @ k).double()
            assert 0.9 < torch.linalg.matrix_norm(product, 2) < 0.7 * 3
            assert product.trace() > 0.2 * width * 0.7
    assert not torch.equal(value, model.blocks[0].attn.proj.weight)
    assert build(attention, weight_init="mimetic", pos_embed="sincos2d").pos_embed.requires_grad is False


def test_what_is_not_asked_for_is_timms_own() -> None:
    model = build(AttentionConfig())
    assert model.cls_token is not None
    assert model.pos_embed.requires_grad
    assert model.global_pool == "token"
    assert model.blocks[0].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)


class AutocastAsOnCuda(TorchFunctionMode):
    """A mode in which the CPU's autocast computes norms in float32, as CUDA's does (ATen/autocast_mode.h).

    Otherwise the CPU's autocast leaves the dtype of their inputs.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not functional.layer_norm or not torch.is_autocast_enabled("cpu"):
            return func(*args, **(kwargs or {}))
        with torch.autocast("cpu", enabled=False):
            return func(args[0].float(), *args[1:], **(kwargs or {}))


def test_normed_queries_and_keys_have_the_values_dtype_under_cudas_autocast() -> None:
    layer = build().blocks[0].attn
    layer.q_norm, layer.k_norm = nn.LayerNorm(32), nn.LayerNorm(32)
    given = []
    layer.operator.register_forward_pre_hook(lambda _, heads: given.extend(x.dtype for x in heads))
    normed = []
    layer.q_norm.register_forward_hook(lambda *passed: normed.append(passed[-1].dtype))
    with AutocastAsOnCuda(), torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(2, 17, 64))
    assert normed == [torch.float32]
    assert given == [torch.bfloat16] * 3


def test_a_float_mask_is_not_read_on_the_host() -> None:
    layer = build().blocks[0].attn
    with FakeTensorMode(allow_non_fake_inputs=True):  # a fake tensor cannot be read
        assert layer(torch.randn(2, 17, 64), attn_mask=torch.zeros(17, 17)).shape == (2, 17, 64)
