"""A short run has the results that were recorded before the loop stopped waiting for the device."""

from pathlib import Path

import pytest

from karat_scale.engine.distributed import World
from karat_scale.engine.reporting.progress import MetricsLog, PlainDisplay, Reporter
from karat_scale.training.run_directory import RunDirectory
from tests.conftest import events
from tests.small_engines import make_trainer

# Step: loss, gradient norm, digest of the data so far.
RECORDED = {
    1: (1.4566900730133057, 3.7066447734832764, 609674832294),
    2: (1.3599371910095215, 1.8445992469787598, 319445169529),
    3: (1.3904738426208496, 2.4792213439941406, 277778622588),
    4: (1.4622821807861328, 3.7050764560699463, 864793842027),
    5: (1.4089869260787964, 2.3708791732788086, 20282750775),
    6: (1.420881748199463, 2.9627525806427, 917094096669),
    7: (1.4360285997390747, 4.05994176864624, 223757653096),
    8: (1.4260613918304443, 3.8336732387542725, 432622479666),
}
EVALUATED = {4: (1.441948153078556, 21.875), 8: (1.4397909492254257, 21.875)}
# Two steps on shards, with RandAugment and erasing, by workers and on the device.
DIGESTS = {"workers": 940411329832, "device": 158584674707}


def _train(recipe, world: World) -> Path:
    directory = RunDirectory(recipe.run.dir)
    directory.store.root.mkdir(parents=True)
    reporter = Reporter(PlainDisplay(), MetricsLog(directory.metrics_file))
    trainer = make_trainer(recipe, world, reporter)
    try:
        trainer.run()
    finally:
        trainer.task.close()
        reporter.close()
    return directory.path


def test_losses_norms_digests_and_scores(small_recipe, world) -> None:
    run = _train(small_recipe("data.workers=0", "train.micro_batch=4"), world)
    found = {event["step"]: event for event in events(run, "train")}
    assert found.keys() == RECORDED.keys()
    for step, (loss, norm, digest) in RECORDED.items():
        assert found[step]["loss"] == pytest.approx(loss, rel=1e-5)
        assert found[step]["grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert found[step]["data_digest"] == digest
    scores = {event["step"]: (event["loss"], event["top1"]) for event in events(run, "eval")}
    assert scores == {step: (pytest.approx(loss, rel=1e-5), top1) for step, (loss, top1) in EVALUATED.items()}


@pytest.mark.parametrize("run_on", ["workers", "device"])
def test_digests_of_augmented_images(small_recipe, world, shards, run_on) -> None:
    policy = "rand-m9-mstd0.5-inc1" if run_on == "workers" else "rand-m15-n2-mstd1.0-inc1"
    data = ("data.backend=webdataset", f"data.path={shards}", f"augment.run_on={run_on}")
    augment = (f"augment.randaugment={policy}", "augment.color_jitter=0.4", "augment.erasing=0.25")
    run = _train(small_recipe(*data, *augment, "train.max_steps=2", "log.every_steps=2"), world)
    *_, event = events(run, "train")
    assert event["data_digest"] == DIGESTS[run_on]
