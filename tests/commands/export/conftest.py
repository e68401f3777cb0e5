"""Runs with one checkpoint, as training leaves them."""

import pytest

from karat_scale.checkpoint.checkpoints import Checkpoints
from karat_scale.engine.optimizers import Ema
from karat_scale.engine.reporting.progress import PlainDisplay, Reporter
from karat_scale.recipe import Recipe
from karat_scale.training.run_directory import RunDirectory
from karat_scale.training.tasks.classification.task import TrainState
from tests.small_engines import make_engine, small_recipe, train_once

__all__ = ["make_engine", "make_run", "small_recipe"]

CLASSES = ("cat", "dog", "owl", "fish")


@pytest.fixture
def make_run(world, make_engine):
    """Return a function that makes a run with one checkpoint, and returns its directory, engine and averages."""

    def make(recipe: Recipe, keep_ema: bool = True):
        directory = RunDirectory(recipe.run.dir)
        directory.store.root.mkdir(parents=True)
        directory.begin(recipe, CLASSES)
        engine = make_engine(recipe)
        ema = Ema(engine.deepspeed, recipe.train)
        for step in (1, 2, 3):
            train_once(engine, step, size=recipe.model.image_size)
            ema.update(step)
        reporter = Reporter(PlainDisplay(), None)
        checkpoints = Checkpoints(
            directory.store, engine, ema if keep_ema else None, world, recipe, reporter, "classification", TrainState
        )
        assert checkpoints.save(TrainState(step=3, samples=24, evaluated_step=3, last_top1=62.5, last_top5=100.0))
        return directory.path, engine, ema

    return make
