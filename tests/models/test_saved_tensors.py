"""Saved bytes against sizes worked out by hand, and against what a model's parts add up to."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from karat_scale.attention import FourierKaratOperator
from karat_scale.models import create_model
from karat_scale.models.saved_tensors import activation_bytes, saved_bytes
from karat_scale.recipe import AttentionConfig, ModelConfig

FLOAT = 4
BATCH, HEADS, TOKENS, WIDTH, RANK = 2, 2, 17, 16, 4


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


class TimesItself(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        doubled = 2 * x
        ctx.save_for_backward(x, doubled)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[1]


def test_known_operations_keep_what_their_derivatives_need() -> None:
    x = torch.randn(8, 32, requires_grad=True)
    size = x.numel() * FLOAT
    assert saved_bytes(nn.Linear(32, 8), x) == 0  # its input and weight live anyway
    assert saved_bytes(nn.Sequential(nn.Linear(32, 64), nn.GELU()), x) == 8 * 64 * FLOAT
    assert saved_bytes(Function(lambda x: (2 * x).exp()), x) == size  # exp keeps its output
    assert saved_bytes(Function(lambda x: x + 1), x) == 0
    assert saved_bytes(Function(TimesItself.apply), x) == size
    assert saved_bytes(Function(TimesItself.apply), x.detach()) == 0


def test_a_storage_counts_once_and_whole() -> None:
    x = torch.randn(8, 32, requires_grad=True)

    def twice(x):
        y = x + 1  # kept by three products, once as a part of itself
        return (y * y).sum() + (y[:, :2] * y[:, 2:4]).sum()

    assert saved_bytes(Function(twice), x) == x.numel() * FLOAT
    assert saved_bytes(Function(lambda x: ((x + 1)[:, :2] ** 2).sum()), x) == x.numel() * FLOAT


def test_a_checkpoint_keeps_its_input_alone() -> None:
    layer = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    x = torch.randn(8, 32, requires_grad=True)
    through = Function(lambda x: checkpoint(layer, x + 1, use_reentrant=False))
    assert saved_bytes(through, x) == x.numel() * FLOAT


@pytest.mark.parametrize("implementation", ["streaming", "cpu"])
def test_a_fused_attention_keeps_h_beside_its_inputs(implementation: str) -> None:
    operator = FourierKaratOperator(TOKENS, HEADS, RANK, 2, implementation=implementation)
    heads = [torch.randn(BATCH, HEADS, TOKENS, WIDTH, requires_grad=True) for _ in range(3)]
    kept = saved_bytes(operator, *heads)
    width = 16 if implementation == "streaming" else RANK  # streaming pads the rank, and so copies the parameters
    hidden = BATCH * HEADS * TOKENS * width * FLOAT
    copies = HEADS * (4 + 1) * TOKENS * width * FLOAT if implementation == "streaming" else 0
    assert kept == hidden + copies


def test_the_reference_attention_keeps_n_by_n_tensors() -> None:
    operator = FourierKaratOperator(TOKENS, HEADS, RANK, 2, implementation="reference")
    heads = [torch.randn(BATCH, HEADS, TOKENS, WIDTH, requires_grad=True) for _ in range(3)]
    assert saved_bytes(operator, *heads) > 5 * BATCH * HEADS * TOKENS**2 * FLOAT


@pytest.mark.parametrize("kind", ["softmax", "karat"])
@pytest.mark.parametrize("implementation", ["reference", "streaming", "auto"])
def test_parts_add_up_to_the_whole_and_random_numbers_are_left_alone(kind: str, implementation: str) -> None:
    model = create_model(
        ModelConfig(
            name="vit_mini_patch4_28",
            image_size=16,
            patch_size=4,
            embed_dim=32,
            depth=3,
            num_classes=4,
            drop_path=0.2,
            proj_drop=0.1,
        ),
        AttentionConfig(kind=kind, grid=2, rank=4, implementation=implementation),
    ).train()
    images = torch.randn(4, 3, 16, 16)
    state = torch.get_rng_state()
    parts = activation_bytes(model, images)
    assert parts.outside + sum(block.saved for block in parts.blocks) == saved_bytes(model, images)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(parts.blocks) == 3
    tokens = 4 * TOKENS * 32 * FLOAT
    for block in parts.blocks:
        assert block.input == tokens
        assert tokens < block.attention < block.saved
    meta = model.to("meta")
    if implementation != "auto" or kind == "softmax":  # the compiled kernel is the CPU's alone
        on_meta = activation_bytes(meta, images.to("meta"))
        assert [block.input for block in on_meta.blocks] == [tokens] * 3
    if implementation == "reference" and kind == "karat":
        assert on_meta == parts


def test_counted_passes_have_no_backward() -> None:
    layer, kept = nn.Linear(3, 3), []
    saved_bytes(Function(lambda x: kept.append(layer(x + 1).exp().sum())), torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="only counted"):
        kept[0].backward()
