import pytest
import torch

from karat_scale.models import create_model
from karat_scale.models.attention_matrices import watched
from karat_scale.models.layers import attention_layers
from karat_scale.recipe import AttentionConfig, ModelConfig

SIZE = ModelConfig(
    name="vit_mini_patch4_28", image_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=4, num_classes=5
)
CONVIT = SIZE.model_copy(update={"name": "convit_tiny", "depth": 4})
SWIN = ModelConfig(name="swin_mini_patch2_window4_32", image_size=32, num_classes=5)


def _watch(attention: AttentionConfig) -> None:
    """S V, projected, must be what the block's attention gives."""
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


@pytest.mark.parametrize("kind", ["softmax", "karat"])
@pytest.mark.parametrize("host", [CONVIT, SWIN], ids=["convit", "swin"])
def test_the_matrices_of_other_hosts_are_those_they_use(host: ModelConfig, kind: str) -> None:
    """Each layer's S V, projected, is what it gives; masked pairs are 0 in A and S."""
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
