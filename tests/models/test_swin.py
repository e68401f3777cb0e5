import copy

import pytest
import torch
from timm.models.swin_transformer import WindowAttention

from karat_scale.models import create_model, parameter_count
from karat_scale.models.factory import layer_sizes
from karat_scale.models.hosts import KaratWindowAttention, SteadyWindowAttention
from karat_scale.models.init_from import take_weights
from karat_scale.models.layers import attention_layers
from karat_scale.models.operators import operators
from karat_scale.recipe import AttentionConfig, ModelConfig
from tests.models.plain import learned_attention

TINY = "swin_tiny_patch4_window7_224"
MINI = ModelConfig(name="swin_mini_patch2_window4_32", image_size=32, num_classes=4)
KARAT = AttentionConfig(kind="karat", grid=2, rank=4)


def mini(attention: AttentionConfig = KARAT, **sizes) -> torch.nn.Module:
    torch.manual_seed(0)
    return create_model(MINI.model_copy(update=sizes), attention)


def test_every_window_computes_the_equations_with_its_bias_and_mask() -> None:
    model, calls = mini().eval(), []
    for layer in attention_layers(model):
        torch.nn.init.normal_(layer.attention.relative_position_bias_table)
        layer.attention.register_forward_hook(
            lambda module, inputs, settings, out: calls.append((module, inputs[0], settings["mask"], out)),
            with_kwargs=True,
        )
    with torch.no_grad():
        model(torch.randn(2, 3, 32, 32))
        assert [mask is None for *_, mask, _ in calls] == [True, False, True, False]
        for module, x, mask, out in calls:
            attention = copy.deepcopy(module).double()
            windows, n, width = x.shape
            qkv = attention.qkv(x.double()).reshape(windows, n, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
            query, key, value = qkv
            bias = attention.relative_position_bias_table[attention.relative_position_index].permute(2, 0, 1)
            keep = None if mask is None else (mask > -1).repeat(2, 1, 1).unsqueeze(1)
            scores = query @ key.mT / query.shape[-1] ** 0.5 + bias
            heads = learned_attention(attention.operator, scores, keep) @ value
            expected = attention.proj(heads.transpose(1, 2).reshape(windows, n, width))
            torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


def test_two_sides_of_the_image_in_one_shifted_window_do_not_see_each_other() -> None:
    block = mini().layers[0].blocks[1].eval()
    assert block.shift_size == (2, 2)
    image = torch.randn(1, 16, 16, 32, requires_grad=True)
    # Rows 14, 15, 0 and 1 share windows once they are shifted by two.
    block(image)[0, 15, 8].sum().backward()
    assert image.grad is not None
    assert not image.grad[0, :14].any()
    assert image.grad[0, 14:, 6:10].abs().sum(-1).all()


@pytest.mark.parametrize("kind", ["softmax", "karat"])
def test_parameter_counts_are_the_equations(kind: str) -> None:
    attention = AttentionConfig(kind=kind)
    with torch.device("meta"):
        model = create_model(ModelConfig(name=TINY), attention)
    heads = 2 * 3 + 2 * 6 + 6 * 12 + 2 * 24
    learned = 7 * 12 * 49 * heads if kind == "karat" else 0  # (2 G + 1) r N
    assert parameter_count(model) == 28_288_354 + learned
    expected = KaratWindowAttention if kind == "karat" else SteadyWindowAttention
    assert {type(layer.attention) for layer in attention_layers(model)} == {expected}


@pytest.mark.parametrize(("image_size", "tokens"), [(224, [49] * 12), (64, [49] * 4 + [16] * 6 + [4] * 2)])
def test_a_window_that_shrinks_to_its_stage_has_an_n_of_its_own(image_size: int, tokens: list[int]) -> None:
    config = ModelConfig(name=TINY, image_size=image_size)
    assert [size.tokens for size in layer_sizes(config)] == tokens
    assert [size.sets for size in layer_sizes(config)][:2] == [(image_size // 28 + bool(image_size % 28)) ** 2] * 2
    with torch.device("meta"):
        model = create_model(config, KARAT)
        assert [operator.num_tokens for operator in operators(model) if operator] == tokens
        assert model(torch.empty(1, 3, image_size, image_size)).shape == (1, 1000)


@pytest.mark.parametrize("image_size", [48, 8])
def test_weights_of_another_image_size(image_size: int) -> None:
    """Weights fit another image size; only 8 px, where windows of the second stage are 2 x 2, needs interpolation."""
    source, target = mini(), mini(image_size=image_size, num_classes=3)
    notes = take_weights(target, source.state_dict())
    assert "the head is new: the weights have 4 classes, the model 3" in notes
    assert ("interpolated from 4 x 4 patches" in notes) == (image_size == 8)
    first, second = (model.layers[0].blocks[1].attn for model in (source, target))
    assert torch.equal(first.operator.cos_coef, second.operator.cos_coef)
    assert torch.equal(first.relative_position_bias_table, second.relative_position_bias_table)
    assert target(torch.randn(1, 3, image_size, image_size)).isfinite().all()


def test_softmaxs_weights_begin_a_karat_swin() -> None:
    model = mini()
    assert "operators keep their initial values" in take_weights(model, mini(AttentionConfig()).state_dict())


@pytest.mark.parametrize("of", [SteadyWindowAttention, KaratWindowAttention])
def test_the_gradient_of_a_bias_has_the_same_bits_with_several_threads(of: type[SteadyWindowAttention]) -> None:
    layer, upstream, found = of(32, 16, window_size=7), torch.randn(1, 16, 49, 49), []
    before = torch.get_num_threads()
    try:
        for threads in (1, *[3] * 20):  # three would share a head's 2,401 entries
            torch.set_num_threads(threads)
            found += torch.autograd.grad(layer._get_rel_pos_bias(), layer.relative_position_bias_table, upstream)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(grad, found[0]) for grad in found)
    assert torch.equal(layer._get_rel_pos_bias(), WindowAttention._get_rel_pos_bias(layer))
