"""Runs whose images are augmented on the training device."""

import pytest

from tests.conftest import karat_done, summary
from tests.training.runs import losses


@pytest.mark.slow
@pytest.mark.multiprocess
def test_it_is_the_same_data_and_stops_and_resumes_as_any_run(recipe_file):
    def train(name: str, *overrides: str, processes: int = 1):
        run = recipe_file.parent / name
        options = (f"run.dir={run}", "augment.erasing=0.5", *overrides)
        karat_done("train", str(recipe_file), *options, processes=processes)
        return run

    workers = train("workers")
    device = train("device", "augment.run_on=device")
    assert summary(device)["data_digest"] == summary(workers)["data_digest"] != 0
    assert losses(device) != losses(workers)
    train("cut", "augment.run_on=device", "train.max_steps=3")
    cut = train("cut", "augment.run_on=device", "resume.allow=[train.max_steps]")
    assert losses(cut) == losses(device)
    ranks = train("ranks", "augment.run_on=device", processes=2)
    assert summary(ranks)["data_digest"] == summary(device)["data_digest"]
    assert losses(ranks) == pytest.approx(losses(device), rel=1e-5)
