"""What every run does before it builds its parts: it claims its directory and opens its reporter."""

from collections.abc import Sequence

import torch

from karat_scale.cluster.heartbeat import Heartbeat
from karat_scale.engine.distributed import World
from karat_scale.errors import UserError
from karat_scale.recipe import RunRecipe
from karat_scale.reporting.metrics import MetricsLog, open_trackers
from karat_scale.reporting.progress import Reporter, choose_display
from karat_scale.run.run_directory import RunDirectory


def open_directory(recipe: RunRecipe, world: World) -> tuple[RunDirectory, str]:
    """Rank 0 claims the run directory; all ranks hear of its refusal, or of what the recipe changes on purpose."""
    directory = RunDirectory(recipe.run.dir)
    answer: UserError | str = ""
    if world.is_main:
        try:
            answer = directory.open(recipe)
        except UserError as error:
            answer = error
    answer = world.broadcast(answer)
    if isinstance(answer, UserError):
        raise answer
    return directory, answer


def open_reporter(recipe: RunRecipe, world: World, directory: RunDirectory, trackers: Sequence[str]) -> Reporter:
    """The reporter of a run, with metrics on rank 0 and a heartbeat on each."""
    log = None
    if world.is_main:
        log = MetricsLog(directory.metrics_file, open_trackers(directory.path, recipe, trackers))
    heartbeat = Heartbeat(directory.path, world.rank, device_name(world)).start()
    return Reporter(choose_display(world.is_main, recipe.run.name), log, world.rank, heartbeat)


def branch_point(recipe: RunRecipe, directory: RunDirectory) -> str:
    """`resume.from` counts at a run's first start only: after that the run has checkpoints of its own."""
    return "" if directory.store.names() else recipe.resume.from_


def device_name(world: World) -> str:
    """What this rank trains on, for a person."""
    if world.device.type == "cuda":
        return torch.cuda.get_device_name(world.device)
    return f"CPU, {torch.get_num_threads()} threads"
