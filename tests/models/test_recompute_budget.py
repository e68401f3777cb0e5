"""The budget's choice against every possible one."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from karat_scale.models import create_model
from karat_scale.models.flops import BlockFlops, flops_by_block
from karat_scale.models.recompute import (
    Choice,
    cheapest_choices,
    kept_bytes,
    least_budget,
    peak_saved_bytes,
    recompute_cost,
)
from karat_scale.models.saved_tensors import ActivationBytes, BlockBytes, activation_bytes
from karat_scale.recipe import AttentionConfig, ModelConfig

CHOICES: tuple[Choice, ...] = ("nothing", "attention", "block")


@st.composite
def blocks(draw) -> BlockBytes:
    tokens, attention, rest = draw(st.integers(1, 9)), draw(st.integers(0, 30)), draw(st.integers(0, 30))
    return BlockBytes(tokens, tokens + attention + rest, attention)


costs = st.lists(
    st.builds(lambda attention, rest: BlockFlops(attention, attention + rest), st.integers(1, 9), st.integers(0, 9)),
    min_size=5,
    max_size=5,
)
models = st.builds(ActivationBytes, st.integers(0, 20), st.lists(blocks(), min_size=1, max_size=5).map(tuple))


@given(models, costs, st.integers(0, 320))
def test_the_choice_fits_and_no_cheaper_one_does(
    activations: ActivationBytes, flops: list[BlockFlops], budget: int
) -> None:
    flops = flops[: len(activations.blocks)]

    def cost(choices: tuple[Choice, ...]) -> int:
        return sum(map(recompute_cost, flops, choices))

    every = list(itertools.product(CHOICES, repeat=len(activations.blocks)))
    fitting = [choices for choices in every if peak_saved_bytes(activations, choices) <= budget]
    chosen = cheapest_choices(activations, flops, budget)
    assert (chosen is None) == (not fitting)
    assert (chosen is None) == (budget < least_budget(activations))
    if chosen is not None:
        assert chosen in fitting
        assert cost(chosen) == min(map(cost, fitting))


@given(models)
def test_the_peak_is_the_largest_of_all_moments(activations: ActivationBytes) -> None:
    for choices in itertools.product(CHOICES, repeat=len(activations.blocks)):
        kept = [kept_bytes(block, choice) for block, choice in zip(activations.blocks, choices, strict=True)]
        moments = [
            activations.outside + sum(kept[:number]) + block.saved for number, block in enumerate(activations.blocks)
        ]
        assert peak_saved_bytes(activations, choices) == max(moments)
        assert activations.outside + sum(kept) <= max(moments)


def test_attention_that_holds_the_most_is_recomputed_first() -> None:
    """The naive attention holds nearly all that a block keeps, at less than a block's cost."""
    config = ModelConfig(name="vit_mini_patch4_28", image_size=64, patch_size=4, embed_dim=32, depth=4, num_classes=4)
    attention = AttentionConfig(kind="karat", implementation="reference")
    activations = activation_bytes(create_model(config, attention), torch.zeros(1, 3, 64, 64))
    flops = flops_by_block(config, attention)
    assert all(0 < block.attention < block.block for block in flops)
    nothing = peak_saved_bytes(activations, ["nothing"] * 4)
    assert cheapest_choices(activations, flops, nothing) == ("nothing",) * 4
    chosen = cheapest_choices(activations, flops, nothing - 1)
    assert chosen is not None
    assert (chosen.count("attention"), chosen.count("nothing")) == (1, 3)
