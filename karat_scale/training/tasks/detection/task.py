"""Training a detector: Mask R-CNN's losses, and COCO's mAP of boxes and masks, by pycocotools.

An evaluation counts each image once at any world size.
"""

import contextlib
import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from timm.models import VisionTransformer
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN

from karat_scale.data.loading.device_feed import DeviceFeed
from karat_scale.data.loading.workers import OrderedResults
from karat_scale.data.plan import BatchSlice, EvalPlan, TrainPlan, micro_batch_of
from karat_scale.engine.distributed import World
from karat_scale.engine.memory import one_line_out_of_memory
from karat_scale.engine.optimizers import Groups
from karat_scale.engine.reporting.progress import Reporter
from karat_scale.engine.run_state import RunState
from karat_scale.foundation.errors import DataError
from karat_scale.recipe import AttentionConfig
from karat_scale.training.run_directory import RunDirectory
from karat_scale.training.task import OnBatch, Scores, Task, Waiting
from karat_scale.training.tasks.detection import backbone as detector
from karat_scale.training.tasks.detection import coco
from karat_scale.training.tasks.detection.recipe import DetectionRecipe

Predictions = list[dict[str, Tensor]]
"""torchvision's predictions for each image."""
_KINDS = {"box": "bbox", "mask": "segm"}


@dataclass(frozen=True)
class DetectionScores(Scores):
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


@torch.no_grad()
def evaluate(
    forward: Callable[..., Predictions], split: coco.CocoSplit, recipe: DetectionRecipe, world: World, on_batch: OnBatch
) -> DetectionScores:
    """Evaluate a detector on all images of a split. Collective; the same scores on every rank.

    `forward` maps images, float [3, h, w] in 0 .. 1 each, to torchvision's predictions.

    `on_batch` is called after each batch, equally often on every rank; it may raise to stop.

    Raises:
        UserError: memory ran out.
    """
    size = recipe.train.eval_batch
    plan = EvalPlan(len(split), size, world.rank, world.size)
    found: list[dict[str, Any]] = []
    batches = coco.load_batches(coco.EvalMaker(split), plan.slices(), recipe.data)
    try:
        for done, batch in enumerate(batches, start=1):
            with one_line_out_of_memory(lambda: f"lower train.eval_batch (now {size}) or detector.detections"):
                # A rank without an image joins in: at ZeRO-3 a forward pass gathers weights from all.
                images = batch.to(world.device)[0] or [torch.zeros(3, 8, 8, device=world.device)]
                predictions = forward(images)[: len(batch.samples)]
                found += describe(batch, predictions, split)
            on_batch(done, plan.num_batches)
    finally:
        batches.close()
    everything = [one for part in world.gather(found) for one in part]
    return world.on_main(lambda: score(split, everything))


def describe(batch: coco.DetectionBatch, predictions: Predictions, split: coco.CocoSplit) -> list[dict[str, Any]]:
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


def score(split: coco.CocoSplit, results: list[dict[str, Any]]) -> DetectionScores:
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


@dataclass
class DetectionState(RunState):
    """The state of a run that trains a detector. Scores are COCO's averages in percent; masks decide which is best."""

    scores = ("mask_ap", "box_ap")

    best_box_ap: float | None = None
    best_mask_ap: float | None = None
    last_box_ap: float | None = None
    last_mask_ap: float | None = None


