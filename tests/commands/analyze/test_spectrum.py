import numpy as np
import pytest
import torch

from karat_scale.commands.analyze.matrices import Spectrum, analyze_spectrum, effective_rank, scree_rank, stable_rank
from karat_scale.commands.analyze.result import Settings
from karat_scale.commands.analyze.trained_run import TrainedRun
from karat_scale.models import create_model
from karat_scale.models.attention_matrices import watched
from karat_scale.recipe import AttentionConfig
from tests.models.test_attention_matrices import SIZE


@pytest.mark.parametrize("k", [1, 3, 10])
def test_k_equal_singular_values_have_rank_k_by_every_measure(k: int) -> None:
    basis = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(k)))[0]
    values = torch.linalg.svdvals(basis[:, :k] @ basis[:k])
    for rank in (effective_rank, stable_rank, scree_rank):
        assert rank(values).item() == pytest.approx(k, rel=1e-3)


def test_a_rank_k_operator_gives_matrices_of_rank_k() -> None:
    """S = H W^T has rank r at most, whatever A is."""
    torch.manual_seed(1)
    model = create_model(SIZE, AttentionConfig(kind="karat", rank=3)).eval()
    spectrum = Spectrum(3, 17)
    with watched(model, spectrum.add), torch.no_grad():
        model(torch.randn(4, 3, 16, 16))
    assert np.isfinite(spectrum.log_low[:, 1, :3]).all()
    assert np.isnan(spectrum.log_high[:, 1, 3:]).all()
    assert (spectrum.ranks[:, 1] <= 3.001).all()


@pytest.mark.parametrize(
    ("values", "rank"),
    [
        ([9.0, 8.0, 7.0, 0.6, 0.5, 0.4, 0.3, 0.2], 3),
        ([1.0, 0.02, 0.01, 0.005], 1),
        ([4.0, 3.0, 2.0, 1.0], 4),
        ([2.0, 2.0, 2.0], 3),
        ([0.0, 0.0, 0.0], 0),
    ],
)
def test_the_scree_rank_counts_what_is_before_the_elbow(values: list[float], rank: int) -> None:
    assert scree_rank(torch.tensor(values)) == rank


def test_extremes_and_means_are_those_of_all_matrices_whatever_the_batches() -> None:
    matrices = torch.randn(6, 2, 9, 9, generator=torch.Generator().manual_seed(0))
    spectrum = Spectrum(1, 9)
    for part in matrices.split(4):
        spectrum.add(0, part, 10 * part)
    values = torch.linalg.svdvals(matrices.flatten(0, 1)).double().numpy()
    np.testing.assert_allclose(spectrum.log_low[0, 0], np.log(values.min(0)), atol=1e-5)
    np.testing.assert_allclose(spectrum.log_high[0, 0], np.log(values.max(0)), atol=1e-5)
    np.testing.assert_allclose(spectrum.log_mean[0, 0], np.log(values.mean(0)), atol=1e-5)
    np.testing.assert_allclose(spectrum.log_mean[0, 1], np.log(10 * values.mean(0)), atol=1e-5)


def test_of_a_real_run(any_run: TrainedRun) -> None:
    result = analyze_spectrum(any_run, Settings(images=6, batch=4))
    assert result.numbers["images"] == 6
    assert result.arrays["ln_mean"].shape == (2, 2, 17)
    assert set(result.figures) == {"last_block", "ranks"}
