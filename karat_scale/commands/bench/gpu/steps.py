"""Training steps of each kind of attention through our own loop, and of each ZeRO stage against PyTorch's DDP.

Softmax is compared with KArAt, eager, compiled and as graphs. For the stages, ranks of one machine train the same model
from the same weights on the same images, so their first losses must agree, too. Contenders take turns in the same
processes, and ratios are medians over rounds.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from karat_scale.commands.bench.gpu.losses import ALLOWED
from karat_scale.commands.bench.gpu.worker import Task, is_fatal, one_line
from karat_scale.commands.measure.interleaved import interleaved_seconds, timed
from karat_scale.commands.measure.step import MANY, OurLoop, bare_step, synthetic_recipe
from karat_scale.engine import distributed
from karat_scale.engine.distributed import World, wait_for
from karat_scale.engine.engine import Engine
from karat_scale.foundation.errors import is_out_of_memory
from karat_scale.models import create_model
from karat_scale.recipe import Recipe

# The values of train.compile, by their names here.
MODES = {"eager": False, "compiled": "default", "graphs": "reduce-overhead"}
SOFTMAX = "softmax"
GRIDS = {"KArAt G1": 1, "KArAt G3": 3}
ROUNDS, SECONDS_A_ROUND, MOST_STEPS = 5, 0.3, 20
TOY_MODEL = {"image_size": 32, "depth": 1, "embed_dim": 32, "num_heads": 2, "num_classes": 10}


@dataclass(frozen=True)
class Group:
    """Kinds of attention of one model in one mode; they take turns."""

    mode: str
    model: str
    attentions: tuple[str, ...] = (SOFTMAX, *GRIDS)

    def __str__(self) -> str:
        return f"ViT-{self.model.capitalize()}, {self.mode}"


BATCHES, TOY_BATCH = {"small": 256, "tiny": 256, "base": 128}, 4
# First one group for each mode, then the other comparisons: compiling takes long.
GROUPS = (
    Group("eager", "small"),
    *(Group(mode, "small", ("KArAt G3",)) for mode in ("graphs", "compiled")),
    *(Group("eager", model) for model in ("tiny", "base")),
    *(Group(mode, model) for model in ("small", "base", "tiny") for mode in ("graphs", "compiled")),
)
# Expected seconds of an attention in a mode, until one was measured.
GUESSES = {"eager": 7.0, "compiled": 50.0, "graphs": 50.0}


def measure_attention(task: Task) -> None:
    """Report rows for each group that the time allows."""
    world = distributed.start(task.device)
    for group in GROUPS[:3] if task.toy else GROUPS:
        batch = TOY_BATCH if task.toy else BATCHES[group.model]
        run = partial(task.halving, str(group), batch, partial(compare_attention, task, world, group), least=2)
        task.part(str(group), group.mode, GUESSES[group.mode], run, len(group.attentions))
    distributed.stop()


def compare_attention(task: Task, world: World, group: Group, batch: int) -> None:
    """Report a row for each attention. Raises errors that are fatal or say that memory ran out."""
    loops: dict[str, OurLoop] = {}
    try:
        for name in group.attentions:
            try:
                loops[name] = OurLoop(_recipe(task, group, name, batch), world, not task.toy)
            except Exception as error:
                if is_out_of_memory(error) or is_fatal(error):
                    raise
                task.channel.failed(f"{group}, {name}", one_line(error))
        steps = 1
        if loops and not task.toy:
            begun = time.perf_counter()
            next(iter(loops.values())).run(1)
            steps = max(1, min(MOST_STEPS, round(SECONDS_A_ROUND / (time.perf_counter() - begun))))
        runs = {name: partial(loop.run, steps) for name, loop in loops.items()}
        seconds = interleaved_seconds(runs, 1 if task.toy else ROUNDS)
        for name, loop in loops.items():
            rate = steps * batch / seconds.median(name)
            task.channel.row(
                model="toy" if task.toy else f"ViT-{group.model.capitalize()}",
                mode=group.mode,
                attention=name,
                batch=batch,
                images_per_second=round(rate, 1),
                ratio_to_softmax=round(1 / seconds.ratio(name, SOFTMAX), 3) if SOFTMAX in seconds else None,
                **loop.task.efficiency.figures(rate),
                **loop.work(),
            )
    finally:
        loops.clear()
        torch.compiler.reset()


def _recipe(task: Task, group: Group, attention: str, batch: int) -> Recipe:
    directory = task.scratch / f"{group.model}-{group.mode}-{batch}-{attention}"
    karat = {"kind": "karat", "grid": GRIDS.get(attention), "implementation": task.implementation}
    return synthetic_recipe(
        directory,
        "bench gpu",
        run={"device": task.device},
        model={"name": f"vit_{group.model}_patch16_224", **(TOY_MODEL if task.toy else {})},
        attention=karat if attention in GRIDS else {"kind": SOFTMAX},
        data={"synthetic_samples": batch},
        train={
            "global_batch": batch,
            "micro_batch": batch,
            "precision": "bf16",
            "compile": MODES[group.mode],
            "epochs": MANY,
            "eval_every_epochs": MANY,
        },
    )


DDP = "DistributedDataParallel"
STAGES = ("zero0", "zero1", "zero2", "zero3")
BATCH = 128
CASES, TOY_CASE = (("small", "softmax"), ("small", "karat"), ("base", "softmax")), ("tiny", "karat")
GUESS = 40.0
# The number of losses that must equal DDP's. With more steps on one batch, rounding errors grow large: on two ranks of
# a CPU they take up to 1/9 of what is allowed within 3 steps, and 6/10 within 20. `rank_losses` compares 20 steps.
COMPARED = 3


@dataclass(frozen=True)
class StagesCase:
    """The case to measure.

    `batch` is that of one rank, `attention` a recipe's `attention.kind`, and `precision` its `train.precision`. `depth`
    is the model's own by default.
    """

    model: str = "vit_tiny_patch16_224"
    image_size: int = 64
    batch: int = 16
    attention: str = "softmax"
    ranks: int = 2
    steps: int = 3
    rounds: int = 9
    precision: str = "fp32"
    depth: int | None = None

    def recipe(self, stage: str) -> Recipe:
        """Return the recipe at a ZeRO stage."""
        return synthetic_recipe(
            "unused",
            "ZeRO stages",
            model={"name": self.model, "image_size": self.image_size, "depth": self.depth},
            attention={"kind": self.attention},
            train={"global_batch": self.batch * self.ranks, "epochs": 100, "precision": self.precision},
            deepspeed={"config": stage},
        )


def measure_stages(task: Task) -> None:
    """Report rows for each case that the time allows, on which all ranks agree.

    Raises:
        RuntimeError, MemoryError: a rank failed. If memory ran out, the section asks to run again with half the batch:
            the other ranks wait within a collective, and end with this process.
    """
    world = distributed.start(task.device)
    batch = 2 if task.toy else task.largest_batch or BATCH
    try:
        for model, attention in (TOY_CASE,) if task.toy else CASES:
            what = f"{'toy' if task.toy else f'ViT-{model.capitalize()}'}, {attention}, bf16, {world.size} x {batch}"
            case = StagesCase(f"vit_{model}_patch16_224", 224, batch, attention, world.size, 3, 5, "bf16")
            if task.toy:
                case = replace(case, image_size=32, depth=1, steps=1, rounds=1)
            task.part(what, "case", GUESS, partial(_tell, task, world, what, case), world=world)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error) and batch > 1:
            task.channel.send("again", batch // 2)
        raise
    distributed.stop()


def _tell(task: Task, world: World, what: str, case: StagesCase) -> None:
    for row in compare_stages(case, world):
        if world.is_main:
            rate = 1e3 * world.size * case.batch / row["milliseconds_a_step"]
            task.channel.row(case=what, **row, images_per_second=round(rate, 1))


def compare_stages(case: StagesCase, world: World) -> list[dict[str, Any]]:
    """A row of figures for DDP and for each stage, on every rank."""
    images = torch.randn(
        case.batch, 3, case.image_size, case.image_size, generator=torch.Generator().manual_seed(world.rank)
    ).to(world.device)
    labels = torch.arange(case.batch, device=world.device)
    losses: dict[str, list[Tensor]] = {name: [] for name in (DDP, *STAGES)}

    def repeated(name: str) -> Callable[[], None]:
        step = bare_step(case.recipe("zero0"), world, True) if name == DDP else _engine(case, name, world)
        # Building a stage 3 engine replaces `linear` for the whole process, so each contender keeps its own.
        linear = nn.functional.linear

        def run() -> None:
            nn.functional.linear = linear
            dist.barrier()
            for _ in range(case.steps):
                losses[name].append(step(images, labels))
            wait_for(world.device)

        return run

    contenders = {name: repeated(name) for name in losses}
    seconds = interleaved_seconds(contenders, case.rounds)
    # This rank's processor time over all threads: a step without the waits for other ranks.
    processor = {name: timed(run, time.process_time) for name, run in contenders.items()}
    means = {name: world.sum(torch.stack(of[:COMPARED])) / world.size for name, of in losses.items()}
    differences = {name: float((of / means[DDP] - 1).abs().max()) for name, of in means.items()}
    allowed = ALLOWED[case.precision]
    return [
        {
            "contender": name,
            "milliseconds_a_step": round(1e3 * seconds.median(name) / case.steps, 2),
            "processor_milliseconds_a_step": round(1e3 * processor[name] / case.steps, 2),
            "ratio_to_ddp": round(seconds.ratio(name, DDP), 3),
            "difference": differences[name],
            "allowed": allowed,
            "right": differences[name] <= allowed,
        }
        for name in contenders
    ]


def _engine(case: StagesCase, stage: str, world: World) -> Callable[[Tensor, Tensor], Tensor]:
    recipe = case.recipe(stage)
    torch.manual_seed(recipe.run.seed)
    engine = Engine(create_model(recipe.model, recipe.attention), recipe, world, case.batch)

    def step(images: Tensor, labels: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(engine.forward(images), labels)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return step