class DetectionTask(Task):
    """Images with objects, in COCO's format."""

    kind = "detection"
    reader = "karat detect --eval"
    replays = False
    recipe_type = DetectionRecipe
    state_type = DetectionState
    recipe: DetectionRecipe

    def __init__(self, recipe: DetectionRecipe, world: World, reporter: Reporter) -> None:
        super().__init__(recipe, world, reporter)
        self.val = coco.open_split(recipe, "val")
        self.classes = tuple(self.val.classes)
        self._loader: OrderedResults[coco.DetectionBatch] | None = None
        self._tell(self.val)

    @cached_property
    def train(self) -> coco.CocoSplit:
        """The training split. An evaluation needs none.

        Raises DataError if its labels are not those of the validation split.
        """
        train = coco.open_split(self.recipe, "train")
        if train.classes != self.val.classes:
            pairs = zip(train.classes, self.val.classes, strict=True)
            label, (ours, theirs) = next((n, pair) for n, pair in enumerate(pairs, start=1) if pair[0] != pair[1])
            raise DataError(
                f"category {label} by id is {ours} in {train.file} and {theirs} in {self.val.file}; give the "
                "categories the same ids and names in both"
            )
        self._tell(train)
        return train

    def _tell(self, split: coco.CocoSplit) -> None:
        for notice in split.notices:
            self.reporter.info(f"notice: {split.file.name}: {notice}")

    @property
    def num_train(self) -> int:
        """Number of training images, which have objects."""
        return len(self.train)

    @property
    def num_val(self) -> int:
        """Number of validation images."""
        return len(self.val)

    @property
    def train_identity(self) -> str:
        """The identity of the training images and their objects."""
        return f"COCO:{self.train.identity}"

    @staticmethod
    def less_memory(recipe: DetectionRecipe, world_size: int) -> str:
        """Return what to change in the recipe if memory runs out."""
        return "lower train.micro_batch, detector.rois or detector.proposals"

    def plan(self) -> TrainPlan:
        """Return the order of the data on this rank."""
        train, world = self.recipe.train, self.world
        return TrainPlan(
            seed=self.recipe.run.seed,
            num_samples=self.num_train,
            global_batch=train.global_batch,
            micro_batch=micro_batch_of(self.recipe, world.size),
            rank=world.rank,
            world_size=world.size,
        )

    def schedule(self, steps_per_epoch: int) -> detector.StepSchedule:
        """Return the recipe's schedule in steps."""
        return detector.StepSchedule(self.recipe, steps_per_epoch)

    def build_backbone(self, directory: RunDirectory) -> VisionTransformer:
        """Return the ViT."""
        return detector.build_vit(self.recipe)

    def take_weights(self, backbone: nn.Module, weights: Mapping[str, Tensor], attention: AttentionConfig) -> str:
        """Copy a classifier's weights into the ViT; returns what was not simply copied."""
        return detector.take_backbone_weights(backbone, weights, attention)

    def build_model(self, backbone: nn.Module) -> MaskRCNN:
        """Return Mask R-CNN on the ViT."""
        return detector.build_detector(cast(VisionTransformer, backbone), self.recipe)

    def groups(self, model: nn.Module) -> Groups:
        """Return the optimizer's groups, with layer-wise learning rates."""
        return detector.detector_groups(model, self.recipe.optim)

    def train_batches(self, slices: Iterable[BatchSlice], waiting: Waiting) -> DeviceFeed[coco.DetectionBatch]:
        """Return this rank's micro batches, on the host: their images differ in size."""
        self._stop_workers()
        self._loader = coco.load_batches(coco.TrainMaker(self.train, self.recipe), slices, self.recipe.data)
        return DeviceFeed(self._loader, torch.device("cpu"), waiting)

    def losses(self, forward: Callable[..., dict[str, Tensor]], batch: coco.DetectionBatch) -> dict[str, Tensor]:
        """Return the sum of Mask R-CNN's losses, and each of them."""
        images, targets = batch.to(self.world.device)
        parts = {name: loss.float() for name, loss in forward(images, targets).items()}
        return {"loss": torch.stack([*parts.values()]).sum(), **parts}

    def evaluate(self, forward: Callable[..., Any], on_batch: OnBatch) -> DetectionScores:
        """Evaluate all validation images."""
        return evaluate(forward, self.val, self.recipe, self.world, on_batch)

    def close(self) -> None:
        """Stop the data workers."""
        self._stop_workers()

    def _stop_workers(self) -> None:
        if self._loader is not None:
            self._loader.close()
