"""Predictions of a whole set of images, each image once on any number of ranks."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from karat_scale.commands.evaluate.predictions import KEPT, Predictions
from karat_scale.data.augmentation.normalize import Normalize
from karat_scale.data.batch import BadSample, Batch
from karat_scale.data.loading.device_feed import DeviceFeed
from karat_scale.data.plan import BatchSlice, EvalPlan
from karat_scale.engine.distributed import World
from karat_scale.engine.memory import one_line_out_of_memory

OnBatch = Callable[[int, int, tuple[BadSample, ...]], None]
"""Hears how many batches are done, of how many, and what could not be read."""


@torch.no_grad()
def collect(
    forward: Callable[[Tensor], Tensor],
    load: Callable[[Iterable[BatchSlice]], Iterator[Batch]],
    images: int,
    batch_size: int,
    normalize: Normalize,
    world: World,
    on_batch: OnBatch,
    among: Tensor | None = None,
) -> Predictions:
    """Return the predictions for `images` images, the same on every rank. Collective.

    Args:
        forward: from normalised images [b, 3, H, W] to logits [b, classes].
        load: from slices of the ids 0 to images - 1 to batches, as a backend's `eval_batches`.
        on_batch: called equally often on every rank; it may raise to stop.
        among: the labels between which the model may choose; None for all.

    Raises:
        DataError: no image can be read.
        UserError: memory ran out.
    """
    plan = EvalPlan(images, batch_size, world.rank, world.size)
    batches = DeviceFeed(load(plan.slices()), world.device)
    parts: list[dict[str, Any]] = []
    bad = 0
    for done in itertools.count(1):
        with one_line_out_of_memory(lambda: f"lower train.eval_batch (now {batch_size})"):
            batch = next(batches, None)
            if batch is None:
                break
            logits = forward(normalize(batch.images)).float()
            batches.fetch_ahead()
            parts.append(_of_batch(logits, batch, among))
        bad += len(batch.bad)
        on_batch(done, plan.num_batches, batch.bad)
    gathered = world.gather({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    whole: dict[str, Any] = {name: np.concatenate([one[name] for one in gathered]) for name in gathered[0]}
    order = np.argsort(whole["ids"], kind="stable")
    total_bad = int(world.sum(torch.tensor(bad)))
    ordered: dict[str, Any] = {name: values[order] for name, values in whole.items()}
    return Predictions(**ordered, bad=total_bad, classes=())


def _of_batch(logits: Tensor, batch: Batch, among: Tensor | None) -> dict[str, Any]:
    """Return the arrays of `Predictions` of the images that could be read."""
    if among is not None:
        masked = torch.full_like(logits, -torch.inf)
        masked[:, among] = logits[:, among]
        logits = masked
    count = min(KEPT, logits.shape[1] if among is None else len(among))
    probabilities, labels = logits.softmax(-1).topk(count)
    losses = torch.nn.functional.cross_entropy(logits, batch.labels, reduction="none")
    keep = batch.valid.cpu().numpy()
    return {
        "ids": batch.sample_ids.numpy()[keep],
        "labels": batch.labels.cpu().numpy()[keep],
        "top_labels": labels.cpu().numpy()[keep],
        "top_probabilities": probabilities.cpu().numpy()[keep],
        "losses": losses.cpu().numpy()[keep],
    }
