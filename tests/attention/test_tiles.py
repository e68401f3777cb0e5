"""The plan of tiles: it covers everything once and keeps its bound."""

from hypothesis import given
from hypothesis import strategies as st

from karat_scale.attention.routes import MIN_ROWS, plan_tiles, split


@given(total=st.integers(0, 500), largest=st.integers(1, 60))
def test_split_covers_everything_once_in_near_equal_parts(total, largest):
    parts = split(total, largest)
    assert [i for part in parts for i in range(total)[part]] == list(range(total))
    sizes = {part.stop - part.start for part in parts}
    assert all(0 < size <= largest for size in sizes)
    assert not sizes or max(sizes) - min(sizes) <= 1


@given(batch=st.integers(1, 40), tokens=st.integers(1, 300), row=st.integers(1, 2**13), budget=st.integers(1, 2**20))
def test_no_tile_exceeds_the_budget(batch, tokens, row, budget):
    tiling = plan_tiles(batch, tokens, row, budget)
    pairs = [(i, k) for b, r in tiling.tiles() for i in range(batch)[b] for k in range(tokens)[r]]
    assert sorted(pairs) == [(i, k) for i in range(batch) for k in range(tokens)]
    for b, r in tiling.tiles():
        size = (b.stop - b.start) * (r.stop - r.start) * row
        assert size <= max(budget, MIN_ROWS * row)
