"""Bases: values, derivatives and starts."""

import pytest
import torch

from karat_scale.attention.bases import BASE_ACTIVATIONS, Fourier


@pytest.mark.parametrize("grid", [1, 2, 3, 4, 7, 16])
def test_fourier_features_and_their_derivative(grid):
    generator = torch.Generator().manual_seed(grid)
    scores = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64) * 4
    cos_coef, sin_coef = torch.randn(2, 1, 2, 5, grid, generator=generator, dtype=torch.float64)
    grad_hidden = torch.randn(2, 3, 2, generator=generator, dtype=torch.float64)
    values = torch.empty(2 * grid, *scores.shape, dtype=torch.float64)
    coef = Fourier(grid).pack({"cos_coef": cos_coef, "sin_coef": sin_coef})[0]
    features = Fourier(grid).bind(scores, values)
    features.evaluate()
    hidden = torch.einsum("fbkq,fpq->bkp", values, coef)

    x = scores.clone().requires_grad_()
    phases = x.unsqueeze(-1) * torch.arange(1, grid + 1)
    expected = torch.einsum("bkqm,pqm->bkp", phases.cos(), cos_coef[0])
    expected = expected + torch.einsum("bkqm,pqm->bkp", phases.sin(), sin_coef[0])
    torch.testing.assert_close(hidden, expected.detach(), atol=1e-11, rtol=1e-10)
    (slope,) = torch.autograd.grad(expected, x, grad_hidden)
    torch.testing.assert_close(features.pull_back(grad_hidden.flatten(0, 1), coef), slope, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", [name for name, base in BASE_ACTIVATIONS.items() if base])
def test_base_activations_vanish_at_zero_and_know_their_derivative(name):
    base = BASE_ACTIVATIONS[name]
    x = torch.linspace(-6, 6, 101, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(base.value(x).sum(), x)
    torch.testing.assert_close(base.derivative(x.detach()), slope, atol=1e-12, rtol=1e-10)
    assert base.value(torch.zeros(1)).item() == 0


def test_an_unknown_start_is_refused():
    parameters = {name: torch.empty(shape) for name, shape in Fourier(1).shapes(1, 2, 3).items()}
    with pytest.raises(ValueError, match="init = 'xavier': expected one of paper, variance_preserving"):
        Fourier(1).initialise(parameters, "xavier")
