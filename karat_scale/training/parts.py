"""What one rank's training loop is made of."""

from dataclasses import dataclass
from typing import Any

from karat_scale.checkpoint.checkpoints import Checkpoints
from karat_scale.data.plan import TrainPlan
from karat_scale.engine.distributed import World
from karat_scale.engine.ema import Ema
from karat_scale.engine.engine import Engine
from karat_scale.engine.reporting.profiler import StepProfiler
from karat_scale.engine.reporting.progress import Reporter
from karat_scale.recipe import RunRecipe
from karat_scale.training.incidents import Incidents
from karat_scale.training.signals import StopSignals
from karat_scale.training.task import AfterStep, Schedule, Task


@dataclass
class Parts:
    """What one rank's loop is made of. `build_parts` in `run.py` builds it."""

    recipe: RunRecipe
    world: World
    task: Task
    plan: TrainPlan
    total_steps: int
    engine: Engine
    ema: Ema | None
    schedule: Schedule
    checkpoints: Checkpoints[Any]
    after_step: list[AfterStep]
    profiler: StepProfiler
    reporter: Reporter
    signals: StopSignals
    incidents: Incidents
