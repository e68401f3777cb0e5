"""A model that runs with other attention matrices than its own."""

import pytest
import torch
from torch import nn

from karat_scale.models import create_model
from karat_scale.models.attention_matrices import can_be_replaced, mean_over_queries, replaced
from karat_scale.recipe import AttentionConfig, ModelConfig
from tests.models.test_attention_matrices import SIZE

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
    """A constant matrix is its mean over images, and equal rows are their mean."""
    model, images = model_of(name), torch.randn(4, 3, 16, 16)
    expected = model(images)
    changed = []
    for average in (mean_over_queries, lambda _, learned: learned.mean(0, keepdim=True).expand_as(learned)):
        with replaced(model, average):
            changed.append(not torch.allclose(model(images), expected, rtol=1e-3, atol=1e-3))
    assert changed == {"static": [True, False], "without scores": [False, False]}.get(name, [True, True])


def test_only_plain_vits_can() -> None:
    assert can_be_replaced(model_of("karat"))
    swin = ModelConfig(name="swin_mini_patch2_window4_32", image_size=32, num_classes=3)
    assert not can_be_replaced(create_model(swin, AttentionConfig()))
