"""Recomputing changes only what is kept in memory: losses and gradients are equal bit for bit."""

import copy

import pytest
import torch

from karat_scale.models import create_model
from karat_scale.models.layers import blocks_of
from karat_scale.models.recompute import Choice, choices_by_rule, recompute
from karat_scale.recipe import AttentionConfig, ModelConfig, RecomputeConfig
from tests.compilers import needs_kernels

MODEL = ModelConfig(
    name="vit_mini_patch4_28",
    image_size=16,
    patch_size=4,
    embed_dim=32,
    depth=3,
    num_classes=4,
    drop_path=0.3,
    proj_drop=0.2,
)
SOFTMAX = AttentionConfig(kind="softmax")
POLICIES = ("attention", "every", "all")


def karat(implementation: str = "streaming", **settings) -> AttentionConfig:
    return AttentionConfig(kind="karat", grid=2, rank=4, implementation=implementation, **settings)


ATTENTIONS = {
    "softmax": SOFTMAX,
    "reference": karat("reference"),
    "streaming": karat("streaming"),
    "cpu": karat("cpu"),
    "universal": karat("cpu", mode="universal"),
    "universal reference": karat("reference", mode="universal"),
    "hybrid": karat("streaming", softmax_heads=1),
    "residual": karat("cpu", residual=True),
}
ATTENTIONS_HERE = [
    pytest.param(name, marks=needs_kernels if attention.implementation == "cpu" else ())
    for name, attention in ATTENTIONS.items()
]


def build(attention: AttentionConfig, choices: tuple[Choice, ...] = (), by=None):
    torch.manual_seed(0)
    model = create_model(MODEL, attention)
    if choices:
        recompute(model, choices, by)
    return model


def loss_and_gradients(model, autocast: bool = False) -> dict[str, torch.Tensor]:
    """Return the losses and the summed gradients of two micro batches, and the random state after them."""
    torch.manual_seed(1)
    outcome = {}
    for number in range(2):
        images = torch.randn(4, 3, 16, 16)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(images)
        loss = torch.nn.functional.cross_entropy(logits.float(), torch.tensor([0, 1, 2, 3]))
        loss.backward()
        outcome[f"loss {number}"] = loss.detach()
    outcome["random"] = torch.get_rng_state()
    return outcome | {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    unequal = [name for name in left if not torch.equal(left[name], right[name])]
    assert not unequal


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("attention", ATTENTIONS_HERE)
def test_losses_and_gradients_are_bit_equal(attention: str, autocast: bool) -> None:
    plain = loss_and_gradients(build(ATTENTIONS[attention]), autocast)
    for policy in POLICIES:
        choices = choices_by_rule(RecomputeConfig(policy=policy), MODEL.depth or 0)
        assert_equal(loss_and_gradients(build(ATTENTIONS[attention], choices), autocast), plain)
    mixed = build(ATTENTIONS[attention], ("block", "attention", "nothing"))
    assert_equal(loss_and_gradients(mixed, autocast), plain)


def test_policies_choose_blocks() -> None:
    def chosen(**settings) -> tuple[Choice, ...]:
        return choices_by_rule(RecomputeConfig(**settings), 5)

    assert chosen() == ("nothing",) * 5
    assert chosen(policy="attention") == ("attention",) * 5
    assert chosen(policy="all") == ("block",) * 5
    assert chosen(policy="every") == ("nothing", "block", "nothing", "block", "nothing")
    assert chosen(policy="every", every=3) == ("nothing", "nothing", "block", "nothing", "nothing")
    assert chosen(policy="every", every=1) == ("block",) * 5


def test_names_stay_and_copies_are_independent() -> None:
    plain, model = build(karat()), build(karat(), ("block", "attention", "nothing"))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_equal(loss_and_gradients(twin), loss_and_gradients(plain))


def test_evaluation_recomputes_nothing() -> None:
    def refuse(*_):
        raise AssertionError

    model = build(karat(), ("block", "attention", "nothing"), refuse).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(model(images), build(karat()).eval()(images))


def test_a_block_of_parallel_branches_is_recomputed_whole() -> None:
    name, sizes = "vit_small_patch16_18x2_224", {"patch_size": 4, "image_size": 16, "embed_dim": 12, "num_heads": 2}
    config, found = ModelConfig(name=name, depth=2, num_classes=4, **sizes), []
    for choices in ((), ("block", "attention")):
        torch.manual_seed(0)
        model = create_model(config, karat("reference"))
        assert blocks_of(model) == list(model.blocks)
        if choices:
            recompute(model, choices)
            recomputing = [name for name, module in model.named_modules() if hasattr(module, "checkpoint")]
            assert recomputing == ["blocks.0", "blocks.1.attns.0.attn", "blocks.1.attns.1.attn"]
        found.append(loss_and_gradients(model))
    assert_equal(*found)
