"""Find the cheapest recomputation with which saved activations stay within a budget."""

from collections.abc import Sequence

from karat_scale.models.flops import BlockFlops
from karat_scale.models.recompute import Choice
from karat_scale.models.saved_tensors import ActivationBytes, BlockBytes


def recompute_cost(block: BlockFlops, choice: Choice) -> int:
    """Return the operations per image that a choice makes a block repeat."""
    return {"nothing": 0, "attention": block.attention, "block": block.block}[choice]


def kept_bytes(block: BlockBytes, choice: Choice) -> int:
    """Return the bytes of a block's activations that are kept until its backward pass begins."""
    if choice == "block":
        return block.input
    return block.saved - block.attention * (choice == "attention")


def peak_saved_bytes(activations: ActivationBytes, choices: Sequence[Choice]) -> int:
    """Return the most saved activations that exist at one moment of forward and backward.

    During a block's backward pass, its activations exist again, and those of later blocks are gone. For a block that
    recomputes its attention this is an upper bound: the other activations it kept have been used by then.
    """
    kept = peak = activations.outside
    for block, choice in zip(activations.blocks, choices, strict=True):
        peak = max(peak, kept + block.saved)
        kept += kept_bytes(block, choice)
    return peak


def cheapest_choices(
    activations: ActivationBytes, flops: Sequence[BlockFlops], budget: int
) -> tuple[Choice, ...] | None:
    """Return the cheapest choices whose `peak_saved_bytes` fit the budget; None if none fit."""
    # The useful beginnings, over the blocks so far: none is both costlier and larger than another.
    useful: list[tuple[int, int, tuple[Choice, ...]]] = [(0, activations.outside, ())]
    for block, operations in zip(activations.blocks, flops, strict=True):
        options: list[Choice] = ["nothing", "attention", "block"] if block.attention else ["nothing", "block"]
        longer = sorted(
            (
                (spent + recompute_cost(operations, choice), kept + kept_bytes(block, choice), (*chosen, choice))
                for spent, kept, chosen in useful
                if kept + block.saved <= budget
                for choice in options
            ),
            key=lambda beginning: beginning[:2],
        )
        useful = []
        for beginning in longer:
            if not useful or beginning[1] < useful[-1][1]:
                useful.append(beginning)
    return useful[0][2] if useful else None


def least_budget(activations: ActivationBytes) -> int:
    """Return the smallest budget that any choices fit."""
    return peak_saved_bytes(activations, ["block"] * len(activations.blocks))
