"""Every basis and form against the float64 oracle, on every route through `karat_attention`."""

import re
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from karat_scale.attention import BASES, call, karat_attention, karat_scores, make_basis, reference, routes, streaming
from karat_scale.attention.bases import Basis
from karat_scale.attention.forms import FORMS, has_projector, parameter_shapes
from tests.attention.calls import LargestTensor, relative_error

SETTINGS = {"bspline": {"grid": 4, "range": 2.0}, "chebyshev": {"grid": 4}, "rational": {"orders": (3, 2)}}


class Case(NamedTuple):
    """A call of `karat_attention`, with its tensors in one tuple for autograd."""

    basis: Basis
    form: str
    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]

    def attend(self, *tensors: Tensor, function=karat_attention, **options) -> Tensor:
        query, key, value, *rest = tensors
        proj = rest.pop() if has_projector(self.form) else None
        parameters = dict(zip(self.names, rest, strict=True))
        return function(query, key, value, self.basis, parameters, proj, form=self.form, **options)

    def results(self, upstream: Tensor, dtype: torch.dtype = torch.float64, **options) -> list[Tensor]:
        """Return O, the gradient of every tensor and, if there is a bias, that of the bias."""
        leaves = [x.detach().to(dtype).requires_grad_() for x in self.tensors]
        bias = options.get("bias")
        if bias is not None:
            options["bias"] = bias = bias.detach().to(dtype).requires_grad_()
        output = self.attend(*leaves, **options)
        wanted = leaves if bias is None else [*leaves, bias]
        return [output.detach(), *torch.autograd.grad(output, wanted, upstream.to(output.dtype))]


def make_case(
    name: str, form: str = "modular", batch=2, heads=2, tokens=7, width=5, rank=3, logits=1.0, seed=0, **settings
) -> Case:
    """Return a float64 case with every parameter away from its start."""
    torch.manual_seed(seed)
    basis = make_basis(name, **(settings or SETTINGS.get(name, {})))
    shapes = parameter_shapes(basis, form, heads, tokens, rank)
    parameters = {key: torch.randn(shape, dtype=torch.float64) / 2 for key, shape in shapes.items()}
    for key, parameter in parameters.items():
        if key.endswith("scale"):
            parameter.copy_(parameter.sign() * (0.6 + parameter.abs()))
    inputs = [torch.randn(batch, heads, tokens, width, dtype=torch.float64) for _ in range(3)]
    inputs[0] *= logits
    proj = [torch.randn(heads, tokens, rank, dtype=torch.float64)] if has_projector(form) else []
    return Case(basis, form, tuple(parameters), (*inputs, *parameters.values(), *proj))


