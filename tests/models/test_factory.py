from itertools import product

import pytest
import torch
from timm.layers import Attention
from torch.utils._python_dispatch import TorchDispatchMode

from karat_scale.attention import FourierKaratOperator, fourier_karat_attention
from karat_scale.foundation.errors import RecipeError
from karat_scale.models import create_model, parameter_count
from karat_scale.models.factory import outline
from karat_scale.recipe import AttentionConfig, ModelConfig
from karat_scale.recipe.files import part_names
from karat_scale.recipe.loading import load_recipe

MINI = ModelConfig(name="vit_mini_patch4_28", image_size=28, patch_size=4, num_classes=10)
KARAT = AttentionConfig(kind="karat")


@pytest.mark.parametrize(
    ("size", "classes", "section", "millions"),
    [
        # paper.md: 5.53 M / 22.05 M / 85.81 M softmax; by the equations 6.12 M, 23.24 M and 86.83 M
        ("tiny", 10, {"kind": "softmax"}, 5.53),
        ("tiny", 10, {}, 6.12),
        ("small", 1000, {"kind": "softmax"}, 22.05),
        ("small", 1000, {}, 23.24),
        ("base", 10, {"kind": "softmax"}, 85.81),
        ("base", 10, {"grid": 1}, 86.83),
        # With gains they are the paper's.
        ("base", 10, {"gains": True, "grid": 1}, 87.51),
        ("base", 10, {"gains": True, "grid": 1, "mode": "universal"}, 85.95),
        ("small", 1000, {"gains": True}, 23.58),
        ("small", 1000, {"gains": True, "mode": "universal"}, 22.18),
        ("tiny", 10, {"gains": True}, 6.29),
        ("tiny", 10, {"gains": True, "mode": "universal"}, 5.59),
    ],
)
def test_parameter_counts_are_the_equations(size, classes, section, millions) -> None:
    attention = AttentionConfig(**{"kind": "karat", **section})
    with torch.device("meta"):
        model = create_model(ModelConfig(name=f"vit_{size}_patch16_224", num_classes=classes), attention)
    assert parameter_count(model) / 1e6 == pytest.approx(millions, abs=0.006)


@pytest.mark.parametrize(("image", "patch", "classes"), [(28, 4, 10), (32, 4, 100), (32, 8, 2), (64, 16, 7)])
@pytest.mark.parametrize("kind", ["softmax", "karat"])
def test_any_image_size_patch_size_and_class_count(image: int, patch: int, classes: int, kind: str) -> None:
    config = ModelConfig(name="vit_mini_patch4_28", image_size=image, patch_size=patch, num_classes=classes)
    model = create_model(config, AttentionConfig(kind=kind, grid=1, rank=3))
    assert model(torch.randn(2, 3, image, image)).shape == (2, classes)


def test_universal_mode_shares_one_operator_and_counts_it_once() -> None:
    blockwise = create_model(MINI, AttentionConfig(kind="karat"))
    universal = create_model(MINI, AttentionConfig(kind="karat", mode="universal"))
    softmax = create_model(MINI, AttentionConfig())
    operators = {id(block.attn.operator) for block in universal.blocks}
    assert len(operators) == 1
    assert len({id(block.attn.operator) for block in blockwise.blocks}) == 4
    one = parameter_count(universal) - parameter_count(softmax)
    assert one == (2 * 3 + 1) * 12 * 50 * 2  # (2 G + 1) r N h
    assert parameter_count(blockwise) - parameter_count(softmax) == 4 * one
    universal(torch.randn(2, 3, 28, 28)).sum().backward()
    gradient = universal.blocks[0].attn.operator.cos_coef.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0


def test_a_block_computes_the_operator_on_timms_query_key_and_value() -> None:
    torch.manual_seed(0)
    model = create_model(MINI, KARAT).double().eval()
    attention = model.blocks[1].attn
    tokens = torch.randn(2, 50, 128, dtype=torch.float64)
    query, key, value = attention.qkv(tokens).reshape(2, 50, 3, 2, 64).permute(2, 0, 3, 1, 4)
    operator = attention.operator
    heads = fourier_karat_attention(
        query, key, value, operator.cos_coef, operator.sin_coef, operator.proj, implementation="reference"
    )
    expected = attention.proj(heads.transpose(1, 2).reshape(2, 50, 128))
    torch.testing.assert_close(attention(tokens), expected)


def test_softmax_is_timms_own_attention() -> None:
    model = create_model(MINI, AttentionConfig())
    assert type(model.blocks[0].attn) is Attention
    assert not any(isinstance(module, FourierKaratOperator) for module in model.modules())


def test_overrides_of_width_depth_and_heads() -> None:
    config = ModelConfig(name="vit_small_patch16_224", image_size=32, patch_size=4, embed_dim=96, depth=3, num_heads=3)
    model = create_model(config, KARAT)
    assert (model.embed_dim, len(model.blocks), model.blocks[0].attn.num_heads) == (96, 3, 3)


def test_timms_gradient_checkpointing_gives_the_same_gradients() -> None:
    torch.manual_seed(0)
    model = create_model(MINI, KARAT)
    images = torch.randn(2, 3, 28, 28)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(images).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    model.set_grad_checkpointing(True)
    assert all(map(torch.equal, plain, gradients()))


def test_the_outline_of_a_deep_model_computes_nothing_for_each_block() -> None:
    class Counting(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += 1
            return func(*args, **(kwargs or {}))

    def operations(depth: int) -> int:
        recipe = load_recipe("cifar10_vit_tiny_g3b", ["data.path=x", f"model.depth={depth}"])
        with Counting() as counting:
            assert len(outline(recipe).blocks) == depth
        return counting.count

    operations(1)  # also measures a block
    assert (operations(20) - operations(10)) / 10 < 40  # 33 of them make tensors


def test_the_words_of_a_recipes_name_go_together_but_for_those_that_karat_recipes_names() -> None:
    refused = set()
    for model, attention in product(part_names("model"), part_names("attention") + part_names("taught")):
        try:
            outline(load_recipe(f"flowers102_{model}_{attention}"))
        except RecipeError:
            refused.add((model, attention))
    transfers = {("swin_tiny", "transfer"), ("convit_tiny", "transfer")}
    assert refused == {("swin_tiny", "g1u"), ("swin_tiny", "g3u"), *transfers}
