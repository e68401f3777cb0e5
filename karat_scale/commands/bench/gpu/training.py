"""Training steps through our own loop, softmax beside KArAt, eager, compiled and as graphs."""

import time
from dataclasses import dataclass
from functools import partial

import torch

from karat_scale.commands.bench.gpu.worker import Task, is_fatal, one_line
from karat_scale.commands.measure.interleaved import interleaved_seconds
from karat_scale.commands.measure.step import MANY, OurLoop, synthetic_recipe
from karat_scale.engine import distributed
from karat_scale.engine.distributed import World
from karat_scale.foundation.errors import is_out_of_memory
from karat_scale.recipe import Recipe

# The values of train.compile, by what they are called here.
MODES = {"eager": False, "compiled": "default", "graphs": "reduce-overhead"}
SOFTMAX = "softmax"
GRIDS = {"KArAt G1": 1, "KArAt G3": 3}
WARM_UP, ROUNDS, SECONDS_A_ROUND, MOST_STEPS = 3, 5, 0.3, 20
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
# First one row for each mode, then what compares more: compiling takes long.
GROUPS = (
    Group("eager", "small"),
    *(Group(mode, "small", ("KArAt G3",)) for mode in ("graphs", "compiled")),
    *(Group("eager", model) for model in ("tiny", "base")),
    *(Group(mode, model) for model in ("small", "base", "tiny") for mode in ("graphs", "compiled")),
)
# Seconds that an attention takes in a mode at first, before one was measured.
GUESSES = {"eager": 7.0, "compiled": 50.0, "graphs": 50.0}


def measure(task: Task) -> None:
    """Rows for each group that the time allows."""
    world = distributed.start(task.device)
    for group in GROUPS[:3] if task.toy else GROUPS:
        batch = TOY_BATCH if task.toy else BATCHES[group.model]
        run = partial(task.halving, str(group), batch, partial(compare, task, world, group), least=2)
        task.part(str(group), group.mode, GUESSES[group.mode], run, len(group.attentions))
    distributed.stop()


def compare(task: Task, world: World, group: Group, batch: int) -> None:
    """Tell a row for each attention. Raises what says that memory ran out."""
    loops: dict[str, OurLoop] = {}
    try:
        for name in group.attentions:
            try:
                recipe = _recipe(task, group, name, batch)
                loops[name] = OurLoop(recipe, world, not task.toy, 1 if task.toy else WARM_UP)
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
