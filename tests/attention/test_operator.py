"""The module: parameters, starts, gradients and state."""

import sys

import pytest
import torch

from karat_scale.attention import FourierKaratOperator, KaratOperator, fourier_karat_attention, fourier_karat_scores
from karat_scale.attention.bases import BASES, Chebyshev, Fourier
from karat_scale.attention.forms import FORMS
from tests.conftest import output_of


def draw(batch, heads, tokens, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, heads, tokens, width, generator=generator) for _ in range(3)]


@pytest.mark.parametrize(("heads", "rank", "grid"), [(1, 1, 1), (3, 12, 3), (2, 24, 11)])
def test_parameter_shapes_and_count(heads, rank, grid):
    operator = FourierKaratOperator(num_tokens=17, num_heads=heads, rank=rank, grid=grid)
    assert {name: tuple(p.shape) for name, p in operator.named_parameters()} == {
        "cos_coef": (heads, rank, 17, grid),
        "sin_coef": (heads, rank, 17, grid),
        "proj": (heads, 17, rank),
    }
    assert sum(p.numel() for p in operator.parameters()) == heads * (2 * grid + 1) * rank * 17


@pytest.mark.parametrize("base", ["zero", "identity", "silu", "gelu"])
def test_forward_and_scores_are_the_functions(base):
    query, key, value = draw(2, 3, 17, 8)
    operator = FourierKaratOperator(17, 3, rank=5, grid=2, base=base)
    bias, mask = torch.randn(17, 17), torch.ones(17, 17, dtype=torch.bool).tril()
    parameters = (operator.cos_coef, operator.sin_coef, operator.proj)
    expected = fourier_karat_attention(query, key, value, *parameters, base=base, bias=bias, mask=mask)
    assert torch.equal(operator(query, key, value, bias=bias, mask=mask), expected)
    learned = fourier_karat_scores(query, key, value, *parameters, base=base, bias=bias, mask=mask)
    assert torch.equal(operator.scores(query, key, bias=bias, mask=mask), learned)


def test_every_parameter_and_input_gets_a_gradient():
    inputs = [x.requires_grad_() for x in draw(2, 2, 9, 8)]
    operator = FourierKaratOperator(9, 2)
    operator(*inputs).square().sum().backward()
    for tensor in (*inputs, *operator.parameters()):
        assert tensor.grad.isfinite().all()
        assert tensor.grad.abs().sum() > 0


@pytest.mark.parametrize("basis", ["mexican_hat", "morlet", "dog", "meyer", "shannon"])
def test_wav_kans_start(basis):
    torch.manual_seed(0)
    operator = KaratOperator(50, 4, basis, 12, init="wav_kan")
    assert 0.99 * 50**-0.5 < float(operator.weight.detach().abs().max()) <= 50**-0.5
    assert float(operator.weight.detach().std()) == pytest.approx((3 * 50) ** -0.5, rel=0.05)  # uniform
    assert not operator.translation.any()
    assert (operator.scale == 1).all()
    assert float(operator.proj.detach().std()) == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(("form", "inputs"), [("modular", 50), ("full_rank", 50), ("project_first", 12)])
def test_fourier_kans_start(form, inputs):
    torch.manual_seed(0)
    operator = KaratOperator(50, 4, "fourier", 12, form=form, init="fourier_kan")
    assert operator.cos_coef.std().item() == pytest.approx((inputs * 3) ** -0.5, rel=0.05)
    if operator.proj is not None:
        assert operator.proj.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("init", ["paper", "variance_preserving", "softmax_like"])
def test_gains_multiply_the_series(form, init):
    if init == "softmax_like" and form not in ("modular", "full_rank"):
        return
    torch.manual_seed(0)
    plain = KaratOperator(17, 2, Fourier(2), 5, form=form, init=init)
    gained = KaratOperator(17, 2, Fourier(2, gains=True), 5, form=form, init=init)
    query, key, value = draw(2, 2, 17, 8)
    gained.load_state_dict(plain.state_dict(), strict=False)
    torch.testing.assert_close(gained(query, key, value), plain(query, key, value))
    with torch.no_grad():
        for prefix in ("", "second_") if form == "two_operators" else ("",):
            gain = torch.rand_like(gained.get_parameter(f"{prefix}gain"))
            gained.get_parameter(f"{prefix}gain").copy_(gain)
            for name in ("cos_coef", "sin_coef"):
                plain.get_parameter(f"{prefix}{name}").mul_(gain.unsqueeze(-1))
    torch.testing.assert_close(gained(query, key, value), plain(query, key, value))
    torch.testing.assert_close(gained.scores(query, key), plain.scores(query, key))
    gained(query, key, value).square().sum().backward()
    assert gained.gain.grad.abs().sum() > 0
    assert (gained.base_gain.grad == 0).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("basis", BASES)
