import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from karat_scale.attention import KaratOperator
from karat_scale.models.flops import Flops, flops_per_image
from karat_scale.recipe import AttentionConfig, ModelConfig

TINY = ModelConfig(name="vit_tiny_patch16_224")
SMALL = ModelConfig(
    name="vit_mini_patch4_28", image_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=4
)
N, D, WIDTH, HEADS, BLOCKS = 197, 192, 64, 3, 12  # ViT-Tiny at 224 px
PATCHES = 2 * 196 * 768 * D
OUTSIDE = PATCHES + BLOCKS * 2 * N * 12 * D * D + 2 * D * 1000


def test_softmax_is_the_closed_form_of_a_vit() -> None:
    forward = OUTSIDE + BLOCKS * HEADS * 4 * N * N * WIDTH
    assert flops_per_image(TINY, AttentionConfig()) == Flops(forward, 3 * forward - PATCHES)


@pytest.mark.parametrize("mode", ["blockwise", "universal"])
@pytest.mark.parametrize(("grid", "rank"), [(1, 12), (3, 12), (5, 8)])
def test_modular_fourier_is_the_papers_algebra(grid: int, rank: int, mode: str) -> None:
    head = 2 * N * N * WIDTH + 4 * N * N * grid * rank + 4 * N * rank * WIDTH
    forward = OUTSIDE + BLOCKS * HEADS * head
    attention = AttentionConfig(kind="karat", grid=grid, rank=rank, mode=mode)
    assert flops_per_image(TINY, attention) == Flops(forward, 3 * forward - PATCHES)


@pytest.mark.parametrize("mode", ["blockwise", "universal"])
def test_hybrid_heads_are_counted_each_by_its_own(mode: str) -> None:
    softmax = flops_per_image(TINY, AttentionConfig())
    karat = flops_per_image(TINY, AttentionConfig(kind="karat", mode=mode))
    hybrid = flops_per_image(TINY, AttentionConfig(kind="karat", softmax_heads=1, mode=mode))
    assert hybrid.forward * 3 == softmax.forward + 2 * karat.forward
    residual = flops_per_image(TINY, AttentionConfig(kind="karat", residual=True, mode=mode))
    assert residual.forward == softmax.forward + karat.forward - OUTSIDE


@pytest.mark.parametrize("basis", ["fourier", "bspline", "chebyshev"])
@pytest.mark.parametrize("form", ["modular", "full_rank", "two_operators", "project_first"])
def test_what_the_reference_computes_is_counted_or_is_the_detour_it_takes(basis: str, form: str) -> None:
    n, heads, d, rank = 17, 2, 16, 4
    operator = KaratOperator(n, heads, basis, rank, form=form, implementation="reference")
    query = torch.randn(1, heads, n, d)
    with FlopCounterMode(display=False) as counter:
        operator(query, query, query)
    # Modular: S is formed, so O = (H W^T) V in place of H (W^T V). Two operators: three products of H with identities.
    detour = {"modular": 2 * n * n * (rank + d) - 4 * n * rank * d, "two_operators": 6 * n * rank * rank}.get(form, 0)
    assert counter.get_total_flops() == operator.flops(n, d) + heads * detour


@pytest.mark.parametrize("softmax_heads", [0, 1])
def test_every_form_and_basis_is_counted_without_memory(softmax_heads: int) -> None:
    softmax = flops_per_image(SMALL, AttentionConfig()).forward
    for basis in ("rational", "morlet", "shannon"):
        for form in ("modular", "full_rank"):
            attention = AttentionConfig(kind="karat", basis=basis, form=form, softmax_heads=softmax_heads)
            count = flops_per_image(SMALL, attention)
            assert count.forward > softmax
            assert 2.5 * count.forward < count.training < 3 * count.forward


@pytest.mark.parametrize("kind", ["sigmoid", "polynomial", "scaled_softmax", "softmax_bias", "gated", "differential"])
def test_products_without_parameters_have_the_gradients_of_their_factors(kind: str) -> None:
    whole = flops_per_image(TINY, AttentionConfig(kind=kind))
    frozen = flops_per_image(TINY, AttentionConfig(kind=kind), ["[!h]*"])  # all but head.*
    assert frozen.training == frozen.forward + 2 * D * 1000
    if kind not in ("sigmoid", "polynomial"):
        assert flops_per_image(TINY, AttentionConfig(kind=kind), ["*.operator.*"]).training == whole.training


def test_a_mask_of_pairs_makes_projected_keys_need_the_scores() -> None:
    operator = KaratOperator(17, 2, "fourier", 4, form="project_first")
    assert operator.flops(17, 16, masked=True) - operator.flops(17, 16) == 2 * (2 * 17**2 * (16 + 4) - 4 * 17 * 4 * 16)


@pytest.mark.parametrize("section", [{}, {"kind": "karat"}])
def test_frozen_parameters_need_no_gradient(section: dict[str, str]) -> None:
    model, attention = TINY, AttentionConfig(**section)
    whole = flops_per_image(model, attention)
    head = flops_per_image(model, attention, ["[!h]*"])  # all but head.*
    assert head.forward == whole.forward
    classifier = 2 * D * 1000
    assert head.training == head.forward + classifier
    # Without their own gradients, functions still pass those of queries and keys on.
    frozen = flops_per_image(model, attention, ["*.operator.*"] if section else ["head.weight"])
    assert whole.forward < frozen.training < whole.training
