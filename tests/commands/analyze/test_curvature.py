import pytest
import torch

from karat_scale.commands.analyze.curvature import Hessian
from karat_scale.models import create_model
from karat_scale.recipe import AttentionConfig
from tests.models.test_attention_matrices import SIZE


def test_eigenvalues_and_trace_of_a_quadratic_bowl() -> None:
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0]
    values = torch.tensor([50.0, -20.0, 7.0, 1.0, 0.5, 0.1], dtype=torch.float64)
    matrix = turn @ values.diag() @ turn.mT
    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    y = torch.ones(4, dtype=torch.float64, requires_grad=True)

    def losses():
        both = torch.cat((x, y))
        yield both @ matrix @ both / 4
        yield both @ matrix @ both / 4

    hessian = Hessian([x, y], losses)
    found = hessian.top_eigenvalues(3, 120, 0)
    assert [one.value for one in found] == pytest.approx([50, -20, 7], rel=1e-4)
    assert all(one.converged for one in found)
    assert not hessian.top_eigenvalues(1, 2, 0)[0].converged
    trace, error = hessian.trace(400, 0)
    assert trace == pytest.approx(values.sum().item(), abs=4 * error)
    assert error < 5


@pytest.mark.parametrize("attention", [AttentionConfig(), AttentionConfig(kind="karat", implementation="reference")])
def test_products_are_differences_of_gradients(attention: AttentionConfig) -> None:
    torch.manual_seed(0)
    model = create_model(SIZE, attention).double().eval()
    images, labels = torch.randn(3, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 1, 2])
    parameters = list(model.parameters())

    def loss() -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(images), labels)

    vectors = [torch.randn_like(p) for p in parameters]
    product = Hessian(parameters, lambda: [loss()]).times(vectors)

    def gradient(step: float) -> list[torch.Tensor]:
        with torch.no_grad():
            torch._foreach_add_(parameters, vectors, alpha=step)
        grads = torch.autograd.grad(loss(), parameters)
        with torch.no_grad():
            torch._foreach_add_(parameters, vectors, alpha=-step)
        return list(grads)

    for exact, high, low in zip(product, gradient(1e-6), gradient(-1e-6), strict=True):
        torch.testing.assert_close(exact, (high - low) / 2e-6, rtol=1e-4, atol=1e-5)
