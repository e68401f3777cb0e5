"""Training a detector: Mask R-CNN's losses, and COCO's mAP."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN

from karat_scale.data.loading.device_feed import DeviceFeed
from karat_scale.data.loading.loader import OrderedResults
from karat_scale.data.plan import BatchSlice, TrainPlan, micro_batch_of
from karat_scale.engine.distributed import World
from karat_scale.engine.optimizers import Groups
from karat_scale.engine.reporting.progress import Reporter
from karat_scale.engine.run_state import RunState
from karat_scale.training.run_directory import RunDirectory
from karat_scale.training.task import OnBatch, Task, Waiting
from karat_scale.training.tasks.detection.backbone import (
    StepSchedule,
    build_detector,
    build_schedule,
    build_vit,
    detector_groups,
    take_backbone_weights,
)
from karat_scale.training.tasks.detection.coco import CocoSplit, DetectionBatch, TrainMaker, load_batches, open_split
from karat_scale.training.tasks.detection.evaluate import DetectionScores, evaluate
from karat_scale.training.tasks.detection.recipe import DetectionRecipe


@dataclass
class DetectionState(RunState):
    """Of a run that trains a detector. Scores are COCO's averages in percent; the best is the best of masks."""

    scores = ("mask_ap", "box_ap")

    best_box_ap: float | None = None
    best_mask_ap: float | None = None
    last_box_ap: float | None = None
    last_mask_ap: float | None = None


class DetectionTask(Task):
    """Images with objects, in COCO's format."""

    kind = "detection"
    recipe_type = DetectionRecipe
    state_type = DetectionState
    recipe: DetectionRecipe

    def __init__(self, recipe: DetectionRecipe, world: World, reporter: Reporter) -> None:
        super().__init__(recipe, world, reporter)
        self.val = open_split(recipe, "val")
        self.classes = tuple(self.val.classes)
        self._loader: OrderedResults[DetectionBatch] | None = None

    @cached_property
    def train(self) -> CocoSplit:
        """The training split. An evaluation needs none."""
        return open_split(self.recipe, "train")

    @property
    def num_train(self) -> int:
        """Number of training images, which have objects."""
        return len(self.train)

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

    def schedule(self, steps_per_epoch: int) -> StepSchedule:
        """Return the recipe's schedule in steps."""
        return build_schedule(self.recipe, steps_per_epoch)

    def build_backbone(self, directory: RunDirectory) -> VisionTransformer:
        """Return the ViT."""
        return build_vit(self.recipe)

    def take_weights(self, backbone: nn.Module, weights: Mapping[str, Tensor]) -> str:
        """Copy a classifier's weights into the ViT; returns what was not simply copied."""
        return take_backbone_weights(backbone, weights)

    def build_model(self, backbone: nn.Module) -> MaskRCNN:
        """Return Mask R-CNN on the ViT."""
        return build_detector(cast(VisionTransformer, backbone), self.recipe)

    def groups(self, model: nn.Module) -> Groups:
        """Return the optimizer's groups, with layer-wise learning rates."""
        return detector_groups(model, self.recipe.optim)

    def train_batches(self, slices: Iterable[BatchSlice], waiting: Waiting) -> DeviceFeed[DetectionBatch]:
        """Return this rank's micro batches, on the host: their images differ in size."""
        self._loader = load_batches(TrainMaker(self.train, self.recipe), slices, self.recipe.data)
        return DeviceFeed(self._loader, torch.device("cpu"), waiting)

    def losses(self, forward: Callable[..., dict[str, Tensor]], batch: DetectionBatch) -> dict[str, Tensor]:
        """Return the sum of Mask R-CNN's losses, and each of them."""
        images, targets = batch.to(self.world.device)
        parts = {name: loss.float() for name, loss in forward(images, targets).items()}
        return {"loss": torch.stack([*parts.values()]).sum(), **parts}

    def evaluate(self, forward: Callable[..., Any], on_batch: OnBatch) -> DetectionScores:
        """Evaluate all validation images."""
        return evaluate(forward, self.val, self.recipe, self.world, on_batch)

    def close(self) -> None:
        """Stop the data workers."""
        if self._loader is not None:
            self._loader.close()
