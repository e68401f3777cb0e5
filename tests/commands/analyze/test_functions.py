import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from karat_scale.attention import KaratOperator
from karat_scale.attention.bases import BASES, make_basis
from karat_scale.commands.analyze.functions import (
    ScoreHistogram,
    _draw_heads,
    analyze_distributions,
    analyze_functions,
    describe,
    hill_index,
    moments,
    unit_curves,
)
from karat_scale.commands.analyze.result import Settings
from karat_scale.commands.analyze.trained_run import TrainedRun
from karat_scale.foundation.errors import RunDirectoryError
from tests.conftest import make_image_folder


def test_functions_of_a_real_run_whatever_the_batch(karat_run: TrainedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    once = analyze_functions(karat_run, Settings(images=6, batch=6))
    monkeypatch.setattr("karat_scale.commands.analyze.functions.FIT_BYTES", 1)  # one head a pass
    again = analyze_functions(karat_run, Settings(images=6, batch=4))
    assert set(once.figures) == {"functions_block_0", "functions_block_1", "energy", "distance"}
    assert once.arrays["score_counts"].sum() == 2 * 2 * 6 * 17 * 17
    for left, right in zip(once.numbers["softmax"], again.numbers["softmax"], strict=True):
        assert left == pytest.approx(right, rel=1e-3)
        assert 0 <= left["to_fit"] <= 1


def test_images_that_cannot_be_read_are_counted(karat_run: TrainedRun, tmp_path: Path) -> None:
    make_image_folder(tmp_path, {"train": 2, "val": 2})
    (tmp_path / "val" / "class1" / "000.jpg").write_bytes(b"damaged")
    folder = {"data__backend": "folder", "data__path": str(tmp_path), "data__on_bad_sample": "skip"}
    run = dataclasses.replace(karat_run, recipe=karat_run.recipe.changed(**folder))
    result = analyze_functions(run, Settings(images=8, batch=3))
    assert result.notes == ["1 of the chosen images cannot be read and are left out"]
    assert result.arrays["score_counts"].sum() == 2 * 2 * 7 * 17 * 17


@pytest.mark.parametrize("name", sorted(BASES))
@pytest.mark.parametrize("base", ["zero", "silu"])
def test_curves_summed_over_keys_are_the_operators_own_hidden_rows(name: str, base: str) -> None:
    """If W is the identity, S[k, p] is sum_q phi_pq(A[k, q]). Here all scores of a row are equal."""
    torch.manual_seed(0)
    operator = KaratOperator(4, 1, make_basis(name), rank=4, base=base).double()
    with torch.no_grad():
        operator.proj.copy_(torch.eye(4).expand(1, 4, 4))
    query = torch.linspace(-2, 2, 4, dtype=torch.float64).view(1, 1, 4, 1)
    learned = operator.scores(query, torch.ones_like(query))[0, 0]
    torch.testing.assert_close(unit_curves(operator, 0, query.flatten()).sum(-1), learned)


def test_the_histogram_counts_every_score_and_spans_most() -> None:
    histogram = ScoreHistogram(1, 2)
    scores = torch.randn(3, 2, 50, 50, generator=torch.Generator().manual_seed(0))
    scores[0, 0, 0, 0] = 500.0
    for part in scores.split(2):
        histogram.add(0, part)
    assert histogram.counts.sum(-1).tolist() == [[7500, 7500]]
    low, high = histogram.span(0, 1)
    assert -4 < low < -2.5
    assert 2.5 < high < 4
    assert not math.isinf(histogram.span(0, 0)[1])


@pytest.mark.parametrize("alpha", [1.5, 3.0])
def test_the_tail_index_of_a_pareto_sample_is_its_exponent(alpha: float) -> None:
    rng = np.random.default_rng(0)
    sample = (1 + rng.pareto(alpha, 200_000)) * rng.choice([-1, 1], 200_000)
    assert hill_index(sample) == pytest.approx(alpha, rel=0.1)


def test_a_gaussian_is_described_as_one_and_constants_and_few_values_have_no_tail() -> None:
    figures = describe(np.random.default_rng(0).normal(2.0, 3.0, 100_000))
    assert [figures[name] for name in ("mean", "std", "kurtosis")] == pytest.approx([2, 3, 0], abs=0.1)
    assert describe(np.ones(1000, np.float32))["kurtosis"] is None
    assert describe(np.zeros(1000))["tail_index"] is None
    assert describe(np.arange(9.0))["tail_index"] is None


def test_first_middle_and_last_of_what_there_is() -> None:
    assert moments(["0", "10", "45", "100"], int) == ["0", "45", "100"]
    assert moments(["0", "50", "60", "90", "95", "100"], int) == ["0", "50", "100"]
    assert moments(["3", "7"], int) == ["3", "7"]
    assert moments(["3"], int) == ["3"]


def test_distributions_of_real_runs(any_run: TrainedRun) -> None:
    result = analyze_distributions(any_run, Settings())
    assert [row["step"] for row in result.numbers["model"]] == [0, 8, 16]
    heads = [(row["what"], row["block"], row["head"]) for row in result.numbers["heads"] if row["step"] == 16]
    names = ("cos_coef", "sin_coef", "W") if any_run.recipe.attention.kind == "karat" else ()
    assert sorted(heads) == sorted((name, block, head) for name in names for block in (0, 1) for head in (0, 1))
    total = sum(p.numel() for p in any_run.model().parameters() if p.dim() > 1)
    assert 0.99 * total < result.arrays["model_step16"].sum() <= total


def test_a_block_without_a_parameter_has_no_empty_frame() -> None:
    values = np.random.default_rng(0).normal(size=50).astype(np.float32)
    groups = {(name, block, 0): values for name, block in (("W", 0), ("W", 1), ("matrix", 1))}
    shown = {axes.get_title(): axes for axes in _draw_heads(groups).axes if axes.axison}
    assert list(shown) == ["W, block 0", "W, block 1", "matrix, block 1"]
    assert [axes.get_ylabel() for axes in shown.values()] == ["density", "", "density"]
    assert all(axes.get_xlabel() == "value" and axes.patches for axes in shown.values())


def test_what_is_damaged_is_named_and_the_next_one_taken(own_run: TrainedRun) -> None:
    run = own_run
    first, middle = run.in_order[0], run.in_order[2]
    (run.directory.snapshots / first).write_bytes(b"torn")
    (run.store.root / middle / "state.json").write_text("{}")
    result = analyze_distributions(run, Settings())
    assert [row["step"] for row in result.numbers["model"]] == [4, 12, 16]
    assert len(result.notes) == 2
    assert f"{first}: not a whole file" in result.notes[0]
    assert f"{middle} cannot be used" in result.notes[1]
    for name in run.store.names():
        (run.store.root / name / "state.json").write_text("{}")
    with pytest.raises(RunDirectoryError, match="cannot be used"):
        analyze_distributions(run, Settings())
