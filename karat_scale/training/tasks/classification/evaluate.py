"""Top-1, top-5 and loss over an evaluation split, each sample counted once on any world size.

The state of a classifier's training has these scores: a checkpoint's `state.json` says them.
"""

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn import functional as F

from karat_scale.data.augmentation.normalize import Normalize
from karat_scale.data.loading.base import Backend
from karat_scale.data.loading.device_feed import DeviceFeed
from karat_scale.data.plan import EvalPlan
from karat_scale.data.streams.progress import StreamState
from karat_scale.engine.distributed import World
from karat_scale.engine.memory import one_line_out_of_memory
from karat_scale.engine.run_state import RunState
from karat_scale.foundation.errors import DataError


@dataclass(frozen=True)
class EvalResult:
    """Percentages over `images` samples; `bad` samples could not be read and are not among them."""

    top1: float
    top5: float
    loss: float
    images: int
    bad: int

    def __str__(self) -> str:
        five = f" top-5 {self.top5:.2f} %" if self.top5 < 100 else ""  # as of a model with five classes
        scores = f"top-1 {self.top1:.2f} %{five} loss {self.loss:.4f}"
        return f"{scores} on {self.images:,} images, {self.bad} unreadable"

    def to_json(self) -> dict[str, Any]:
        """Plain data for an event."""
        return asdict(self)


@torch.no_grad()
def evaluate(
    forward: Callable[[torch.Tensor], torch.Tensor],
    backend: Backend,
    normalize: Normalize,
    batch_size: int,
    world: World,
    on_batch: Callable[[int, int, Any], None],
) -> EvalResult:
    """Evaluate `forward` (normalised images [b, 3, H, W] to logits [b, classes]) on the validation split.

    `on_batch(done, total, bad)` is called after each batch, the same number of times on every rank, with
    the samples that could not be read; it may raise to stop.

    Raises:
        DataError: no sample of the split can be read.
        UserError: memory ran out.
    """
    plan = EvalPlan(backend.num_val, batch_size, world.rank, world.size)
    batches = DeviceFeed(backend.eval_batches(plan.slices()), world.device)
    totals = torch.zeros(4, dtype=torch.float64, device=world.device)
    bad = 0
    for done in itertools.count(1):
        with one_line_out_of_memory(lambda: f"lower train.eval_batch (now {batch_size})"):
            batch = next(batches, None)
            if batch is None:
                break
            totals += _count(forward(normalize(batch.images)).float(), batch.labels, batch.valid)
            batches.fetch_ahead()
        bad += len(batch.bad)
        on_batch(done, plan.num_batches, batch.bad)
    top1, top5, loss, images = world.sum(totals).tolist()
    bad = int(world.sum(torch.tensor(bad)))
    if not images:
        raise DataError(f"none of the {backend.num_val} validation samples can be read")
    return EvalResult(100 * top1 / images, 100 * top5 / images, loss / images, int(images), bad)


def _count(logits: torch.Tensor, labels: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """[top-1 hits, top-5 hits, summed loss, samples] in float64, on the device of the logits."""
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = (ranked == labels[:, None]) & valid[:, None]
    loss = F.cross_entropy(logits, labels.clamp(min=0), reduction="none").double()
    counts = (hits[:, 0].sum(), hits.sum(), torch.where(valid, loss, 0.0).sum(), valid.sum())
    return torch.stack([count.double() for count in counts])


@dataclass
class TrainState(RunState):
    """Of a run that trains a classifier. Scores are in percent."""

    scores = ("top1", "top5")

    best_top1: float | None = None
    best_top5: float | None = None
    last_top1: float | None = None
    last_top5: float | None = None
    data_digest: int = 0
    bad_samples: int = 0
    distilled_from: str = ""
    """The digest of the weights of `distill.from`."""
    image_size: int = 0
    """Of the model in the checkpoint, in a run with `schedule.image_sizes`."""
    stream: StreamState | None = None
    """Where the lanes stand, in a run with `data.order: stream`."""
