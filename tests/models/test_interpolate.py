"""An operator on another grid gives nearly the same as before, as far as images are smooth."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from karat_scale.attention import KaratOperator
from karat_scale.attention.bases import BASES, make_basis
from karat_scale.attention.forms import FORMS, SECOND
from karat_scale.attention.operator import AttentionHeads
from karat_scale.attention.variants import SmoothOperator, StaticHeads
from karat_scale.models.init_from import TokenGrid, resize_operator, resize_tokens, square_grid, tokens_of

HEADS, DIM, RANK = 2, 4, 3


def operator(grid: TokenGrid, basis: str = "fourier", form: str = "modular") -> KaratOperator:
    torch.manual_seed(0)
    return KaratOperator(grid.tokens, HEADS, make_basis(basis, grid=3), RANK, form=form, implementation="streaming")


def smooth(shape: tuple[int, ...], axis: int, grid: TokenGrid, seed: int) -> Tensor:
    """Return a tensor of `shape` with slow waves over the image along `axis`, which is one of tokens."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [size for number, size in enumerate(shape) if number != axis]
    weight, phase = torch.randn(*sizes, 2, generator=generator), 6 * torch.rand(*sizes, 2, 1, 1, generator=generator)
    y, x = torch.meshgrid(*((torch.arange(n) + 0.5) / n for n in (grid.height, grid.width)), indexing="ij")
    waves = torch.cos(phase + math.pi * torch.stack((x, y))).flatten(-2)
    patches = (weight.unsqueeze(-1) * waves).sum(-2)
    prefix = torch.randn(*sizes, grid.prefix, generator=generator)
    return torch.cat((prefix, patches), -1).movedim(-1, axis)


def smooth_parameters(module: KaratOperator, grid: TokenGrid) -> dict[str, Tensor]:
    """Return parameters that are smooth along the last axis of tokens; along one before it, all patches are equal."""
    tensors = {}
    for seed, (name, tensor) in enumerate(module.state_dict().items()):
        axes = [axis for axis, size in enumerate(tensor.shape) if size == grid.tokens]
        tensors[name] = smooth(tuple(tensor.shape), axes[-1], grid, seed)
        for axis in axes[:-1]:
            one = tensors[name].narrow(axis, grid.prefix, 1)
            tensors[name] = torch.cat((tensors[name].narrow(axis, 0, grid.prefix), *[one] * grid.patches), axis)
        amplitude = name == "proj" or name.removeprefix(SECOND) in module.basis.amplitudes
        # Sums over N are near 1, and no scale of a wavelet and no denominator crosses 0.
        tensors[name] = tensors[name] / grid.tokens ** len(axes) if amplitude else 1 + 0.2 * tensors[name]
    return tensors


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("basis", sorted(BASES))
def test_the_class_token_sees_the_same_through_more_patches(basis: str, form: str) -> None:
    old, new = TokenGrid(1, 8, 8), TokenGrid(1, 12, 12)
    before, after = operator(old, basis, form), operator(new, basis, form)
    tensors = smooth_parameters(before, old)
    before.load_state_dict(tensors)
    after.load_state_dict(resize_operator(after, tensors, old, new, range(new.prefix)))

    def attend(module: KaratOperator, grid: TokenGrid) -> Tensor:
        query, key, value = (smooth((8, HEADS, grid.tokens, DIM), 2, grid, seed) for seed in (7, 8, 9))
        return module(query / 2, key, value)[:, :, 0]  # the same query at each size

    with torch.no_grad():
        left, right = attend(before, old), attend(after, new)
    assert (left - right).norm() / left.norm() < 0.03


