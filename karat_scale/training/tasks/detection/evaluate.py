"""COCO's mAP of boxes and masks, by pycocotools. Each image is counted once at any world size."""

import contextlib
import io
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from karat_scale.data.plan import EvalPlan
from karat_scale.engine.distributed import World
from karat_scale.training.tasks.detection.coco import CocoSplit, DetectionBatch, EvalMaker, load_batches
from karat_scale.training.tasks.detection.recipe import DetectionRecipe

_KINDS = {"box": "bbox", "mask": "segm"}


@dataclass(frozen=True)
class DetectionScores:
    """COCO's averages in percent: precision over IoU 0.50 to 0.95, at 0.50 and at 0.75, of boxes and of masks."""

    box_ap: float
    box_ap50: float
    box_ap75: float
    mask_ap: float
    mask_ap50: float
    mask_ap75: float
    images: int
    detections: int

    def __str__(self) -> str:
        box = f"box AP {self.box_ap:.2f} % (AP50 {self.box_ap50:.2f}, AP75 {self.box_ap75:.2f})"
        mask = f"mask AP {self.mask_ap:.2f} % (AP50 {self.mask_ap50:.2f}, AP75 {self.mask_ap75:.2f})"
        return f"{box} {mask} on {self.images:,} images, {self.detections:,} detections"

    def to_json(self) -> dict[str, Any]:
        """Return plain data for an event."""
        return asdict(self)


@torch.no_grad()
def evaluate(
    forward: Callable[..., list[dict[str, Tensor]]],
    split: CocoSplit,
    recipe: DetectionRecipe,
    world: World,
    on_batch: Callable[[int, int], None],
) -> DetectionScores:
    """Evaluate a detector on all images of a split. Collective; the same scores on every rank.

    `forward` maps images, float [3, h, w] in 0 .. 1 each, to torchvision's predictions.

    `on_batch(done, total)` is called after each batch, equally often on every rank; it may raise to stop.
    """
    plan = EvalPlan(len(split), recipe.train.eval_batch, world.rank, world.size)
    found: list[dict[str, Any]] = []
    batches = load_batches(EvalMaker(split), plan.slices(), recipe.data)
    try:
        for done, batch in enumerate(batches, start=1):
            # A rank without an image joins in: at ZeRO-3 a forward pass gathers weights from all.
            images = batch.to(world.device)[0] or [torch.zeros(3, 8, 8, device=world.device)]
            predictions = forward(images)[: len(batch.samples)]
            found += describe(batch, predictions, split)
            on_batch(done, plan.num_batches)
    finally:
        batches.close()
    everything = [one for part in world.gather(found) for one in part]
    return world.broadcast(score(split, everything) if world.is_main else None)  # type: ignore[return-value]


def describe(batch: DetectionBatch, predictions: list[dict[str, Tensor]], split: CocoSplit) -> list[dict[str, Any]]:
    """Return detections as COCO's results: boxes [left, top, width, height], run-length masks at the image's size."""
    from pycocotools import mask as coco_mask

    results = []
    for sample, prediction in zip(batch.samples, predictions, strict=True):
        boxes = prediction["boxes"].float().cpu()
        boxes[:, 2:] -= boxes[:, :2]
        masks = (prediction["masks"][:, 0] > 0.5).to("cpu", torch.uint8).numpy()
        columns = (boxes.tolist(), prediction["labels"].tolist(), prediction["scores"].float().tolist(), masks)
        for box, label, confidence, mask in zip(*columns, strict=True):
            results.append(
                {
                    "image_id": split.image_ids[sample],
                    "category_id": split.category_ids[label - 1],
                    "bbox": box,
                    "score": confidence,
                    "segmentation": coco_mask.encode(np.asfortranarray(mask)),
                }
            )
    return results


def score(split: CocoSplit, results: list[dict[str, Any]]) -> DetectionScores:
    """Return COCO's averages of results over all images of an evaluation split; 0 if nothing was found."""
    from pycocotools.cocoeval import COCOeval

    figures: dict[str, float] = {}
    for name, kind in _KINDS.items():
        averages = np.zeros(3)
        if results:
            with contextlib.redirect_stdout(io.StringIO()):
                # `loadRes` writes to the given dictionaries.
                found = split.index.loadRes([dict(result) for result in results])
                evaluation = COCOeval(split.index, found, kind)
                evaluation.params.imgIds = split.image_ids
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()
            averages = np.maximum(evaluation.stats[:3], 0.0)  # -1 if there is nothing to find
        for suffix, average in zip(("ap", "ap50", "ap75"), averages, strict=True):
            figures[f"{name}_{suffix}"] = round(100 * float(average), 4)
    return DetectionScores(**figures, images=len(split), detections=len(results))
