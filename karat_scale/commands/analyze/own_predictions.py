"""The predictions of a run for its whole validation split: computed once, and kept in RUN/predictions.npz."""

import time
from dataclasses import replace

from karat_scale.checkpoint.store import MANIFEST
from karat_scale.commands.analyze.result import Result, Settings, say_cost
from karat_scale.commands.analyze.trained_run import TrainedRun
from karat_scale.commands.evaluate.collect import collect
from karat_scale.commands.evaluate.predictions import Predictions, read_predictions, write_predictions
from karat_scale.data.augmentation.normalize import Normalize
from karat_scale.data.backends import ImageSpec, open_backend
from karat_scale.engine.distributed import World
from karat_scale.engine.precision import forward_for_evaluation
from karat_scale.foundation.files import file_sha256, json_sha256

FILE = "predictions.npz"


def predictions_of(run: TrainedRun, settings: Settings, result: Result) -> Predictions:
    """Return the predictions of the analysed weights, as `karat eval` computes them.

    If the run's directory cannot be written, a note in `result` says so, and another command computes them again.

    Raises:
        UserError: the run has no checkpoint, or its data cannot be read.
    """
    identity = _identity(run)
    path = run.path / FILE
    known: Predictions | None = run.shared.get(FILE) or read_predictions(path, identity)
    if known is None:
        known = _compute(run, settings, identity)
        try:
            write_predictions(path, known)
        except OSError as error:
            result.notes.append(f"the predictions are not kept: {path}: {error.strerror}")
    run.shared[FILE] = known
    return known


def _compute(run: TrainedRun, settings: Settings, identity: str) -> Predictions:
    recipe = run.recipe
    backend = open_backend(ImageSpec.of(recipe))
    started = time.perf_counter()

    def told(done: int, total: int, _: object) -> None:
        if done == 1:
            seconds, hint = time.perf_counter() - started, "--only leaves out accuracy, calibration and mistakes"
            say_cost(settings, "predicting the validation split", total, seconds, hint)
        settings.progress("predict the validation split", done, total)

    try:
        run.refuse_other_classes(backend.classes)
        forward = forward_for_evaluation(run.model(), recipe.train, run.device)
        predictions = collect(
            forward,
            backend.eval_batches,
            backend.num_val,
            recipe.train.eval_batch,
            Normalize(recipe.augment.mean, recipe.augment.std),
            World(0, 1, 0, run.device),
            told,
        )
        return replace(predictions, classes=backend.classes, identity=identity)
    finally:
        backend.close()


def _identity(run: TrainedRun) -> str:
    recipe = run.recipe
    return json_sha256(
        {
            "manifest": file_sha256(run.store.root / run.chosen / MANIFEST),
            "weights": run.weights_kind,
            "model": recipe.model.model_dump(mode="json"),
            "augment": [recipe.augment.interpolation, recipe.augment.eval_crop],
            "precision": recipe.train.precision,
            "data": run.data_identity,
        }
    )
