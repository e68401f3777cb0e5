"""Matching attention: least squares against torch.linalg.lstsq, teachers that are recovered, and gradient descent."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from karat_scale.attention import FourierKaratOperator
from karat_scale.attention.bases import Chebyshev
from karat_scale.attention.bound import BoundedHeads
from karat_scale.attention.operator import HybridHeads, KaratOperator, ResidualHeads
from karat_scale.attention.rivals import Centred, DifferentialHeads, GatedHeads, QueryOnly, SigmoidHeads
from karat_scale.attention.variants import ContentOperator, SmoothOperator, StaticHeads, WithoutScores
from karat_scale.models import create_model, matching
from karat_scale.models.matching import Call, Conversion, Original, descend, errors, least_squares, solve
from karat_scale.recipe import AttentionConfig, ModelConfig

TOKENS, HEADS, WIDTH, RANK, GRID = 10, 2, 4, 3, 2


def fourier() -> FourierKaratOperator:
    return FourierKaratOperator(TOKENS, HEADS, RANK, GRID)


def with_gains() -> FourierKaratOperator:
    """Return an operator as it is after training, with gains other than 1."""
    heads = FourierKaratOperator(TOKENS, HEADS, RANK, GRID, gains=True)
    heads.load_state_dict({**heads.state_dict(), "gain": torch.full_like(heads.gain, 0.5)})
    return heads


LINEAR: dict[str, Callable[[], Any]] = {
    "karat": fourier,
    "bound": lambda: BoundedHeads(fourier(), 3.0),
    "without scores": lambda: WithoutScores(fourier()),
    "smooth": lambda: SmoothOperator(TOKENS, HEADS, RANK, GRID, modes=6),
    "query only": lambda: QueryOnly(TOKENS, HEADS, WIDTH, RANK, GRID),
    "static": lambda: StaticHeads(TOKENS, HEADS),
    "chebyshev": lambda: KaratOperator(TOKENS, HEADS, Chebyshev(GRID), RANK),
    "gains": with_gains,
    "static beside softmax": lambda: ResidualHeads(StaticHeads(TOKENS, HEADS), 0.5),
}
# These have more parts than C and W.
IN_TURN: dict[str, Callable[[], Any]] = {
    "content": lambda: ContentOperator(fourier()),
    "bounded content": lambda: BoundedHeads(ContentOperator(fourier()), 3.0),
    "centred": lambda: Centred(TOKENS, HEADS, RANK, GRID),
    "silu": lambda: FourierKaratOperator(TOKENS, HEADS, RANK, GRID, base="silu"),
}
OTHERS: dict[str, Callable[[], Any]] = {
    "residual": lambda: ResidualHeads(fourier()),
    "bspline": lambda: KaratOperator(TOKENS, HEADS, "bspline", RANK),
    "full rank": lambda: KaratOperator(TOKENS, HEADS, "fourier", form="full_rank"),
    "differential": lambda: DifferentialHeads(HEADS, WIDTH),
    "sigmoid": lambda: SigmoidHeads(TOKENS, HEADS),
}


# The regions of a window with patches of three parts of the image.
REGIONS = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 2, 2])


def windows(images: int) -> Tensor:
    """Return masks [B, 1, N, N] of windows; every second one masks no pair."""
    parted = REGIONS[:, None] == REGIONS
    return torch.stack([parted, torch.ones_like(parted)]).repeat(images // 2, 1, 1)[:, None]


def calls_of(original: Original, images: int = 40, heads: int = HEADS, mask: Tensor | None = None) -> list[Call]:
    """Return the calls of an original with random queries, keys and values, in two batches."""
    calls = []
    for _ in range(2):
        query, key, value = (torch.randn(images // 2, heads, TOKENS, WIDTH) for _ in range(3))
        with torch.no_grad():
            original(query, key, value, torch.linspace(-0.5, 0.5, TOKENS).expand(TOKENS, TOKENS), mask)
        assert original.call is not None
        calls.append(original.call)
    return calls


@torch.no_grad()
def error(heads: Any, calls: list[Call]) -> float:
    missed = sum(float((call.answer(heads) - call.output).square().sum()) for call in calls)
    return missed / sum(float(call.output.square().sum()) for call in calls)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_least_squares_are_those_of_torch() -> None:
    """`least_squares` agrees with torch.linalg.lstsq on R = L D V, written as one system for the entries of D.

    The matrix of this system is the Kronecker product of L and V transposed.
    """
    left, right, rest = (torch.randn(7, *shape, dtype=torch.float64) for shape in ((6, 4), (3, 5), (6, 5)))
    system = torch.cat([torch.kron(own, other.mT.contiguous()) for own, other in zip(left, right, strict=True)])
    expected = torch.linalg.lstsq(system, rest.reshape(-1, 1)).solution.view(4, 3)
    parts = [(left[:3], right[:3], rest[:3]), (left[3:], right[3:], rest[3:])]
    assert torch.allclose(least_squares(parts), expected, atol=1e-5)
    plain = torch.linalg.lstsq(left.reshape(-1, 4), rest.reshape(-1, 5)).solution
    assert torch.allclose(least_squares([(left, None, rest)]), plain, atol=1e-5)


@pytest.mark.parametrize("name", LINEAR)
def test_a_teacher_of_the_same_kind_is_recovered(name) -> None:
    """A teacher of the same kind is recovered: W starts with the directions of its S, so C is exact at once."""
    original = Original(LINEAR[name]())
    calls, heads = calls_of(original), LINEAR[name]()
    assert error(heads, calls) > 0.1
    assert solve(heads, calls, rounds=2)
    assert error(heads, calls) < 1e-9


@pytest.mark.parametrize("name", ["karat", "bound", "without scores", "smooth", "query only"])
def test_a_teacher_with_masked_pairs_is_recovered(name) -> None:
    """A teacher with masked pairs is recovered in some rounds: its S has another rank than W, so W must change, too."""
    original = Original(LINEAR[name]())
    calls, heads = calls_of(original, mask=windows(20)), LINEAR[name]()
    assert solve(heads, calls, rounds=6)
    assert error(heads, calls) < 1e-6


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("name", IN_TURN)
def test_each_round_comes_closer_to_a_teacher_of_the_same_parts(name, masked) -> None:
    teacher = IN_TURN[name]()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    calls, found = calls_of(Original(teacher), mask=windows(20) if masked else None), []
    for rounds in (1, 3, 9):
        heads = IN_TURN[name]()
        assert solve(heads, calls, rounds)
        found.append(error(heads, calls))
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.05


@pytest.mark.parametrize("base", ["gelu", "silu", "identity"])
@pytest.mark.parametrize("kind", ["karat", "centred"])
def test_a_base_leaves_least_squares_as_good_as_without_one(kind: str, base: str) -> None:
    def heads(name: str) -> Any:
        of = {"karat": FourierKaratOperator, "centred": Centred}[kind]
        return of(TOKENS, HEADS, RANK, GRID, base=name)

    calls, missed = calls_of(Original(None)), {}
    for name in (base, "zero"):
        torch.manual_seed(1)
        made = heads(name)
        solve(made, calls, 2)
        missed[name] = error(made, calls)
    assert missed[base] < 1.3 * missed["zero"]


def test_more_units_than_tokens_can_all_learn() -> None:
    heads = ContentOperator(FourierKaratOperator(TOKENS, HEADS, TOKENS + 2, GRID))
    solve(heads, calls_of(Original(None)), 1)
    operator = heads.operator
    still = (operator.proj.abs().sum((0, 1)) == 0) & (operator.cos_coef.abs().sum((0, 2, 3)) == 0)
    assert not still.any()


def test_units_that_are_solved_for_in_turn_come_to_the_same(monkeypatch) -> None:
    original = Original(fourier())
    calls, heads = calls_of(original), fourier()
    monkeypatch.setattr(matching, "MOST_UNKNOWNS", 1)
    assert solve(heads, calls, rounds=12)
    assert error(heads, calls) < 1e-4


@pytest.mark.parametrize("name", ["karat", "bound", "smooth", "query only", "chebyshev"])
def test_each_round_comes_closer_to_softmax(name) -> None:
    original = Original(None)
    calls, found = calls_of(original), []
    for rounds in (1, 2, 4):
        heads = LINEAR[name]()
        assert solve(heads, calls, rounds)
        found.append(error(heads, calls))
    assert found == sorted(found, reverse=True)
    assert found[0] < 0.9


def test_a_constant_matrix_is_the_best_one() -> None:
    original, heads = Original(None), StaticHeads(TOKENS, HEADS)
    calls = calls_of(original)
    assert solve(heads, calls, rounds=1)
    least = error(heads, calls)
    with torch.no_grad():
        heads.matrix.add_(1e-2 * torch.randn_like(heads.matrix))
    assert error(heads, calls) > least


def test_softmax_heads_stay_as_they_are() -> None:
    original, heads = Original(None), HybridHeads(FourierKaratOperator(TOKENS, 1, RANK, GRID), 1)
    calls = calls_of(original)
    assert solve(heads, calls, rounds=1)
    call = calls[0]
    assert torch.allclose(call.answer(heads)[:, 0], call.output[:, 0], atol=1e-6)
    alone = FourierKaratOperator(TOKENS, 1, RANK, GRID)
    solve(alone, [one.of_heads(slice(1, None)) for one in calls], rounds=1)
    # Half of the output is softmax's own, without an error.
    assert error(heads, calls) == pytest.approx(error(alone, [c.of_heads(slice(1, None)) for c in calls]) / 2, rel=0.5)


@pytest.mark.parametrize("name", OTHERS)
def test_other_heads_and_a_constant_with_masked_pairs_are_left_to_gradient_descent(name) -> None:
    original, heads = Original(None), OTHERS[name]()
    before = {key: value.clone() for key, value in heads.state_dict().items()}
    assert not solve(heads, calls_of(original), rounds=1)
    assert not solve(StaticHeads(TOKENS, HEADS), calls_of(original, mask=windows(20)), rounds=1)
    assert all(torch.equal(value, before[key]) for key, value in heads.state_dict().items())


MODEL = ModelConfig(
    name="vit_mini_patch4_28", image_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=4
)


def conversion_of(attention: AttentionConfig) -> tuple[Conversion, Tensor]:
    """Return the conversion of a softmax model to another attention, and the softmax model's logits for some images."""
    softmax, model = create_model(MODEL, AttentionConfig()).eval(), create_model(MODEL, attention).eval()
    model.load_state_dict(softmax.state_dict(), strict=False)
    return Conversion(model, dict.fromkeys(range(2))), softmax(images()).detach()


