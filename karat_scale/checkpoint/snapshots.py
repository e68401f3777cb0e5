"""Snapshots of the whole fp32 weights through training, for the analyses; no retention removes them.

snapshots/
  step-00000000.safetensors   the initial weights
  step-00012500.safetensors   those after the first of `checkpoint.snapshots` equal parts of training, and so on
"""

from collections.abc import Collection, Iterator
from pathlib import Path

import torch

from karat_scale.checkpoint.store import CheckpointStore, checkpoint_name
from karat_scale.checkpoint.tensor_storage import describe, save_safetensors
from karat_scale.checkpoint.weights import describe_weights
from karat_scale.engine.deepspeed_internals import master_weights, shard_layout
from karat_scale.engine.distributed import World
from karat_scale.engine.engine import Engine
from karat_scale.engine.reporting.progress import Reporter
from karat_scale.engine.shards import Pieces
from karat_scale.models.transfer import teacher_of
from karat_scale.recipe import Recipe

_SUFFIX = ".safetensors"


def snapshot_steps(total_steps: int, parts: int) -> frozenset[int]:
    """Step 0 and the last step of each of `parts` equal parts of training; none for 0 parts."""
    return frozenset(round(total_steps * part / parts) for part in range(parts + 1)) if parts else frozenset()


class Snapshots:
    """Takes snapshots of one run, after each step of `steps`."""

    def __init__(
        self,
        directory: Path,
        store: CheckpointStore,
        steps: Collection[int],
        engine: Engine,
        world: World,
        recipe: Recipe,
        reporter: Reporter,
    ) -> None:
        self._directory = directory
        self._store = store
        self._steps = steps
        self._engine = engine
        self._world = world
        self._recipe = recipe
        self._reporter = reporter

    def due(self, step: int) -> bool:
        """Whether there is a snapshot to take after `step` finished steps."""
        return step in self._steps

    def write(self, step: int) -> None:
        """Write the weights after `step` steps unless they are there already; a failure is a warning. Collective.

        The first ones replace those of an earlier start that has left no checkpoint: it may have had another recipe.
        Rank 0 holds them whole on the host, the other ranks one parameter at a time.
        """
        self._reporter.beat("snapshot")
        path = self._directory / f"{checkpoint_name(step)}{_SUFFIX}"
        is_kept = path.is_file() and (step > 0 or bool(self._store.names()))
        if self._world.broadcast(is_kept):
            return
        whole = {}
        for name, parameter in whole_masters(self._engine, self._world):
            if self._world.is_main:
                whole[name] = parameter.cpu()
        if not self._world.is_main:
            return
        try:
            self._directory.mkdir(exist_ok=True)
            save_safetensors(self._state(whole), path, self._metadata(path.stem, step))
        except OSError as error:
            self._reporter.warn(f"snapshot {path.name} not saved: {describe(error)}")

    def _metadata(self, name: str, step: int) -> dict[str, str]:
        teacher = teacher_of(self._engine.module)
        saved = {"step": step, "teacher": teacher.digest if teacher else None}
        return describe_weights(self._recipe, saved, name, "raw")

    def _state(self, whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """As the plain model's `state_dict`: a module that blocks share is there once for each."""
        names = {parameter: name for name, parameter in self._engine.module.named_parameters()}
        fp32 = {**whole, **self._engine.frozen}
        state, taken = {}, set()
        for key, value in self._engine.module.state_dict(keep_vars=True).items():
            name = names.get(value)
            if name is None:
                state[key] = value.detach().cpu().contiguous()
            else:
                state[key] = fp32[name].clone() if name in taken else fp32[name]
                taken.add(name)
        return state


def whole_masters(engine: Engine, world: World) -> Iterator[tuple[str, torch.Tensor]]:
    """Each trainable parameter's fp32 master, one at a time; whole on rank 0 alone. Collective from stage 1 on.

    No rank may leave off before the end.
    """
    mine = Pieces()
    for fragments, master in zip(shard_layout(engine.deepspeed), master_weights(engine.deepspeed), strict=True):
        mine.add(fragments, master)
    for name, shape in engine.shapes.items():
        flat = torch.zeros(torch.Size(shape).numel(), device=world.device)
        mine.copy_into(name, flat)
        if engine.stage > 0:
            world.add_up_on_main(flat)
        yield name, flat.view(shape)
