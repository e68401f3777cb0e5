"""The parts of a detector's training, built from a recipe."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.detection import MaskRCNN

from karat_scale.data.plan import TrainPlan, choose_micro_batch
from karat_scale.engine.distributed import World
from karat_scale.models.operators import check_implementation, describe_implementation
from karat_scale.reporting.progress import Reporter
from karat_scale.run.initial_weights import initialise
from karat_scale.run.run_directory import RunDirectory
from karat_scale.run.signals import StopSignals
from karat_scale.tasks.detection.backbone import build_vit, take_backbone_weights
from karat_scale.tasks.detection.checkpoint import DetectionCheckpoints
from karat_scale.tasks.detection.coco import CocoSplit, check_classes
from karat_scale.tasks.detection.mask_rcnn import build_detector
from karat_scale.tasks.detection.optimizer import StepSchedule, build_optimizer, build_schedule
from karat_scale.tasks.detection.recipe import DetectionRecipe


@dataclass
class DetectionParts:
    """One rank's parts of a run. `replica` is `model`, or a wrapper that averages its gradients over ranks."""

    recipe: DetectionRecipe
    world: World
    train: CocoSplit
    val: CocoSplit
    plan: TrainPlan
    model: MaskRCNN
    replica: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: StepSchedule
    checkpoints: DetectionCheckpoints
    reporter: Reporter
    signals: StopSignals


def build_parts(
    recipe: DetectionRecipe, world: World, directory: RunDirectory, signals: StopSignals, reporter: Reporter
) -> DetectionParts:
    """Build everything that a loop needs. Mistakes show early: first data, then plan, then model.

    Raises:
        UserError: the recipe does not fit the data or the world.
    """
    train, val = open_split(recipe, "train"), open_split(recipe, "val")
    plan = TrainPlan(
        seed=recipe.run.seed,
        num_samples=len(train),
        global_batch=recipe.train.global_batch,
        micro_batch=choose_micro_batch(recipe.train.global_batch, world.size, recipe.train.micro_batch, even=False),
        rank=world.rank,
        world_size=world.size,
    )
    torch.manual_seed(recipe.run.seed)  # the same initial weights on every rank and at every world size
    vit = build_vit(recipe)
    check_implementation(vit, world.device)
    if chosen := describe_implementation(vit, world.device):
        reporter.info(chosen)
    if recipe.init_from and not directory.store.names():
        reporter.info(initialise(vit, recipe, world, take_backbone_weights))
    model = build_detector(vit, recipe).to(world.device)
    torch.manual_seed(recipe.run.seed + 1 + world.rank)  # but different samples on each rank
    replica: nn.Module = model
    if world.size > 1:
        devices = [world.device] if world.device.type == "cuda" else None
        replica = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
    optimizer = build_optimizer(model, recipe.optim, world.device)
    return DetectionParts(
        recipe=recipe,
        world=world,
        train=train,
        val=val,
        plan=plan,
        model=model,
        replica=replica,
        optimizer=optimizer,
        schedule=build_schedule(recipe, plan.steps_per_epoch),
        checkpoints=DetectionCheckpoints(directory.store, model, optimizer, world, recipe, reporter),
        reporter=reporter,
        signals=signals,
    )


def open_split(recipe: DetectionRecipe, name: str) -> CocoSplit:
    """Return the split "train", only images with objects, or "val", all images.

    Raises:
        UserError: it cannot be read, or its categories are not as many as the model's classes.
    """
    data = recipe.data
    names = (data.train_images, data.train_annotations) if name == "train" else (data.val_images, data.val_annotations)
    split = CocoSplit(data.path, *names, for_training=name == "train")
    check_classes(split, recipe.model.num_classes)
    return split