def assert_agree(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == e.shape
        assert relative_error(a, e) <= tolerance, f"tensor {i}: {relative_error(a, e):.2e}"


def upstream_of(case: Case) -> Tensor:
    return torch.randn(case.tensors[2].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(routes, "workspace_budget", lambda _: 1)
    monkeypatch.setattr(routes, "MIN_ROWS", 3)


@pytest.mark.parametrize(
    ("name", "simplex", "masked"),
    [
        *((name, both, both) for name in BASES for both in (False, True)),
        *(("morlet", True, False), ("bspline", False, True)),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_streaming_is_the_oracle(name, form, simplex, masked, small_tiles):
    case = make_case(name, form)
    bias = torch.randn(2, 7, 7, dtype=torch.float64)
    mask = torch.rand(2, 1, 7, 7) > 0.4
    mask[0, 0, 2] = False
    options = {"base": "silu" if masked else "gelu", "bias": bias, "simplex": simplex, "mask": mask if masked else None}
    actual = case.results(upstream_of(case), implementation="streaming", **options)
    assert_agree(actual, case.results(upstream_of(case), implementation="reference", **options), 1e-10)
    if masked:
        assert (actual[0][0, :, 2] == 0).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("implementation", ["reference", "streaming"])
def test_a_masked_pair_is_in_no_sum(form, implementation):
    """Each form agrees with the paper's sums, written out pair by pair over the kept pairs alone."""
    case = make_case("dog", form)
    query, key, value, *rest = case.tensors
    mask = torch.rand(7, 7) > 0.4
    raw, keep = query @ key.mT / 5**0.5, mask.double()

    def activate(scores, keep, weight, translation, scale):
        t = (scores.unsqueeze(3) - translation.unsqueeze(1)) / scale.unsqueeze(1)
        return torch.einsum("bhkpq,hpq,kq->bhkp", t * (-t * t / 2).exp(), weight, keep)

    everything = torch.ones(7, 3, dtype=torch.float64)
    expected = {
        "modular": lambda: activate(raw, keep, *rest[:3]) @ rest[-1].mT,
        "project_first": lambda: activate((raw * keep) @ rest[-1], everything, *rest[:3]),
        "two_operators": lambda: activate(activate(raw, keep, *rest[:3]), everything, *rest[3:]),
        "full_rank": lambda: activate(raw, keep, *rest[:3]),
    }[form]() * keep
    bias = torch.zeros(7, 7, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    for more in ({}, {"bias": bias}):
        learned = case.attend(*case.tensors, function=karat_scores, mask=mask, implementation=implementation, **more)
        assert relative_error(learned, expected) < 1e-12
        output = case.attend(*case.tensors, mask=mask, implementation=implementation, **more)
        assert relative_error(output, expected @ value) < 1e-12


@pytest.mark.parametrize("name", ["fourier", "bspline", "dog"])
@pytest.mark.parametrize("masked", [False, True])
def test_hidden_units_on_the_simplex(name, masked, small_tiles):
    case = make_case(name, "modular")
    mask = torch.rand(7, 7) > 0.4 if masked else None
    kept = torch.ones(7, 7, dtype=torch.float64) if mask is None else mask.double()
    query, key, value, *rest, proj = leaves = [x.requires_grad_() for x in case.tensors]
    raw = query @ key.mT / query.shape[-1] ** 0.5
    coef = case.basis.pack(dict(zip(case.names, rest, strict=True)))
    hidden = call.project(reference._units(raw, kept.expand_as(raw), coef, case.basis))
    learned = hidden @ proj.mT * kept
    expected = learned @ value
    upstream = upstream_of(case)
    wanted = [expected, *torch.autograd.grad(expected, leaves, upstream)]
    for implementation in ("reference", "streaming", "auto"):
        options = {"implementation": implementation, "simplex": "hidden", "mask": mask}
        output = case.attend(*leaves, **options)
        assert_agree([output, *torch.autograd.grad(output, leaves, upstream)], wanted, 1e-10)
        scores = case.attend(*leaves, function=karat_scores, **options)
        assert relative_error(scores, learned) < 1e-12


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("implementation", ["reference", "streaming"])
def test_scores_times_value_is_attention(form, implementation):
    case = make_case("meyer", form)
    options = {"implementation": implementation, "simplex": True}
    learned = case.attend(*case.tensors, function=karat_scores, **options)
    assert relative_error(learned @ case.tensors[2], case.attend(*case.tensors, **options)) < 1e-12
    torch.testing.assert_close(learned.sum(-1), torch.ones(2, 2, 7, dtype=torch.float64))
    assert (learned >= 0).all()


@pytest.mark.parametrize(
    ("name", "form"), [("bspline", "modular"), ("mexican_hat", "full_rank"), ("rational", "full_rank")]
)
def test_no_tensor_of_all_pairs_and_functions(name, form):
    batch, heads, (tokens, rank) = 2, 1, (300, 4) if form == "modular" else (150, 150)
    case = make_case(name, form, batch, heads, tokens, 16, rank)
    query, key, value, *rest = (x.detach().float() for x in case.tensors)
    proj = rest.pop() if form == "modular" else None
    coef = case.basis.pack(dict(zip(case.names, rest, strict=True)))
    arguments = (query, key, value, coef, proj, None, None, None, streaming.key_of(case.basis), "zero", False)
    with LargestTensor() as largest:
        output, hidden = streaming._streaming_forward(*arguments)
        streaming._streaming_backward(torch.ones_like(output), hidden, *arguments, False)
    assert largest.elements <= max(2**18, coef.numel())
    assert largest.elements < tokens * tokens * coef.shape[2]


def test_autocast_computes_in_float32():
    for form in FORMS:
        case = make_case("dog", form, tokens=20, width=16)
        inputs = [x.float() if i > 2 else x.bfloat16() for i, x in enumerate(case.tensors)]
        expected = case.attend(*(x.double() for x in inputs), implementation="reference")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = case.attend(*inputs)
        assert output.dtype == torch.bfloat16
        assert relative_error(output, expected) < 5e-3


def test_compiles_into_one_graph():
    case = make_case("bspline", "two_operators")
    compiled = torch.compile(case.attend, backend="aot_eager", fullgraph=True)
    assert relative_error(compiled(*case.tensors), case.attend(*case.tensors)) < 1e-12


def test_bad_calls_name_the_argument():
    query, key, value, weight, translation, scale, proj = make_case("dog").tensors
    given = {"weight": weight, "translation": translation, "scale": scale}
    for arguments, options, message in (
        (("dog", {"weight": weight}, proj), {}, "parameters are named weight: expected weight, translation, scale"),
        (("dog", given, None), {}, "proj has shape None: expected"),
        (("dog", given, proj), {"form": "full_rank"}, r"proj has shape \[2, 7, 3\]: expected None"),
        (("dog", given, proj), {"form": "modul"}, "form = 'modul': expected one of modular, "),
        (("dog", given, proj), {"base": "relu"}, "base = 'relu': expected one of zero, "),
        (("dogs", given, proj), {}, "basis = 'dogs': expected one of fourier, "),
        (("dog", given, proj), {"implementation": "fast"}, "implementation = 'fast': expected one of auto, "),
        (("dog", given, proj), {"implementation": "triton"}, "implementation = 'triton': it has the modular Fourier"),
        (("dog", given, proj), {"mask": torch.zeros(7, 7)}, "mask has shape"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            karat_attention(query, key, value, *arguments, **options)
    for place, name in enumerate((*given, "proj"), start=3):
        tensors = [query, key, value, weight, translation, scale, proj]
        tensors[place] = tensors[place][..., :2, :]
        with pytest.raises(ValueError, match=rf"^{name} has shape {re.escape(str(list(tensors[place].shape)))} "):
            make_case("dog").attend(*tensors)
