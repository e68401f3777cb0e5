import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from karat_scale.commands.analyze.functions import analyze_distributions, describe, hill_index, moments
from karat_scale.commands.analyze.result import Settings
from karat_scale.commands.analyze.trained_run import TrainedRun
from karat_scale.foundation.errors import RunDirectoryError


@pytest.mark.parametrize("alpha", [1.5, 3.0])
def test_the_tail_index_of_a_pareto_sample_is_its_exponent(alpha: float) -> None:
    rng = np.random.default_rng(0)
    sample = (1 + rng.pareto(alpha, 200_000)) * rng.choice([-1, 1], 200_000)
    assert hill_index(sample) == pytest.approx(alpha, rel=0.1)


def test_a_gaussian_is_described_as_one() -> None:
    figures = describe(np.random.default_rng(0).normal(2.0, 3.0, 100_000))
    assert figures["mean"] == pytest.approx(2, abs=0.05)
    assert figures["std"] == pytest.approx(3, rel=0.02)
    assert figures["kurtosis"] == pytest.approx(0, abs=0.1)


def test_constants_and_few_values_have_no_tail() -> None:
    assert describe(np.ones(1000, np.float32))["kurtosis"] is None
    assert describe(np.zeros(1000))["tail_index"] is None
    assert describe(np.arange(9.0))["tail_index"] is None


def test_first_middle_and_last_of_what_there_is() -> None:
    assert moments(["0", "10", "45", "100"], int) == ["0", "45", "100"]
    assert moments(["0", "50", "60", "90", "95", "100"], int) == ["0", "50", "100"]
    assert moments(["3", "7"], int) == ["3", "7"]
    assert moments(["3"], int) == ["3"]


def test_of_real_runs(any_run: TrainedRun) -> None:
    result = analyze_distributions(any_run, Settings())
    assert [row["step"] for row in result.numbers["model"]] == [0, 8, 16]
    heads = [(row["what"], row["block"], row["head"]) for row in result.numbers["heads"] if row["step"] == 16]
    names = ("cos_coef", "sin_coef", "W") if any_run.recipe.attention.kind == "karat" else ()
    assert sorted(heads) == sorted((name, block, head) for name in names for block in (0, 1) for head in (0, 1))
    total = sum(p.numel() for p in any_run.model().parameters() if p.dim() > 1)
    assert 0.99 * total < result.arrays["model_step16"].sum() <= total


def test_what_is_damaged_is_named_and_the_next_one_taken(karat_run: TrainedRun, tmp_path: Path) -> None:
    shutil.copytree(karat_run.path, tmp_path / "run")
    run = dataclasses.replace(karat_run, path=tmp_path / "run")
    first, middle = run.in_order[0], run.in_order[2]
    (run.snapshots / first).write_bytes(b"torn")
    (run.store.root / middle / "state.json").write_text("{}")
    result = analyze_distributions(run, Settings())
    assert [row["step"] for row in result.numbers["model"]] == [4, 12, 16]
    assert len(result.notes) == 2
    assert f"{first}: not a whole file" in result.notes[0]
    assert f"{middle} is damaged" in result.notes[1]


def test_only_damaged_ones_are_an_error(karat_run: TrainedRun, tmp_path: Path) -> None:
    shutil.copytree(karat_run.path, tmp_path / "run")
    run = dataclasses.replace(karat_run, path=tmp_path / "run")
    (run.snapshots / run.in_order[0]).write_bytes(b"torn")
    for name in run.store.names():
        (run.store.root / name / "state.json").write_text("{}")
    with pytest.raises(RunDirectoryError, match="is damaged"):
        analyze_distributions(run, Settings())
