"""Tests of shards: a change from any layout to another keeps every element and adds none."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from karat_scale.engine.shards import Fragment, Pieces, zero_padding


def _flat_shards(sizes: list[int], ranks: int, padding: int) -> list[tuple[list[Fragment], int]]:
    """Return all parameters end to end, cut into equal shards, as stages 1 and 2 do."""
    length = -(-(sum(sizes) + padding) // ranks)
    shards = []
    for rank in range(ranks):
        fragments, offset = [], 0
        for number, size in enumerate(sizes):
            low, high = max(offset, rank * length), min(offset + size, (rank + 1) * length)
            if low < high:
                fragments.append(Fragment(str(number), low - offset, low - rank * length, high - low))
            offset += size
        shards.append((fragments, length))
    return shards


def _cut_parameters(sizes: list[int], ranks: int) -> list[tuple[list[Fragment], int]]:
    """Return each parameter cut into equal parts, where a shard has one part of each, as stage 3 does."""
    shards = []
    for rank in range(ranks):
        fragments, offset = [], 0
        for number, size in enumerate(sizes):
            part = -(-size // ranks)
            length = min(part, size - rank * part)
            if length > 0:
                fragments.append(Fragment(str(number), rank * part, offset, length))
            offset += part
        shards.append((fragments, offset))
    return shards


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    before=st.integers(1, 4),
    after=st.integers(1, 4),
    padding=st.integers(0, 3),
)
def test_flat_shards_become_cut_parameters_and_flat_shards_again(sizes, before, after, padding) -> None:
    parameters = [torch.arange(size) + 100.0 * number for number, size in enumerate(sizes)]
    whole = Pieces()
    for number, parameter in enumerate(parameters):
        whole.add([Fragment(str(number), 0, 0, parameter.numel())], parameter)
    for shards in (_flat_shards(sizes, before, padding), _cut_parameters(sizes, after), _flat_shards(sizes, after, 0)):
        pieces = Pieces()
        for fragments, length in shards:
            master = torch.full((length,), float("nan"))
            whole.fill(fragments, master)
            assert not master.isnan().any()
            pieces.add(fragments, master)
        whole = pieces
    for number, parameter in enumerate(parameters):
        out = torch.empty_like(parameter)
        whole.fill([Fragment(str(number), 0, 0, parameter.numel())], out)
        assert torch.equal(out, parameter)


def test_missing_elements_are_an_error() -> None:
    pieces = Pieces()
    pieces.add([Fragment("a", 0, 0, 3)], torch.arange(3.0))
    with pytest.raises(KeyError, match="a is not whole"):
        pieces.fill([Fragment("a", 0, 0, 4)], torch.empty(4))
    with pytest.raises(KeyError, match="b is not whole"):
        pieces.fill([Fragment("b", 0, 0, 1)], torch.empty(1))


def test_only_padding_is_zeroed() -> None:
    master = torch.ones(9)
    zero_padding([Fragment("b", 0, 5, 2), Fragment("a", 0, 1, 2)], master)
    assert master.tolist() == [0, 1, 1, 0, 0, 1, 1, 0, 0]