def images(seed: int = 0) -> Tensor:
    return torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def test_a_block_has_either_attention_and_all_originals_are_the_original() -> None:
    conversion, expected = conversion_of(AttentionConfig(kind="karat", rank=4, grid=2))
    converted = conversion.model(images()).detach()
    conversion.use(())
    assert torch.allclose(conversion.model(images()), expected, atol=1e-6)
    conversion.use([1])
    assert not torch.allclose(conversion.model(images()), expected, atol=1e-3)
    conversion.use([0, 1])
    assert torch.equal(conversion.model(images()), converted)


@pytest.mark.parametrize(
    "settings",
    [{"kind": "centred"}, {"kind": "gated"}, {"kind": "karat", "mode": "universal"}, {"kind": "sigmoid"}],
    ids=lambda settings: "-".join(settings.values()),
)
def test_gradient_descent_lowers_the_errors_of_all_blocks(settings) -> None:
    conversion, _ = conversion_of(AttentionConfig(rank=4, grid=2, **settings))
    conversion.use(())
    before = errors(conversion, [0, 1], images())
    assert all(len(heads) == 2 for heads in before.values())
    steps: list[int] = []
    descend(conversion, [0, 1], [images()] * 30, 30, 0.02, 0.1, steps.append)
    assert steps == [*range(1, 31)]
    after = errors(conversion, [0, 1], images())
    if settings["kind"] == "sigmoid":  # which has no parameters
        assert after == before
    else:
        assert all(sum(after[number]) < sum(before[number]) for number in (0, 1))


