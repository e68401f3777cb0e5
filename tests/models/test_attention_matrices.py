"""The attention matrices of a model: those that it uses, and others in their place."""

import pytest
import torch
from torch import nn

from karat_scale.models import create_model
from karat_scale.models.attention_matrices import can_be_replaced, mean_over_queries, replaced, watched
from karat_scale.models.layers import attention_layers
from karat_scale.recipe import AttentionConfig, ModelConfig

SIZE = ModelConfig(
    name="vit_mini_patch4_28", image_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=4, num_classes=5
)
CONVIT = SIZE.model_copy(update={"name": "convit_tiny", "depth": 4})
SWIN = ModelConfig(name="swin_mini_patch2_window4_32", image_size=32, num_classes=5)


def _watch(attention: AttentionConfig) -> None:
    """Assert that S V, projected, is the output of each block's attention."""
    torch.manual_seed(0)
    model = create_model(SIZE, attention).eval()
    seen, outputs = [], []
    for block in model.blocks:
        block.attn.register_forward_hook(lambda module, inputs, out: outputs.append((module, inputs[0], out)))
    with watched(model, lambda number, raw, learned: seen.append((number, raw, learned))), torch.no_grad():
        model(torch.randn(2, 3, 16, 16))
    assert [number for number, _, _ in seen] == [0, 1, 2]
    for (_, raw, learned), (module, x, out) in zip(seen, outputs, strict=True):
        assert raw.shape == learned.shape == (2, 4, 17, 17)
        value = module.qkv(x).reshape(2, 17, 3, 4, 8).permute(2, 0, 3, 1, 4)[2]
        again = module.proj((learned @ value).transpose(1, 2).reshape(2, 17, 32))
        torch.testing.assert_close(again, out, rtol=1e-4, atol=1e-5)


def test_softmax_blockwise_universal_and_hybrid_heads_give_the_matrices_they_use() -> None:
    _watch(AttentionConfig(kind="softmax"))
    _watch(AttentionConfig(kind="karat"))
    _watch(AttentionConfig(kind="karat", mode="universal", basis="bspline", form="full_rank"))
    _watch(AttentionConfig(kind="karat", softmax_heads=1))
    _watch(AttentionConfig(kind="karat", residual=True))
    _watch(AttentionConfig(kind="karat", bound=0.1, residual=True, softmax_heads=1))


@pytest.mark.parametrize("host", [CONVIT, SWIN], ids=["convit", "swin"])
def test_scores_keep_to_their_bound_and_a_swins_bias_comes_on_top(host: ModelConfig) -> None:
    torch.manual_seed(0)
    model = create_model(host, AttentionConfig(kind="karat", bound=0.1)).eval()
    for name, parameter in model.named_parameters():
        if "relative_position_bias" in name:
            nn.init.constant_(parameter, 1.0)
        elif "qkv.weight" in name:
            nn.init.normal_(parameter)
    seen: dict[int, torch.Tensor] = {}
    with watched(model, lambda number, raw, _: seen.update({number: raw[raw != 0]})), torch.no_grad():
        model(torch.randn(2, 3, host.image_size, host.image_size))
    for number, layer in enumerate(attention_layers(model)):
        if hasattr(layer.attention, "operator"):
            bias = 1.0 if host is SWIN else 0.0
            assert 0.05 < float((seen[number] - bias).abs().max()) < 0.1


@pytest.mark.parametrize("kind", ["softmax", "karat"])
@pytest.mark.parametrize("host", [CONVIT, SWIN], ids=["convit", "swin"])
def test_the_matrices_of_other_hosts_are_those_they_use(host: ModelConfig, kind: str) -> None:
    """S V, projected, is the output of each layer's attention, and masked pairs are 0 in A and S."""
    torch.manual_seed(0)
    model = create_model(host, AttentionConfig(kind=kind, grid=2)).eval()
    seen, calls = [], []
    for layer in attention_layers(model):
        layer.attention.register_forward_hook(lambda module, inputs, out: calls.append((module, inputs[0], out)))
    with watched(model, lambda _, raw, learned: seen.append((raw, learned))), torch.no_grad():
        model(torch.randn(2, 3, host.image_size, host.image_size))
    assert len(seen) == len(calls) == 4
    for (raw, learned), (module, x, out) in zip(seen, calls, strict=True):
        values = module.v(x) if hasattr(module, "v") else module.qkv(x).chunk(3, -1)[2]
        value = values.unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
        again = module.proj((learned @ value).transpose(1, 2).flatten(2))
        torch.testing.assert_close(again, out, rtol=1e-4, atol=1e-5)
        assert not (raw[learned == 0]).any()


def test_nothing_is_watched_afterwards() -> None:
    model = create_model(SIZE, AttentionConfig(kind="karat"))
    with watched(model, lambda *_: None):
        pass
    assert not any(block.attn._forward_pre_hooks for block in model.blocks)


KINDS = {
    "softmax": {},
    "karat": {"kind": "karat"},
    "hybrid": {"kind": "karat", "softmax_heads": 1},
    "static": {"kind": "static"},
    "without scores": {"kind": "karat", "scores": False},
}


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = create_model(SIZE, AttentionConfig(rank=3, **KINDS[name])).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_its_own_matrices_change_nothing(name: str) -> None:
    model, images = model_of(name), torch.randn(4, 3, 16, 16)
    expected = model(images)
    with replaced(model, lambda _, learned: learned):
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(model(images), expected)


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_averages_change_what_depends_on_more(name: str) -> None:
    """An average changes the output only if S depends on what is averaged over.

    A constant matrix is its mean over images, and equal rows are their mean over queries.
    """
    model, images = model_of(name), torch.randn(4, 3, 16, 16)
    expected = model(images)
    changed = []
    for average in (mean_over_queries, lambda _, learned: learned.mean(0, keepdim=True).expand_as(learned)):
        with replaced(model, average):
            changed.append(not torch.allclose(model(images), expected, rtol=1e-3, atol=1e-3))
    assert changed == {"static": [True, False], "without scores": [False, False]}.get(name, [True, True])


def test_only_plain_vits_can() -> None:
    assert can_be_replaced(model_of("karat"))
    assert not can_be_replaced(create_model(SWIN, AttentionConfig()))
