"""A run of any world size without its world: what would stop it is found here, in one process, before the queue."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import numpy as np
import torch

from karat_scale.data.augmentation.device_augment import Normalize
from karat_scale.data.backends import Backend, ImageSpec, open_backend
from karat_scale.data.plan import BatchSlice, EvalPlan, TrainPlan, micro_batch_of, total_steps
from karat_scale.data.shards.shard_format import unused_classes
from karat_scale.engine.deepspeed_config import load_ds_config, zero_stage
from karat_scale.foundation.console import plural
from karat_scale.foundation.errors import DataError, RecipeError
from karat_scale.models import create_model, parameter_count
from karat_scale.recipe import Recipe

PROBED = 2  # images, a pair for mixup


def dry_run(recipe: Recipe, world: int) -> Iterator[str]:
    """Build what a run of `world` ranks is made of, and check it; yields a line on each part that is right.

    Every rank's part of the first and the last global batch is cut and put together again, two images are read, and
    one goes through the model on the CPU.

    Raises:
        UserError: the first mistake, as the run would report it.
    """
    stage = zero_stage(load_ds_config(recipe, world, micro_batch_of(recipe, world)))
    yield f"deepspeed.config = {recipe.deepspeed.config}: ZeRO stage {stage}, right for {plural(world, 'rank')}"
    data = recipe.data.on_a_cpu().changed(workers=int(recipe.data.is_stream))
    with closing(open_backend(ImageSpec.of(recipe.changed(data=data)))) as backend:
        yield f"data: {backend.num_train:,} training and {backend.num_val:,} validation images"
        notice = unused_classes(backend.num_classes, recipe.model.num_classes)
        counts = f"{backend.num_classes} in the data, {recipe.model.num_classes} in the model"
        yield f"classes: {notice or counts}"
        yield _check_batches(recipe, world, backend)
        images = _read(recipe, backend)
    yield f"images: {PROBED} read, 3 x {recipe.model.image_size} x {recipe.model.image_size}"
    yield _check_model(recipe, images)


def _check_batches(recipe: Recipe, world: int, backend: Backend) -> str:
    """The first and the last global batch, cut by every rank."""
    plan = TrainPlan.of(recipe, backend.num_train, 0, world)
    total = total_steps(plan.steps_per_epoch, recipe.train.epochs, recipe.train.max_steps)
    for step in () if plan.lanes else {0, total - 1}:
        epoch, batch = divmod(step, plan.steps_per_epoch)
        order = plan.epoch_order(epoch)
        cut = [part.sample_ids for rank in range(world) for part in replace(plan, rank=rank).cut(order, epoch, batch)]
        whole = order[batch * plan.global_batch : (batch + 1) * plan.global_batch]
        if not np.array_equal(np.concatenate(cut), whole):
            raise RecipeError(f"train.global_batch = {plan.global_batch}: {world} ranks do not cut it into its parts")
    evaluation = EvalPlan(backend.num_val, recipe.train.eval_batch, 0, world).num_batches
    return (
        f"batches: {plural(total, 'step')} of {plan.global_batch} = {world} x {plan.accumulation} x "
        f"{plan.micro_batch}; an evaluation takes {evaluation:,} of {recipe.train.eval_batch} a rank"
    )


def _read(recipe: Recipe, backend: Backend) -> torch.Tensor:
    """uint8 [2, 3, H, W] of the first samples. Raises DataError where they are not what the model takes."""
    ids = np.arange(min(PROBED, backend.num_train), dtype=np.int64)
    batch = next(iter(backend.train_batches([BatchSlice(0, 0, ids)])))
    size = recipe.model.image_size
    if tuple(batch.images.shape[1:]) != (3, size, size):
        shape = " x ".join(map(str, batch.images.shape[1:]))
        raise DataError(f"{recipe.data.path}: images come as {shape}, but the model takes 3 x {size} x {size}")
    if int(batch.labels.max()) >= recipe.model.num_classes:
        raise DataError(f"{recipe.data.path}: a label is {int(batch.labels.max())}, beyond model.num_classes")
    return batch.images


def _check_model(recipe: Recipe, images: torch.Tensor) -> str:
    """A forward pass on the CPU; what only a GPU can run is replaced by `streaming`, which computes the same."""
    attention = recipe.attention
    if attention.implementation == "triton":
        attention = attention.changed(implementation="streaming")
    torch.manual_seed(recipe.run.seed)
    model = create_model(recipe.model, attention).eval()
    with torch.no_grad():
        try:
            logits = model(Normalize(recipe.augment.mean, recipe.augment.std)(images[:1]))
        except ValueError as error:
            raise RecipeError(f"attention.implementation = {attention.implementation!r}: {error}") from None
    if not torch.isfinite(logits).all():
        raise RecipeError("model: the first image's logits are not finite; use attention.init=variance_preserving")
    return (
        f"model: {parameter_count(model):,} parameters; one image through it on the CPU gives {logits.shape[1]} logits"
    )