VARIANTS = {
    "static": lambda grid: StaticHeads(grid.tokens, HEADS),
    "smooth": lambda grid: SmoothOperator(grid.tokens, HEADS, RANK, 3, 6, "streaming"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_gives_the_same_through_more_patches(name: str) -> None:
    old, new = TokenGrid(1, 8, 8), TokenGrid(1, 12, 12)
    torch.manual_seed(0)
    before, after = VARIANTS[name](old), VARIANTS[name](new)
    tensors = dict(before.state_dict())
    if name == "static":
        one = smooth((HEADS, 1, old.tokens), 2, old, 0)
        tensors["matrix"] = one.expand(HEADS, old.tokens, old.tokens) / old.tokens
    before.load_state_dict(tensors)
    after.load_state_dict(resize_operator(after, tensors, old, new, range(new.prefix)))
    assert tokens_of(after, tensors) == old.tokens

    def attend(module: AttentionHeads, grid: TokenGrid) -> Tensor:
        query, key, value = (smooth((8, HEADS, grid.tokens, DIM), 2, grid, seed) for seed in (7, 8, 9))
        return module(query / 2, key, value)[:, :, 0]

    with torch.no_grad():
        left, right = attend(before, old), attend(after, new)
    assert (left - right).norm() / left.norm() < 0.05
    same = resize_operator(before, tensors, old, old, range(old.prefix))
    assert all(torch.equal(same[key], x) for key, x in tensors.items())


@pytest.mark.parametrize("form", FORMS)
def test_the_same_grid_gives_the_same_tensors(form: str) -> None:
    grid = TokenGrid(2, 3, 3)
    module = operator(grid, form=form)
    resized = resize_operator(module, module.state_dict(), grid, grid, range(2))
    assert all(torch.equal(resized[name], x) for name, x in module.state_dict().items())


@given(
    prefix=st.integers(0, 3),
    old=st.integers(2, 9),
    new=st.integers(1, 12),
    axis=st.integers(0, 2),
    value=st.floats(-4, 4),
)
@settings(max_examples=30)
def test_a_sum_over_equal_patches_stays_and_the_prefix_is_untouched(prefix, old, new, axis, value) -> None:
    before, after = TokenGrid(prefix, old, old), TokenGrid(prefix, new, new)
    tensor = torch.full((2, 3, 4), value, dtype=torch.float64)
    tensor = tensor.narrow(axis, 0, 1).repeat_interleave(before.tokens, axis)
    tensor.narrow(axis, 0, prefix).copy_(torch.randn_like(tensor.narrow(axis, 0, prefix)))
    resized = resize_tokens(tensor, axis, before, after, before.patches / after.patches, range(prefix))
    assert torch.equal(resized.narrow(axis, 0, prefix), tensor.narrow(axis, 0, prefix))
    assert resized.shape[axis] == after.tokens
    torch.testing.assert_close(resized.sum(axis), tensor.sum(axis))


def test_rows_stay_rows() -> None:
    old, new = TokenGrid(0, 4, 2), TokenGrid(0, 8, 2)
    ramp = torch.arange(4.0).repeat_interleave(2).unsqueeze(0)
    resized = resize_tokens(ramp, 1, old, new, 1.0, ()).view(8, 2)
    assert torch.equal(resized[:, 0], resized[:, 1])
    assert (resized[1:, 0] > resized[:-1, 0]).all()


def test_a_fresh_operator_keeps_its_variance_on_smooth_images() -> None:
    old, new = TokenGrid(0, 8, 8), TokenGrid(0, 16, 16)
    before, after = operator(old), operator(new)
    after.load_state_dict(resize_operator(after, before.state_dict(), old, new, ()))

    def variance(module: KaratOperator, grid: TokenGrid) -> float:
        query, key, value = (smooth((32, HEADS, grid.tokens, DIM), 2, grid, seed) for seed in (1, 2, 3))
        return float(module(query, key, value).var())

    with torch.no_grad():
        assert variance(after, new) == pytest.approx(variance(before, old), rel=0.1)


def test_other_operators_are_refused_by_name() -> None:
    grid = TokenGrid(1, 2, 2)
    module = operator(grid)
    tensors = dict(module.state_dict())
    assert tokens_of(module, tensors) == 5
    with pytest.raises(ValueError, match=r"expected cos_coef, sin_coef, proj, not cos_coef, sin_coef"):
        resize_operator(module, {k: x for k, x in tensors.items() if k != "proj"}, grid, grid, (0,))
    with pytest.raises(ValueError, match=r"cos_coef is \[2, 3, 5, 2\] there, \[2, 3, 5, 3\] expected"):
        tokens_of(module, {**tensors, "cos_coef": tensors["cos_coef"][..., :2]})
    variant = SmoothOperator(grid.tokens, HEADS, RANK, 3, 4)
    with pytest.raises(ValueError, match=r"proj_modes is \[2, 4, 4\] there, \[2, 4, 3\] expected"):
        tokens_of(variant, {**variant.state_dict(), "proj_modes": torch.ones(HEADS, 4, RANK + 1)})
    with pytest.raises(ValueError, match="7 tokens are not 1 and a square"):
        square_grid(7, 1)
