"""A check that training is right on this machine: the losses of each mode of the trainer against fp32 on the CPU.

A small KArAt ViT trains from one seed on the same images in every mode, by the trainer and the checkpoints of
`karat train`. Nothing reads the device between the steps, so a missing wait shows up as it would in a run.
"""

import json
import math
import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from karat_scale.attention import KaratOperator
from karat_scale.checkpoint.restore import read_state
from karat_scale.checkpoint.store import checkpoint_name
from karat_scale.commands.bench.gpu.worker import Task, is_fatal
from karat_scale.commands.measure.step import synthetic_recipe
from karat_scale.data.batch import Batch
from karat_scale.engine import distributed
from karat_scale.engine.deepspeed_config import config_directory
from karat_scale.engine.distributed import World
from karat_scale.engine.engine import PRECISIONS
from karat_scale.foundation.files import write_atomically
from karat_scale.foundation.machine import be_killed_with_parent
from karat_scale.recipe import Recipe
from karat_scale.training.run_directory import RunDirectory
from karat_scale.training.task import OnBatch
from karat_scale.training.tasks.classification.task import ClassificationTask, EvalResult, TrainState
from karat_scale.training.trainer import silent_trainer

Losses = dict[int | str, float]
# The losses of STEPS steps are compared. The loss of NAN_STEP is NaN on one rank, and training goes on to step LAST.
STEPS, NAN_STEP, LAST = 20, 21, 24
# A second run of the mode stops here, and is resumed from its checkpoint.
STOP = 10
EVALUATION = "the evaluation"
# fp32: the design's promise for the same training with another order of sums. CPUs differ by 2e-7 here. Noise of 2e-6
# in all inputs and outputs of the operator, which is the error that kernels may have, changes the losses by 7e-7.
# bf16: each rounding is at most 2^-9 of a number. About 16 of them follow one another from the image to the loss, eight
# in each of the two blocks. Independent roundings add up to the root of their number, 4 x 2^-9. CPUs differ by 5e-4.
ALLOWED = {"fp32": 1e-5, "bf16": 2.0**-7}
MODEL = {"name": "vit_tiny_patch16_224", "image_size": 112, "depth": 2, "embed_dim": 128, "num_heads": 2}
TOY_MODEL = {**MODEL, "image_size": 32, "patch_size": 8, "embed_dim": 64}
CLASSES, STEPS_AN_EPOCH = 10, 4
# Expected seconds of a mode, until one of its kind was measured.
GUESSES = {"eager": 15.0, "compiled": 60.0}
LINEAR, OPERATOR = "linear_dtype", "operator_dtype"
WORDS = {LINEAR: "linear layers compute", OPERATOR: "the operator computes"}
# Values for DeepSpeed's files. With the shipped values, this small model is in one bucket, and whole at stage 3.
SMALL = {
    **dict.fromkeys(("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size"), 100_000),
    "stage3_param_persistence_threshold": 0,
}


@dataclass(frozen=True)
class Mode:
    """`train.precision`, the ZeRO stage and `train.compile` of a recipe."""

    precision: str = "fp32"
    stage: int = 0
    compile: str = ""

    def __str__(self) -> str:
        words = {"": "eager", "default": "compiled", "reduce-overhead": "CUDA graphs"}
        return f"{self.precision}, ZeRO {self.stage}, {words[self.compile]}"


EAGER = tuple(Mode(precision, stage) for stage in range(4) for precision in ALLOWED)
COMPILED = tuple(Mode(precision, 0, mode) for mode in ("reduce-overhead", "default") for precision in ALLOWED)


@dataclass
class Seen:
    """Results of a run: mean losses over the ranks by step, skipped steps, and the dtypes that layers compute in."""

    losses: Losses = field(default_factory=dict)
    skipped: int = 0
    dtypes: dict[str, str] = field(default_factory=dict)


