"""What a training loop is made of, and how it is built from a recipe."""

from dataclasses import dataclass

import torch

from karat_scale.checkpoint.checkpoints import Checkpoints
from karat_scale.checkpoint.snapshots import Snapshots
from karat_scale.data.augmentation.device_augment import DeviceAugment
from karat_scale.data.augmentation.mixing import Mixer
from karat_scale.data.augmentation.normalize import Normalize
from karat_scale.data.backends import Backend, ImageSpec, open_backend
from karat_scale.data.formats.checks import unused_classes
from karat_scale.data.plan import TrainPlan
from karat_scale.data.staged import staged_copy
from karat_scale.engine.distributed import World
from karat_scale.engine.ema import Ema
from karat_scale.engine.engine import Engine
from karat_scale.engine.recompute import apply_recompute
from karat_scale.engine.schedule import CosineSchedule, build_schedule
from karat_scale.models.freeze import freeze
from karat_scale.models.operators import check_implementation, describe_implementation
from karat_scale.recipe import Recipe
from karat_scale.reporting.efficiency import Efficiency, device_peak
from karat_scale.reporting.histograms import HeadHistograms
from karat_scale.reporting.profiler import StepProfiler
from karat_scale.reporting.progress import Reporter
from karat_scale.run.initial_weights import initialise
from karat_scale.run.run_directory import RunDirectory
from karat_scale.run.signals import StopSignals
from karat_scale.tasks.classification.teacher import build_model, keep_teacher


@dataclass
class Parts:
    """One rank's parts of a run."""

    recipe: Recipe
    world: World
    backend: Backend
    plan: TrainPlan
    engine: Engine
    ema: Ema | None
    schedule: CosineSchedule
    augment: DeviceAugment
    mixer: Mixer
    normalize: Normalize
    efficiency: Efficiency
    profiler: StepProfiler
    checkpoints: Checkpoints
    snapshots: Snapshots
    histograms: HeadHistograms
    reporter: Reporter
    signals: StopSignals


def build_parts(
    recipe: Recipe, world: World, directory: RunDirectory, signals: StopSignals, reporter: Reporter
) -> Parts:
    """Build everything a loop needs, in the order in which mistakes show soonest: data, plan, model, engine.

    Raises:
        UserError: the recipe does not fit the data or the world.
    """
    backend = open_backend(ImageSpec.of(recipe))
    if copy := staged_copy(recipe.data.path):
        reporter.info(f"the images are read from {copy}, this node's copy")
    if notice := unused_classes(backend.num_classes, recipe.model.num_classes):
        reporter.info(f"notice: {notice}")
    plan = TrainPlan.of(recipe, backend.num_train, world.rank, world.size)
    schedule = build_schedule(recipe, plan.steps_per_epoch)
    world.on_main(lambda: keep_teacher(recipe, directory.path))
    torch.manual_seed(recipe.run.seed)  # the same initial weights on every rank and world
    model = build_model(recipe, directory.path)
    check_implementation(model, world.device)
    if chosen := describe_implementation(model, world.device):
        reporter.info(chosen)
    if recipe.init_from and not directory.store.names():
        reporter.info(initialise(model, recipe, world))
    if recipe.train.freeze:
        reporter.info(freeze(model, recipe.train.freeze))
    torch.manual_seed(recipe.run.seed + 1 + world.rank)  # but dropout of its own on each
    if recomputed := apply_recompute(model, recipe, world, plan.micro_batch):
        reporter.info(recomputed)
    engine = Engine(model, recipe, world, plan.micro_batch)
    if recipe.train.compile:
        reporter.info(f"the first step compiles the model (train.compile = {recipe.train.compile})")
    ema = Ema(engine.deepspeed, recipe.train) if recipe.train.ema_decay else None
    return Parts(
        recipe=recipe,
        world=world,
        backend=backend,
        plan=plan,
        engine=engine,
        ema=ema,
        schedule=schedule,
        augment=DeviceAugment(recipe.augment, recipe.model.image_size),
        mixer=Mixer(recipe.augment, recipe.model.num_classes, recipe.run.seed),
        normalize=Normalize(recipe.augment.mean, recipe.augment.std),
        efficiency=Efficiency(recipe, world.size, device_peak(world.device, recipe.train)),
        profiler=StepProfiler(recipe.log.profile_steps, directory.profile, world, reporter),
        checkpoints=Checkpoints(directory.store, engine, ema, world, recipe, reporter),
        histograms=HeadHistograms(engine, recipe.log, reporter),
        snapshots=Snapshots(directory.snapshots, engine, world, recipe, reporter),
        reporter=reporter,
        signals=signals,
    )