def test_every_form_and_basis_starts_with_the_variance_of_the_values(form, basis):
    torch.manual_seed(0)
    operator = KaratOperator(65, 8, basis, rank=12, form=form)
    query, key, value = draw(2, 8, 65, 32)
    with torch.no_grad():
        ratio = (operator(query, key, value).std() / value.std()).item()
    # Rational functions grow with the score, so a second operator of them amplifies the largest entries of H.
    most = 20 if (basis, form) == ("rational", "two_operators") else 1.25
    assert 0.85 < ratio < most


def test_a_basis_without_amplitudes_starts_as_it_draws_itself():
    class Fixed(Chebyshev):
        amplitudes = ()

    modular = KaratOperator(65, 8, Fixed(), rank=65)
    full = KaratOperator(65, 8, Fixed(), form="full_rank")
    assert full.coef.std().item() == pytest.approx(modular.coef.std().item(), rel=0.02)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parameters_of_16_bits_start_as_numbers(dtype, basis):
    operator = KaratOperator(17, 2, basis, 4, dtype=dtype)
    assert all(parameter.isfinite().all() for parameter in operator.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("basis", ["chebyshev", "morlet"])
def test_what_was_saved_computes_in_another_process(basis, tmp_path):
    operator, inputs = KaratOperator(17, 2, basis, 4), [torch.randn(1, 2, 17, 8) for _ in range(3)]
    torch.save((operator, inputs, operator(*inputs)), tmp_path / "whole.pt")
    torch.jit.save(torch.jit.trace(operator, inputs), tmp_path / "traced.pt")
    code = (
        "import sys, torch, karat_scale.attention\n"
        "operator, inputs, expected = torch.load(sys.argv[1], weights_only=False)\n"
        "torch.testing.assert_close(torch.compile(operator, backend='aot_eager')(*inputs), expected)\n"
    )
    alone = (
        "import sys, torch, karat_scale.attention\n"
        "inputs = [torch.randn(1, 2, 17, 8) for _ in range(3)]\n"
        "assert torch.jit.load(sys.argv[1])(*inputs).isfinite().all()\n"
    )
    output_of(sys.executable, "-c", code, str(tmp_path / "whole.pt"))
    output_of(sys.executable, "-c", alone, str(tmp_path / "traced.pt"))


def test_reset_draws_anew_and_is_repeatable():
    torch.manual_seed(3)
    operator = FourierKaratOperator(9, 2)
    first = {name: p.detach().clone() for name, p in operator.named_parameters()}
    operator.reset_parameters()
    assert not torch.equal(first["cos_coef"], operator.cos_coef)
    torch.manual_seed(3)
    operator.reset_parameters()
    assert all(torch.equal(first[name], p) for name, p in operator.named_parameters())


def test_bad_arguments_are_named():
    for make, message in (
        *(
            (
                lambda name=name, count=count: FourierKaratOperator(**{"num_tokens": 9, "num_heads": 2, name: count}),
                text,
            )
            for name in ("num_tokens", "num_heads", "rank", "grid")
            for count in (0, -1, 2.5, True)
            for text in [f"{name} = {count}: expected an integer of at least 1"]
        ),
        *(
            (lambda name=name: FourierKaratOperator(9, 2, **{name: "none"}), f"{name} = 'none': expected one of ")
            for name in ("base", "init", "implementation")
        ),
        (
            lambda: KaratOperator(9, 2, "dog", init="fourier_kan"),
            "init = 'fourier_kan' needs the Fourier basis, not Der",
        ),
        (lambda: KaratOperator(9, 2, init="wav_kan"), "init = 'wav_kan' needs a basis of wavelets, not Fourier"),
        (lambda: FourierKaratOperator(9, 2, base="silu", gains=True), "base = 'silu': gains need base = 'zero'"),
        (
            lambda: KaratOperator(7, 2, form="full_rank", simplex="hidden"),
            "simplex = 'hidden' needs form = 'modular', not",
        ),
        (lambda: KaratOperator(7, 2, simplex="rows"), "simplex = 'rows': expected False, True or 'hidden'"),
        (lambda: FourierKaratOperator(9, 2)(*draw(1, 2, 8, 4)), r"cos_coef has shape \[2, 12, 9, 3\].*\[2, r, 8, G\]"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            make()
