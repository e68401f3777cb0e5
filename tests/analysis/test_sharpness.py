import dataclasses
import resource

import pytest

from karat_scale.analysis.result import Settings
from karat_scale.analysis.sharpness import analyze_sharpness
from karat_scale.analysis.trained_run import TrainedRun
from karat_scale.models.factory import parameter_count

QUICK = Settings(hessian_samples=4, eigenvalues=1)


def test_of_a_real_run(any_run: TrainedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("karat_scale.analysis.result.WORTH_TELLING", 0.0)
    settings = dataclasses.replace(QUICK, tell=told.append, progress=lambda what, done, total: told.append(what))
    result = analyze_sharpness(any_run, settings)
    # After so few steps the direction of largest curvature may bend downwards.
    assert abs(result.numbers["top_eigenvalues"][0]) > 0
    assert result.numbers["images"] == 4
    (cost,) = [line for line in told if "takes at most about" in line]
    assert "(48 x " in cost


def test_the_chosen_checkpoint_is_analysed(karat_run: TrainedRun) -> None:
    first, second = karat_run.store.names()[:2]
    found = {
        name: analyze_sharpness(dataclasses.replace(karat_run, checkpoint=name, weights="raw"), QUICK)
        for name in (first, second)
    }
    assert [result.numbers["checkpoint"] for result in found.values()] == [first, second]
    assert found[first].numbers["trace"] != found[second].numbers["trace"]
    assert found[first].tables[-1].title.endswith(f"{first} (raw weights)")


def test_a_disk_without_room_for_the_eigenvalues_leaves_the_rest(karat_run: TrainedRun) -> None:
    models, (soft, hard) = 4 * parameter_count(karat_run.model()), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10 * models, hard))  # the Hessian's basis takes 15
    try:
        result = analyze_sharpness(karat_run, dataclasses.replace(QUICK, eigenvalues=3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (note,) = result.notes
    assert "too large: the Hessian's eigenvalues need" in note
    assert "set TMPDIR" in note
    assert [row[0] for row in result.tables[-1].rows] == ["trace", "standard error of the trace"]
