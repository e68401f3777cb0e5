import dataclasses

import pytest

from karat_scale.analysis.functions import analyze_functions
from karat_scale.analysis.result import Settings
from karat_scale.analysis.trained_run import TrainedRun
from karat_scale.errors import RunDirectoryError


def test_of_a_real_run_whatever_the_batch(karat_run: TrainedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    once = analyze_functions(karat_run, Settings(images=6, batch=6))
    monkeypatch.setattr("karat_scale.analysis.functions.FIT_BYTES", 1)  # one head a pass
    again = analyze_functions(karat_run, Settings(images=6, batch=4))
    assert set(once.figures) == {"functions_block_0", "functions_block_1", "energy", "distance"}
    assert once.arrays["score_counts"].sum() == 2 * 2 * 6 * 17 * 17
    for left, right in zip(once.numbers["softmax"], again.numbers["softmax"], strict=True):
        assert left == pytest.approx(right, rel=1e-3)
        assert 0 <= left["to_fit"] <= 1


def test_a_softmax_run_has_no_functions(softmax_run: TrainedRun) -> None:
    with pytest.raises(RunDirectoryError, match="softmax learns no functions"):
        analyze_functions(softmax_run, Settings())


def test_weights_are_those_of_the_chosen_checkpoint(karat_run: TrainedRun) -> None:
    first = dataclasses.replace(karat_run, checkpoint=karat_run.in_order[0])
    energies = [analyze_functions(run, Settings(images=1)).arrays["energy_share"] for run in (first, karat_run)]
    assert (energies[0] != energies[1]).any()
