import pytest
import torch

from karat_scale.attention import FourierKaratOperator
from karat_scale.attention.functional import choosing_as_on_a_gpu
from karat_scale.foundation.errors import RecipeError
from karat_scale.models import create_model
from karat_scale.models.operators import (
    check_implementation,
    describe_implementation,
    gates,
    head_parameters,
    operators,
)
from karat_scale.recipe import AttentionConfig, ModelConfig
from tests.compilers import needs_kernels
from tests.models.test_attention_matrices import SIZE


def test_operators_by_block() -> None:
    universal = operators(create_model(SIZE, AttentionConfig(kind="karat", mode="universal", softmax_heads=2)))
    assert len({id(operator) for operator in universal}) == 1
    assert universal[0].num_heads == 2
    assert operators(create_model(SIZE, AttentionConfig())) == [None] * 3
    nested = operators(create_model(SIZE, AttentionConfig(kind="karat", residual=True, softmax_heads=2)))
    assert [type(operator) for operator in nested] == [FourierKaratOperator] * 3
    assert nested[0].num_heads == 2


def test_gates_by_block() -> None:
    model = create_model(SIZE, AttentionConfig(kind="karat", residual=True, softmax_heads=1))
    assert [gate.tolist() for gate in gates(model)] == [[0.0] * 3] * 3
    assert gates(create_model(SIZE, AttentionConfig(kind="karat"))) == [None] * 3
    # A control with a nearly closed gate would be softmax alone.
    control = create_model(SIZE, AttentionConfig(kind="static_softmax"))
    assert [gate.tolist() for gate in gates(control)] == [[1.0] * 4] * 3


def test_parameters_by_name_and_block() -> None:
    """`head_parameters` yields shared parameters once, and none of softmax."""
    blockwise = create_model(SIZE, AttentionConfig(kind="karat", softmax_heads=1))
    found = list(head_parameters(blockwise))
    assert [(name, block) for name, block, _ in found] == [
        (name, block) for block in range(3) for name in ("cos_coef", "sin_coef", "W")
    ]
    assert all(len(parameter) == 3 for _, _, parameter in found)
    universal = create_model(SIZE, AttentionConfig(kind="karat", mode="universal", form="full_rank"))
    assert [(name, block) for name, block, _ in head_parameters(universal)] == [("cos_coef", 0), ("sin_coef", 0)]
    assert not list(head_parameters(create_model(SIZE, AttentionConfig())))


@pytest.mark.parametrize("nested", [{}, {"residual": True, "softmax_heads": 1}])
def test_an_implementation_that_cannot_run_is_refused_with_its_reason(nested: dict[str, object]) -> None:
    cpu = torch.device("cpu")
    for name in ("auto", "reference", "streaming"):
        check_implementation(create_model(SIZE, AttentionConfig(kind="karat", implementation=name, **nested)), cpu)
    triton = create_model(SIZE, AttentionConfig(kind="karat", implementation="triton", base="silu", **nested))
    with pytest.raises(RecipeError, match=r"implementation = triton cannot run here: .*; use .*implementation=auto"):
        check_implementation(triton, cpu)
    other = create_model(SIZE, AttentionConfig(kind="karat", implementation="cpu", base="silu"))
    with pytest.raises(RecipeError, match="it has no base activation"):
        check_implementation(other, cpu)
    check_implementation(create_model(SIZE, AttentionConfig(kind="karat", basis="bspline")), cpu)
    check_implementation(create_model(SIZE, AttentionConfig()), cpu)


@needs_kernels
def test_the_implementation_is_named_with_what_kept_a_faster_one_away() -> None:
    cpu = torch.device("cpu")
    assert describe_implementation(create_model(SIZE, AttentionConfig()), cpu) is None
    for settings in ({"implementation": "streaming", "softmax_heads": 1}, {"basis": "bspline"}):
        model = create_model(SIZE, AttentionConfig(kind="karat", **settings))
        assert describe_implementation(model, cpu) == "attention: 3 learned layers, implementation streaming"
    model = create_model(SIZE, AttentionConfig(kind="static"))
    assert describe_implementation(model, cpu) == "attention: 3 learned layers, implementation PyTorch"
    model = create_model(SIZE, AttentionConfig(kind="karat", base="silu"))
    why = "(cpu cannot: base = 'silu'; it has no base activation)"
    line = f"attention: 3 learned layers, implementation streaming {why}"
    assert describe_implementation(model, cpu) == line
    swin = ModelConfig(name="swin_mini_patch2_window4_32", image_size=32)
    content = create_model(swin, AttentionConfig(kind="karat", form="content"))  # its scores have a bias
    assert describe_implementation(content, cpu) == "attention: 4 learned layers, implementation cpu, psi by streaming"
    model = create_model(swin, AttentionConfig(kind="karat"))
    assert describe_implementation(model, cpu) == "attention: 4 learned layers, implementation cpu"
    with choosing_as_on_a_gpu():  # two layers have window masks
        line = "attention: 4 learned layers, implementation triton"
        assert describe_implementation(model, torch.device("meta")) == line
