"""The interface of a task to the run engine.

A task provides data, model, losses and scores. Everything else is in this package, once: directory, seeds, engine,
loop, checkpoints, signals and outcome.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor, nn

from karat_scale.data.loading.device_feed import DeviceFeed
from karat_scale.data.plan import BatchSlice, TrainPlan
from karat_scale.engine.distributed import World
from karat_scale.engine.engine import Engine
from karat_scale.engine.optimizers import Groups
from karat_scale.engine.reporting.progress import Reporter
from karat_scale.engine.run_state import RunState
from karat_scale.recipe import AttentionConfig, RunRecipe
from karat_scale.training.agreement import StopSignals
from karat_scale.training.run_directory import OpenRun, RunDirectory
from karat_scale.training.weights_file import run_behind

Waiting = Callable[[], AbstractContextManager[None]]
OnBatch = Callable[[int, int], None]
"""A function that is called with how many batches of an evaluation are done, and of how many."""


class BeyondReach(NamedTuple):
    """The share of a block's scores A that lie beyond +-`reach`."""

    share: float
    reach: float


@dataclass(frozen=True)
class Scores:
    """The result of an evaluation; as text, it is one line for a person."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data for an event."""
        return asdict(self)


class Schedule(Protocol):
    """The learning rate as a function of the step."""

    @property
    def peak_lr(self) -> float:
        """The highest rate."""

    def lr(self, step: int) -> float:
        """Return the rate for the update after `step` finished updates."""


class AfterStep(Protocol):
    """Something that is written after certain steps, besides the checkpoints."""

    def due(self, step: int) -> bool:
        """Return whether there is something to write after `step` finished steps; the same on every rank."""

    def write(self, step: int) -> None:
        """Write it. Collective."""


class Task(ABC):
    """One rank's task in one run. Making it opens the data.

    Raises:
        UserError: the recipe does not fit the data.
    """

    kind: ClassVar[str]
    """The kind of run; checkpoints name it."""
    reader: ClassVar[str] = "karat analyze"
    """The command that looks at a finished run."""
    replays: ClassVar[bool] = True
    """Whether `karat replay` can take a step again."""
    recipe_type: ClassVar[type[RunRecipe]]
    state_type: ClassVar[type[RunState]]
    recipe: RunRecipe
    classes: tuple[str, ...]
    """Class names in the order of the labels."""
    stop_step: int | None = None
    """The step at which another task follows this one, see `at`; None for the end of training."""

    def __init__(self, recipe: Any, world: World, reporter: Reporter) -> None:
        self.recipe, self.world, self.reporter = recipe, world, reporter

    @property
    @abstractmethod
    def num_train(self) -> int:
        """Number of training images."""

    @property
    @abstractmethod
    def num_val(self) -> int:
        """Number of validation images."""

    @property
    @abstractmethod
    def train_identity(self) -> str:
        """The identity of the training images in order, `kind of files:digest`, equal for copies; "" if unknown."""

    @staticmethod
    @abstractmethod
    def less_memory(recipe: Any, world_size: int) -> str:
        """Return what to change in the recipe if memory runs out."""

    @abstractmethod
    def plan(self) -> TrainPlan:
        """Return the order of the data on this rank."""

    @abstractmethod
    def schedule(self, steps_per_epoch: int) -> Schedule:
        """Return the recipe's schedule in steps."""

    def prepare(self, directory: RunDirectory) -> None:  # noqa: B027
        """Put into the run's directory what its model needs. Collective; it may use torch's random generator."""

    @abstractmethod
    def build_backbone(self, directory: RunDirectory) -> nn.Module:
        """Return the transformer, initialised from torch's random generator."""

    @abstractmethod
    def take_weights(self, backbone: nn.Module, weights: Mapping[str, Tensor], attention: AttentionConfig) -> str:
        """Copy the weights of `init_from` into the transformer; returns what was not simply copied.

        `attention` is the attention that they were trained with: softmax, unless they name another one.
        """

    def convert(self, backbone: nn.Module, directory: RunDirectory, signals: StopSignals) -> None:  # noqa: B027
        """Let a transformer that has these weights learn what it must know before the first step. Collective."""

    def build_model(self, backbone: nn.Module) -> nn.Module:
        """Return what is trained: the transformer, or a model around it."""
        return backbone

    def build_fresh(self, directory: RunDirectory) -> nn.Module:
        """Return a whole model like the one that is trained."""
        return self.build_model(self.build_backbone(directory))

    def trained_model(self, run: OpenRun[Any]) -> nn.Module:
        """Return the model with the weights of a run of this task's recipe."""
        model = self.build_fresh(run.directory)
        run.load(model)
        return model

    def groups(self, model: nn.Module) -> Groups | None:
        """Return the optimizer's groups of parameters; None for `parameter_groups`."""
        return None

    def after_step(self, engine: Engine, directory: RunDirectory, total_steps: int) -> list[AfterStep]:
        """Return what this task writes after steps."""
        return []

    @abstractmethod
    def train_batches(self, slices: Iterable[BatchSlice], waiting: Waiting) -> DeviceFeed[Any]:
        """Return this rank's micro batches of `slices`, in their order; inside `waiting()` it waits for the next."""

    @property
    def counts(self) -> tuple[Any, ...]:
        """The counts that `losses` has made of the data since the last `fold`. They can be set back."""
        return ()

    @counts.setter  # noqa: B027
    def counts(self, counts: tuple[Any, ...]) -> None:
        """Set the counts back."""

    @abstractmethod
    def losses(self, forward: Callable[..., Any], batch: Any) -> Mapping[str, Tensor]:
        """Return the mean loss of a micro batch as `loss`, and parts of it, for the reports, by other names.

        Args:
            forward: the engine's forward pass.
            batch: a batch from `train_batches`.
        """

    @abstractmethod
    def evaluate(self, forward: Callable[..., Any], on_batch: OnBatch) -> Scores:
        """Evaluate the validation split; the same scores on every rank. Collective.

        `on_batch` is called after each batch, equally often on every rank; it may raise to stop.
        """

    def look_inside(self, engine: Engine) -> dict[str, Any]:
        """Return what the event of an evaluation in training says of the model, besides its scores. Collective."""
        return {}

    def look_at_scores(self, engine: Engine) -> dict[int, BeyondReach]:
        """Return how many of the last scores lie beyond what the functions tell apart, by block. Collective."""
        return {}

    def fold(self, state: Any) -> None:  # noqa: B027
        """Add what was counted since the last call to the state, over all ranks. Collective."""

    def figures(self, state: Any, images_per_second: float | None) -> dict[str, Any]:
        """Return what this task adds to a report of training."""
        return {}

    def begin(self) -> RunState:
        """Return the state of a run that starts from the beginning."""
        return self.state_type(begun_with=run_behind(self.recipe.init_from))

    def at(self, step: int) -> "Task":
        """Return the task that trains from `step` on; if it is not this one, this one is closed. Collective."""
        return self

    def check_resumed(self, state: Any) -> None:  # noqa: B027
        """Check that this is the task that a checkpoint's state is of. Raises UserError."""

    def facts(self, state: Any) -> dict[str, Any]:
        """Return what this task adds to `summary.json`: the runs that its weights came from, by key, and more."""
        return {"lineage": {"init_from": state.begun_with} if state.begun_with else {}}

    def close(self) -> None:  # noqa: B027
        """Stop the data workers."""
