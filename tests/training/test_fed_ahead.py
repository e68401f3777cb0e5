"""Fetching batches ahead changes neither their order, nor a stop, a resume, a bad sample or a data error."""

from collections.abc import Callable, Iterator
from multiprocessing import active_children

import pytest
import torch
from torch import nn

from karat_scale.data import exact
from karat_scale.data.backends import ImageSpec
from karat_scale.data.backends.images import SyntheticBackend
from karat_scale.data.batch import BadSample, Batch
from karat_scale.data.loading import device_feed
from karat_scale.engine.reporting.interval import Interval
from karat_scale.engine.reporting.progress import Reporter, SilentDisplay
from karat_scale.foundation.errors import DataError, RecipeError
from karat_scale.recipe import Recipe
from karat_scale.training.run import train
from karat_scale.training.run_directory import RunDirectory
from karat_scale.training.tasks.classification.task import ClassificationTask
from karat_scale.training.trainer import Trainer
from tests.small_engines import equal, make_trainer
from tests.streams import Streams, streams
from tests.training.test_save_points import train_to_the_end

__all__ = ["streams"]
OWN = ("data.workers=0", "train.micro_batch=4", "model.proj_drop=0.1")


class FeedAhead(device_feed.DeviceFeed):
    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self._copies = torch.cuda.Stream(torch.device("cpu"))


def feed_ahead(streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetch batches ahead until the test ends."""
    del streams  # the argument only says that the fixture is needed
    monkeypatch.setattr(exact, "DeviceFeed", FeedAhead)


@pytest.fixture
def run(small_recipe, tmp_path) -> Callable[..., Recipe]:
    return lambda name, *overrides: small_recipe(*OWN, *overrides, f"run.dir={tmp_path / name}")


def test_a_run_fed_ahead_ends_in_the_same_bits_also_when_it_was_stopped(run, world, streams, monkeypatch) -> None:
    plain = train_to_the_end(run("plain"), world)
    feed_ahead(streams, monkeypatch)
    for stop in ((4, "in evaluation"), (6, "after step")):
        assert train_to_the_end(run("ahead"), world, stop)["step"] == stop[0]
    assert equal(train_to_the_end(run("ahead"), world), plain)
    assert "begin copies" in streams.notes


def test_a_wait_for_the_device_after_the_next_batch_came_is_training(run, streams, monkeypatch) -> None:
    feed_ahead(streams, monkeypatch)
    take_norms, beat = Interval.take_norms, Reporter.beat
    beats: list[str] = []
    counted_as: list[str] = []

    def note(self, doing: str, *step: int) -> None:
        beats.append(doing)
        beat(self, doing, *step)

    def wait_for_the_device(self) -> list[float]:
        counted_as.append(beats[-1])
        return take_norms(self)

    monkeypatch.setattr(Reporter, "beat", note)
    monkeypatch.setattr(Interval, "take_norms", wait_for_the_device)
    assert train(ClassificationTask, run("waits", "train.max_steps=4")) == 0
    assert counted_as.count("training") >= 4  # once a step or more
    assert "waiting for data" not in counted_as


class BadBackend(SyntheticBackend):
    """A backend that meets a bad sample in each micro batch, and cannot read micro batch `broken`, counted from 0."""

    broken = 5

    def _batch(self, part, stream: int) -> Batch:
        made = super()._batch(part, stream)
        return Batch(made.images, made.labels, made.sample_ids, made.valid, (BadSample(1, "key", "shard", "torn"),))

    def train_batches(self, slices) -> Iterator[Batch]:
        for number, batch in enumerate(super().train_batches(slices)):
            if number == self.broken:
                raise DataError("that shard is gone")
            yield batch


@pytest.mark.parametrize("is_ahead", [False, True])
def test_an_error_ends_the_run_after_the_steps_before_it(run, world, streams, monkeypatch, capsys, is_ahead) -> None:
    if is_ahead:
        feed_ahead(streams, monkeypatch)
    recipe = run("broken", "checkpoint.every_steps=1")
    directory = RunDirectory(recipe.run.dir)
    directory.store.root.mkdir(parents=True)
    trainer = make_trainer(recipe, world)
    trainer.task.backend = BadBackend(ImageSpec.of(recipe))
    with pytest.raises(DataError, match="that shard is gone"):
        trainer.run()
    trainer.checkpoints.finish()
    assert trainer.state.step == 2  # of two micro batches each
    assert directory.store.pointed("latest") == "step-00000002"
    assert trainer.state.bad_samples == 4
    assert capsys.readouterr().out.count("unreadable image key in shard: torn") == 5  # the last in an unfinished step


class _UnbuiltTask(ClassificationTask):
    """A task whose model cannot be built. It notes the data workers that run at that moment."""

    workers: set[int | None]

    def build_backbone(self, directory: RunDirectory) -> nn.Module:
        _UnbuiltTask.workers = _workers()
        raise RecipeError("no model")


def _workers() -> set[int | None]:
    return {process.pid for process in active_children() if process.name.startswith("karat-worker")}


def test_data_workers_start_before_the_model_is_built_and_end_if_it_cannot_be(small_recipe, world, shards) -> None:
    recipe = small_recipe("data.backend=webdataset", f"data.path={shards}", "data.workers=2")
    others = _workers()
    with pytest.raises(RecipeError, match="no model"):
        train(_UnbuiltTask, recipe)
    assert len(_UnbuiltTask.workers - others) == 2
    assert not _workers() - others


@pytest.mark.parametrize("resumed", [3, 4])  # 4: training resumes from another step than expected
def test_the_batches_made_beside_the_model_are_used_where_training_goes_on(
    small_recipe, world, shards, resumed
) -> None:
    recipe = small_recipe("data.backend=webdataset", f"data.path={shards}", "data.workers=1")
    others, task = _workers(), ClassificationTask(recipe, world, Reporter(SilentDisplay(), None))
    with Trainer(task, RunDirectory(recipe.run.dir), step=3) as trainer:
        trainer.state.step = resumed
        feed = trainer.feed(trainer.total_steps)
        assert len(_workers() - others) == 1
        found = [batch.sample_ids.tolist() for batch in feed]
        assert found == [part.sample_ids.tolist() for part in trainer.plan.slices(resumed, trainer.total_steps)]
