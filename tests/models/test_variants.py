"""Controls and variants of attention by recipe: every host takes them, they learn, and their operations are counted."""

import pytest
import torch

from karat_scale.foundation.tables import ATTENTIONS
from karat_scale.models import create_model
from karat_scale.models.flops import flops_per_image
from karat_scale.models.init_from import take_weights
from karat_scale.models.operators import head_parameters, operators
from karat_scale.recipe import AttentionConfig, ModelConfig

SECTIONS = {
    **{kind: {"kind": kind} for kind in ATTENTIONS if kind not in ("softmax", "karat")},
    "without scores": {"kind": "karat", "scores": False},
    "content": {"kind": "karat", "form": "content"},
    "smooth": {"kind": "karat", "form": "smooth", "modes": 4},
    "hybrid": {"kind": "static", "softmax_heads": 1},
    "universal": {"kind": "karat", "form": "content", "mode": "universal"},
    "residual": {"kind": "karat", "form": "smooth", "modes": 4, "residual": True},
    "bounded": {"kind": "karat", "bound": 2.0},
}
HOSTS = {
    "vit": {"name": "vit_mini_patch4_28", "image_size": 16, "embed_dim": 32, "depth": 2},
    "swin": {"name": "swin_mini_patch2_window4_32", "image_size": 32},
    "convit": {"name": "convit_tiny", "image_size": 32, "depth": 3, "num_heads": 4, "embed_dim": 48},
    "distilled": {"name": "deit_tiny_distilled_patch16_224", "image_size": 64, "depth": 2},
    "register": {"name": "vit_wee_patch16_reg1_gap_256", "image_size": 64, "depth": 2},
    "siglip": {"name": "vit_base_patch16_siglip_224", "image_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 3},
    "pit": {"name": "pit_ti_224", "image_size": 64},
    "mobilevit": {"name": "mobilevit_xs", "image_size": 96},
}
BUILT = [
    *((name, "vit") for name in SECTIONS),
    # Heads with parameters of each token, of a width, or of the layer's input; scores with a bias and a mask.
    *(
        (name, "swin")
        for name in ("static", "softmax_bias", "query_only", "gated", "differential", "content", "smooth")
    ),
    *((name, "convit") for name in ("static", "query_only", "gated", "universal", "bounded")),
    ("smooth", "distilled"),
    ("content", "register"),
    ("content", "siglip"),
    ("static", "pit"),
    ("scaled_softmax", "mobilevit"),
]


def make(host, **section):
    torch.manual_seed(0)
    return create_model(ModelConfig(**HOSTS[host], num_classes=3), AttentionConfig(rank=3, grid=2, **section))


@pytest.mark.parametrize(("name", "host"), BUILT)
def test_all_that_it_learns_has_a_gradient(name, host):
    model = make(host, **SECTIONS[name])
    for parameter in model.parameters():  # parameters that start at zero stop the gradients behind them
        torch.nn.init.normal_(parameter, std=0.1)
    model.train()
    size = HOSTS[host]["image_size"]
    torch.nn.functional.cross_entropy(model(torch.randn(2, 3, size, size)), torch.tensor([0, 2])).backward()
    learned = {key: p for key, p in model.named_parameters() if ".operator." in key}
    idle = {key.rpartition(".")[2] for key, p in learned.items() if p.grad is None or not p.grad.any()}
    assert idle == ({"sin_coef"} if name == "without scores" else set())  # sin(0) is 0
    assert bool(list(head_parameters(model))) == bool(learned)
    assert bool(learned) == (name not in ("sigmoid", "polynomial"))


@pytest.mark.parametrize(("host", "size"), [("swin", 8), ("mobilevit", 192)])
def test_smooth_changes_its_image_size_in_hosts_without_positions(host, size):
    source = make(host, **SECTIONS["smooth"])
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            if "_modes" in name:
                parameter.add_(0.1)
    sized = ModelConfig(**{**HOSTS[host], "image_size": size}, num_classes=3)
    target = create_model(sized, AttentionConfig(rank=3, grid=2, **SECTIONS["smooth"]))
    assert "interpolated from" in take_weights(target, source.state_dict())
    for before, after in zip(operators(source), operators(target), strict=True):
        # At a score of 0, the sum over the keys stays the same.
        torch.testing.assert_close(after.cos_coef.sum(2), before.cos_coef.sum(2), rtol=0.1, atol=0.05)


@pytest.mark.parametrize("name", SECTIONS)
def test_minus_infinity_in_a_float_mask_keeps_a_pair_out(name):
    layer = make("vit", **SECTIONS[name]).blocks[0].attn
    tokens, keep = torch.randn(2, 17, 32), torch.rand(1, 1, 17, 17) > 0.3
    added = torch.zeros(keep.shape).masked_fill(~keep, -torch.inf)
    torch.testing.assert_close(layer(tokens, attn_mask=added), layer(tokens, attn_mask=keep))


def test_functions_are_those_of_operators_that_have_some():
    assert operators(make("vit", kind="static")) == [None, None]
    assert all(operator is not None for operator in operators(make("vit", kind="karat", form="content")))
    assert all(operator is not None for operator in operators(make("vit", kind="karat", scores=False)))


def test_operations_are_counted():
    model = ModelConfig(**HOSTS["vit"], num_classes=3)
    tokens, heads, width, blocks = 17, 2, 16, 2
    counted = {n: flops_per_image(model, AttentionConfig(rank=3, grid=2, **s)).forward for n, s in SECTIONS.items()}
    softmax = flops_per_image(model, AttentionConfig()).forward
    assert flops_per_image(model, AttentionConfig(kind="sigmoid")) == flops_per_image(model, AttentionConfig())
    a_product = blocks * heads * 2 * tokens * tokens * width
    assert counted["static"] == softmax - a_product
    assert counted["static_softmax"] == softmax + a_product
    assert {counted[name] for name in ("softmax_bias", "sigmoid", "polynomial", "differential")} == {softmax}
    assert counted["gated"] == softmax + blocks * 2 * tokens * heads * (heads * width)
    products = 4 * tokens * 3 * width  # of W and V, and of H and W V, or of L, R and V
    without = softmax - 2 * a_product
    assert counted["query_only"] == without + blocks * heads * (products + 4 * tokens * width * 2 * 3)
    plain = flops_per_image(model, AttentionConfig(rank=3, grid=2, kind="karat")).forward
    assert counted["without scores"] == counted["smooth"] == counted["bounded"] == plain
    assert counted["centred"] == plain + blocks * heads * products
    assert counted["content"] == plain + a_product + blocks * heads * tokens * tokens * 4 * 2