class WatchedTask(ClassificationTask):
    """Keeps losses on the device until the trainer reads the device, and makes one loss of the last rank NaN."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.seen = Seen()
        self._kept: dict[int, Tensor] = {}

    def build_backbone(self, directory: RunDirectory) -> nn.Module:
        """Return the classifier, which notes its dtypes where it is not compiled and its operator is one operation."""
        model = super().build_backbone(directory)
        if not self.recipe.train.compile and self.recipe.attention.implementation != "reference":
            note_dtypes(model, self.seen.dtypes)
        return model

    def losses(self, forward: Callable[..., Tensor], batch: Batch) -> dict[str, Tensor]:
        """Return the loss of a batch; see `ClassificationTask`."""
        step = batch.epoch * STEPS_AN_EPOCH + batch.batch + 1
        losses = super().losses(forward, batch)
        if step == NAN_STEP and self.world.rank == self.world.size - 1:
            losses["loss"] = losses["loss"] * math.nan
        self._kept[step] = losses["loss"].detach().clone()
        return losses

    def fold(self, state: TrainState) -> None:
        """Read the losses, too: all ranks come here at a report and before a save."""
        super().fold(state)
        kept, self._kept = self._kept, {}
        if kept:
            means = self.world.sum(torch.stack(list(kept.values()))) / self.world.size
            self.seen.losses.update(zip(kept, means.tolist(), strict=True))
        self.seen.skipped = state.skipped_steps

    def evaluate(self, forward: Callable[..., Tensor], on_batch: OnBatch) -> EvalResult:
        """Evaluate, and keep the loss: that of the averaged weights."""
        result = super().evaluate(forward, on_batch)
        self.seen.losses[EVALUATION] = result.loss
        return result


def note_dtypes(model: nn.Module, seen: dict[str, str]) -> None:
    """Let the first block's MLP and KArAt operator note the dtype in which they multiply matrices."""
    linear = next(module for name, module in model.named_modules() if name.endswith("mlp.fc1"))
    operator = next(module for module in model.modules() if isinstance(module, KaratOperator))

    def note(key: str, dtype_of: Callable[[Tensor], torch.dtype], _module: nn.Module, _: Any, output: Tensor) -> None:
        if key not in seen and output.requires_grad:
            seen[key] = str(dtype_of(output)).removeprefix("torch.")

    linear.register_forward_hook(partial(note, LINEAR, lambda output: output.dtype))
    operator.register_forward_hook(partial(note, OPERATOR, dtype_of_hidden))


def dtype_of_hidden(output: Tensor) -> torch.dtype:
    """Return the dtype of H, which an operator keeps for its backward pass as its matrix products read it.

    O itself may have been cast.
    """
    node: Any = output.grad_fn
    while not hasattr(node, "saved_tensors"):  # a cast or a view; each implementation saves H first
        node = node.next_functions[0][0]
    dtype: torch.dtype = node.saved_tensors[0].dtype
    return dtype


def measure(task: Task) -> None:
    """Report a row for each mode that the time allows: on one rank all, on several those without torch.compile."""
    world = distributed.start(task.device)
    expected = world.broadcast(_losses_on_the_cpu(task, world.size) if world.is_main else {})
    for mode in EAGER if world.size > 1 else EAGER + COMPILED:
        kind = "compiled" if mode.compile else "eager"
        what = f"{mode}, {world.size} ranks" if world.size > 1 else str(mode)
        task.part(what, kind, GUESSES[kind], partial(_check, task, world, mode, expected, what), world=world)
    distributed.stop()


def _losses_on_the_cpu(task: Task, ranks: int) -> Losses:
    """Return the losses of fp32 with the reference implementation, from one rank in a process of its own."""
    recipe = recipe_of(Mode(), "cpu", ranks, TOY_MODEL if task.toy else MODEL, "reference", task.scratch / "reference")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), be_killed_with_parent) as process:
        return process.submit(_train_alone, recipe).result()


