"""A process group and small DeepSpeed engines inside the test process."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from karat_scale.checkpoint.checkpoints import Checkpoints
from karat_scale.checkpoint.restore import falsehood
from karat_scale.checkpoint.store import CheckpointStore
from karat_scale.engine.deepspeed_config import config_directory
from karat_scale.engine.distributed import World
from karat_scale.engine.engine import Engine
from karat_scale.engine.optimizers import Ema
from karat_scale.engine.reporting.progress import PlainDisplay, Reporter
from karat_scale.models import create_model
from karat_scale.recipe import Recipe, RunRecipe
from karat_scale.recipe.loading import load_recipe
from karat_scale.training.run_directory import RunDirectory
from karat_scale.training.task import Task
from karat_scale.training.tasks.classification.task import ClassificationTask, TrainState
from karat_scale.training.trainer import Trainer
from tests.conftest import SMALL

CONFIGS = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload", "zero3_offload_params")


def _cells(quick: set[tuple[str, str]]) -> list[Any]:
    """Return each file with each precision; the cells that are not in `quick` are slow tests."""
    cells = itertools.product(CONFIGS, ("fp32", "bf16"))
    return [pytest.param(*cell, marks=() if cell in quick else pytest.mark.slow) for cell in cells]


# Each file, and each precision with the stages that it changes.
CELLS = _cells({*zip(CONFIGS, itertools.cycle(("fp32", "bf16"))), ("zero0", "bf16"), ("zero3", "fp32")})
# Each of DeepSpeed's optimizers: stages 1 and 2 have one. A run in bf16 keeps its weights in fp32.
FEW_CELLS = _cells({("zero0", "fp32"), ("zero1", "bf16"), ("zero2_offload", "fp32"), ("zero3", "bf16")})
# The controls and variants of attention, some in a mode that others have too.
VARIANTS = {
    "static": ("attention.kind=static", "attention.softmax_heads=1"),
    "static_softmax": ("attention.kind=static_softmax",),
    "scaled_softmax": ("attention.kind=scaled_softmax",),
    "gated": ("attention.kind=gated", "attention.softmax_heads=1"),
    "centred": ("attention.kind=centred", "attention.mode=universal"),
    "softmax_bias": ("attention.kind=softmax_bias", "model.weight_init=mimetic"),
    "without scores": ("attention.scores=false",),
    "content": ("attention.form=content", "attention.mode=universal"),
    "smooth": ("attention.form=smooth", "attention.modes=4", "attention.residual=true"),
    "content in a block": ("attention.blocks={0: {kind: softmax}, 1: {form: content}}",),
    "bounded": ("attention.bound=2", "attention.mode=universal"),
}

# Hosts of attention that are no plain ViT.
CONVIT = ("model.name=convit_tiny", "model.depth=3", "attention.mode=universal")
SWIN = (
    *("model.name=swin_mini_patch2_window4_32", "model.image_size=32", "model.patch_size=", "model.embed_dim="),
    *("model.depth=", "model.num_heads="),
)


@pytest.fixture
def small_recipe(tmp_path: Path) -> Callable[..., Recipe]:
    """Return a function that loads the small recipe on synthetic data, with overrides."""
    path = tmp_path / "small.yaml"
    path.write_text("data: {backend: synthetic, synthetic_samples: 32}\nattention: {kind: karat}\n")

    def load(*overrides: str) -> Recipe:
        fixed = ("schedule.warmup_epochs=0", f"run.dir={tmp_path / 'run'}")
        return load_recipe(path, [*SMALL, *fixed, *overrides])

    return load


T = TypeVar("T", bound=Trainer)


def make_trainer(
    recipe: RunRecipe,
    world: World,
    reporter: Reporter | None = None,
    task_type: type[Task] = ClassificationTask,
    kind: Callable[..., T] = Trainer,
) -> T:
    """Return the trainer of a run, in the directory of the recipe."""
    directory = RunDirectory(recipe.run.dir)
    directory.store.root.mkdir(parents=True, exist_ok=True)
    task = task_type(recipe, world, reporter or Reporter(PlainDisplay(), None))
    return kind(task, directory)


@pytest.fixture
def make_engine(world: World) -> Callable[[Recipe], Engine]:
    """Return a function that makes an engine over a freshly initialised model, the same one each time."""

    def make(recipe: Recipe) -> Engine:
        torch.manual_seed(0)
        model = create_model(recipe.model, recipe.attention)
        engine = Engine(model, recipe, world, recipe.train.global_batch)
        if recipe.train.compile:
            engine.compile(recipe.train.compile)
        return engine

    return make


@pytest.fixture
def whole_zero3(tmp_path: Path) -> str:
    """Return a stage 3 file that also partitions the smallest parameters, which the shipped file leaves whole."""
    config = json.loads((config_directory() / "zero3.json").read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path = tmp_path / "whole_zero3.json"
    path.write_text(json.dumps(config))
    return str(path)


@pytest.fixture
def make_checkpoints(world: World, make_engine: Callable[[Recipe], Engine]) -> Callable[..., Checkpoints]:
    """Return a function that makes the checkpoints of a new engine in a directory."""

    def make(recipe: Recipe, root: Path) -> Checkpoints:
        return checkpoints_of(make_engine(recipe), recipe, world, root)

    return make


def checkpoints_of(engine: Engine, recipe: Recipe, world: World, root: Path) -> Checkpoints:
    """Return the checkpoints of an engine and its average."""
    ema = Ema(engine.deepspeed, recipe.train) if recipe.train.ema_decay else None
    reporter, kind = Reporter(PlainDisplay(), None), (ClassificationTask.kind, TrainState)
    return Checkpoints(CheckpointStore(root, falsehood), engine, ema, world, recipe, reporter, *kind)


def train_steps(checkpoints: Checkpoints, *steps: int) -> None:
    """Train these steps with the engine and the average of `checkpoints`."""
    for step in steps:
        train_once(checkpoints.engine, step)
        checkpoints.ema.update(step)


def random_batch(seed: int, size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Return eight images and their labels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 3, size, size, generator=generator), torch.randint(0, 4, (8,), generator=generator)


def train_once(engine: Engine, seed: int, lr: float = 1e-2, size: int = 16) -> float | None:
    """Take one step on random images; return the gradient norm."""
    images, labels = random_batch(seed, size)
    engine.set_lr(lr)
    engine.backward(torch.nn.functional.cross_entropy(engine.forward(images), labels))
    norm = engine.step()
    return None if norm is None else float(norm)


def weights(engine: Engine) -> list[torch.Tensor]:
    """Return copies of the module's parameters, whole at every stage."""
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(list(engine.module.parameters()), enabled=engine.stage == 3):
        return [parameter.detach().clone() for parameter in engine.module.parameters()]


def equal(left: object, right: object) -> bool:
    """Return whether two values are equal bit for bit, through nested containers."""
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and torch.equal(left, right)
    if isinstance(left, dict):
        return isinstance(right, dict) and left.keys() == right.keys() and all(equal(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple):
        return isinstance(right, list | tuple) and len(left) == len(right) and all(map(equal, left, right))
    if hasattr(left, "__dict__"):  # DeepSpeed's loss scaler and fragment addresses
        return type(left) is type(right) and equal(vars(left), vars(right))
    return left == right
