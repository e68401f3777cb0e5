import dataclasses

import pytest

from karat_scale.commands.analyze.curvature import analyze_sharpness
from karat_scale.commands.analyze.result import Settings
from karat_scale.commands.analyze.trained_run import TrainedRun

QUICK = Settings(hessian_samples=4, eigenvalues=1)


def test_of_a_real_run(any_run: TrainedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("karat_scale.commands.analyze.result.WORTH_TELLING", 0.0)
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