def _train_alone(recipe: Recipe) -> Losses:
    for name in ("RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # another process may hold the card exclusively
    return train(recipe, distributed.start("cpu")).losses


def _check(task: Task, world: World, mode: Mode, expected: Losses, what: str) -> None:
    try:
        row, wrong = compare(task, world, mode, expected)
    except Exception as error:
        if world.size > 1 or is_fatal(error):  # other ranks may wait for this one
            raise
        task.channel.raised(what, error)
        return
    if world.is_main:
        task.channel.row(mode=what, **row, right=not wrong)
        for sentence in wrong:
            task.channel.failed(what, sentence)


def compare(task: Task, world: World, mode: Mode, expected: Losses) -> tuple[dict[str, Any], list[str]]:
    """Train in a mode; train again, but stop at STOP and resume. Return the figures, and a sentence for each fault."""
    model, root = TOY_MODEL if task.toy else MODEL, task.scratch / str(mode)
    whole, cut = (
        recipe_of(mode, task.device, world.size, model, task.implementation, root / name) for name in ("whole", "cut")
    )
    seen = train(whole, world)
    train(cut, world, STOP)
    train(cut, world)
    allowed = ALLOWED[mode.precision]
    compute = str(PRECISIONS[mode.precision].compute).removeprefix("torch.")
    # The other implementations compute in float32 whatever they are given.
    dtypes = {LINEAR: compute, OPERATOR: compute if task.implementation == "triton" else "float32"}
    apart = _apart(seen.losses, expected, range(1, STEPS + 1), allowed)
    faults = {
        "losses": apart,
        "skips": _not_skipped(seen, expected, math.inf if apart else allowed),
        "twice": _other_bits(whole, cut, STOP, "started again"),
        "resumes": _other_bits(whole, cut, LAST, f"resumed at step {STOP}"),
        "dtypes": [
            f"{WORDS[key]} in {dtype}, not in {dtypes[key]}"
            for key, dtype in seen.dtypes.items()
            if dtype != dtypes[key]
        ],
    }
    differences = [_difference(seen.losses, expected, step) for step in range(1, STEPS + 1)]
    row = {"difference": max(differences), "allowed": allowed, **{key: not found for key, found in faults.items()}}
    return {**row, **seen.dtypes}, [sentence for found in faults.values() for sentence in found]


def _difference(losses: Losses, expected: Losses, step: int | str) -> float:
    difference = abs(losses[step] / expected[step] - 1)
    return difference if math.isfinite(difference) else math.inf


def _apart(losses: Losses, expected: Losses, steps: Iterable[int | str], allowed: float) -> list[str]:
    """Return a sentence on the first of the steps whose loss is too far off; the later ones follow from it."""
    for step in steps:
        if (difference := _difference(losses, expected, step)) > allowed:
            where = f"step {step}" if isinstance(step, int) else step
            return [
                f"the loss of {where} is {losses[step]:.7g}, on the CPU in fp32 {expected[step]:.7g}: {difference:.1e} "
                f"apart, allowed {allowed:.0e}"
            ]
    return []


def _not_skipped(seen: Seen, expected: Losses, allowed: float) -> list[str]:
    if seen.skipped != 1 or not math.isnan(seen.losses[NAN_STEP]):
        return [f"step {NAN_STEP} has a NaN on one rank, and {seen.skipped} steps were skipped"]
    after = _apart(seen.losses, expected, (*range(NAN_STEP + 1, LAST + 1), EVALUATION), allowed)
    return [f"after the skipped step {NAN_STEP}, {sentence}" for sentence in after]


def _other_bits(whole: Recipe, cut: Recipe, step: int, how: str) -> list[str]:
    """Return a sentence if two runs' checkpoints of a step differ in a bit of a tensor."""
    ours, theirs = (_tensors_of(recipe, step) for recipe in (whole, cut))
    other = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    return [f"{how}, it has other bits after step {step}: in {len(other)} tensors, first {other[0]}"] if other else []


def _tensors_of(recipe: Recipe, step: int) -> dict[str, Tensor]:
    """Return weights, optimizer states and averages of all ranks, flattened for each parameter."""
    store = RunDirectory(recipe.run.dir).store
    name = checkpoint_name(step)
    content = read_state(store.root / name, store.state(name))
    assert content.ema is not None
    tensors: dict[str, Tensor] = {}
    for part, pieces in {"weights": content.masters, "averages": content.ema, **content.elementwise}.items():
        for parameter, shape in content.shapes.items():
            pieces.copy_into(parameter, tensors.setdefault(f"{part} of {parameter}", torch.empty(math.prod(shape))))
    for part, numbers in content.scalars.items():
        tensors |= {f"{part} of {parameter}": torch.tensor(number) for parameter, number in numbers.items()}
    return tensors


def train(recipe: Recipe, world: World, stop: int | None = None) -> Seen:
    """Train as `karat train` does, from the newest checkpoint in the run's directory on, to the end or to `stop`."""
    with silent_trainer(recipe, world, WatchedTask) as trainer:
        trainer.resume()
        trainer.run(stop)
    assert isinstance(trainer.task, WatchedTask)
    return trainer.task.seen


def recipe_of(
    mode: Mode, device: str, ranks: int, model: dict[str, Any], implementation: str, directory: Path
) -> Recipe:
    """Return a recipe without random numbers of the device, which a CPU and a GPU draw differently."""
    images = ranks * max(4, 16 // (2 * ranks) * 2)  # an even number on each rank, which mixing asks for
    content = json.loads((config_directory() / f"zero{mode.stage}.json").read_text())
    zero = content["zero_optimization"]
    zero |= {key: value for key, value in SMALL.items() if key in zero}
    deepspeed = directory.parent / f"zero{mode.stage}.json"
    deepspeed.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(deepspeed, json.dumps(content))  # all ranks write it
    return synthetic_recipe(
        directory,
        "bench gpu",
        run={"device": device},
        model={**model, "num_classes": CLASSES},
        attention={"kind": "karat", "implementation": implementation},
        data={"synthetic_samples": STEPS_AN_EPOCH * images},
        optim={"lr": 1e-3, "lr_batch": None},
        schedule={"warmup_steps": 2},
        train={
            "global_batch": images,
            "eval_batch": images,
            "precision": mode.precision,
            "tf32": False,
            "compile": mode.compile or False,
            "epochs": LAST // STEPS_AN_EPOCH,
            "eval_every_epochs": LAST,
            "ema_decay": 0.9,
        },
        deepspeed={"config": str(deepspeed)},
        checkpoint={"every_steps": STOP, "keep_last": LAST},
        log={"every_steps": LAST},
    )