def test_gradient_descent_on_s_too_brings_s_nearer_to_the_original() -> None:
    def missed(of_scores: float) -> float:
        torch.manual_seed(0)
        conversion, _ = conversion_of(AttentionConfig(kind="karat", rank=4, grid=2))
        conversion.use(())
        descend(conversion, [0, 1], [images()] * 30, 30, 0.02, of_scores, lambda step: None)
        calls = conversion.calls(images(), [0, 1])
        gaps = [call.matrix(conversion.new[number]) - call.matrix(call.original) for number, call in calls.items()]
        return float(sum(gap.detach().square().sum() for gap in gaps))

    assert missed(1.0) < 0.9 * missed(0.0)


def test_blocks_that_share_an_operator_are_one_group() -> None:
    blockwise, _ = conversion_of(AttentionConfig(kind="karat", rank=4, grid=2))
    universal, _ = conversion_of(AttentionConfig(kind="karat", rank=4, grid=2, mode="universal"))
    assert blockwise.groups() == [[0], [1]]
    assert universal.groups() == [[0, 1]]


def test_the_start_of_a_shared_operator_takes_s_of_each_block_from_its_own_original() -> None:
    """A shared operator starts from S of each block's own original, so the order of the blocks does not matter."""
    calls = [calls_of(Original(StaticHeads(TOKENS, HEADS)))[0] for _ in range(2)]
    found = [fourier(), fourier()]
    for heads, ordered in zip(found, (calls, calls[::-1]), strict=True):
        solve(heads, ordered, rounds=1)
    assert torch.allclose(*(calls[0].answer(heads) for heads in found), atol=1e-3)


def test_a_pruned_head_does_not_spoil_the_others() -> None:
    conversion, _ = conversion_of(AttentionConfig(kind="karat", rank=4, grid=2))
    qkv, heads = conversion.model.blocks[0].attn.qkv, conversion.new[0]
    for part in (qkv.weight, qkv.bias):
        part.data[64:80] = 0  # V of head 0
    conversion.use(())
    assert solve(heads, [conversion.calls(images(), [0])[0]], rounds=1)
    assert heads.proj[0].abs().max() > 0.1  # it can learn again
    descend(conversion, [0], [images()], 1, 1e-4, 0.1, lambda step: None)
    assert all(parameter.isfinite().all() for parameter in heads.parameters())
    of_pruned, of_other = errors(conversion, [0], images())[0]
    assert of_pruned == 0 < of_other < 1


def test_gated_heads_see_the_input_of_their_layer() -> None:
    original = Original(GatedHeads(HEADS, HEADS * WIDTH))
    query, key, value = (torch.randn(2, HEADS, TOKENS, WIDTH) for _ in range(3))
    x = torch.randn(2, TOKENS, HEADS * WIDTH)
    assert torch.equal(original(query, key, value, x=x), original.operator(query, key, value, x=x))
    assert original.call is not None
    assert torch.equal(original.call.matrix(original), original.operator.scores(query, key, x=x))
