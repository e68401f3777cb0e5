"""Save and load one training state on all ranks together, and keep the pointers `best` and `latest` right.

All ranks agree on every outcome: a checkpoint that one rank could not write exists for none, and all ranks load the
same one. The pointers name what the state says, even after a kill, a full disk or damage.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import nn

from karat_scale.checkpoint.records import FORMAT, Sidecar, read_record, restore_generators, seed_generators
from karat_scale.checkpoint.restore import check_teacher, falsehood, read_state, restore, saved_layout, sidecar_name
from karat_scale.checkpoint.saver import Saver
from karat_scale.checkpoint.store import STATE, CheckpointStore, checkpoint_name
from karat_scale.checkpoint.tensor_storage import describe
from karat_scale.checkpoint.weights import fit_state
from karat_scale.engine.deepspeed_internals import shard_layout
from karat_scale.engine.distributed import World
from karat_scale.engine.ema import Ema
from karat_scale.engine.engine import Engine
from karat_scale.engine.reporting.progress import Reporter
from karat_scale.engine.run_state import RunState
from karat_scale.foundation.errors import RecipeError, RunDirectoryError
from karat_scale.models.transfer import teacher_of
from karat_scale.recipe import RunRecipe
from karat_scale.recipe.loading import dump_recipe, text_digest


def repair_latest(store: CheckpointStore, name: str, reporter: Reporter) -> None:
    """Let `latest` name the checkpoint that a run resumes from, if it names none; rank 0 calls it."""
    if store.pointed("latest") is not None:
        return
    try:
        store.point("latest", name)
    except OSError as error:
        reporter.warn(f"{store.root / 'latest'} cannot be repaired: {describe(error)}; remove it")
    else:
        reporter.warn(f"latest names {name} again: it named no checkpoint")


def repair_best(store: CheckpointStore, state: RunState, reporter: Reporter) -> dict[str, Any]:
    """Let `best` name the checkpoint that `state` says is the best; rank 0 calls it when a run resumes.

    Returns:
        The fields of `state` to set, for a best checkpoint that does not exist any more: those of the one that `best`
        names, or none at all, so that the next evaluation is the best.
    """
    if state.best_step is None:
        return {}
    name, pointed = checkpoint_name(state.best_step), store.pointed("best")
    if pointed == name or (pointed is not None and pointed > checkpoint_name(state.step)):
        return {}  # a later one is evaluated again when training comes to it
    try:
        if name in store.names() and store.damage(name) is None:
            store.point("best", name)
            reporter.warn(f"best names {name} again: the run ended before it did")
            return {}
        kept = _scores(store, pointed, type(state)) if pointed is not None else None
    except (OSError, ValueError) as error:
        reporter.warn(f"best cannot be repaired: {error}")
        return {}
    if kept is not None:
        reporter.warn(f"the best checkpoint, {name}, is gone; the best one is {pointed}")
        return kept
    reporter.warn(f"the best checkpoint, {name}, is gone; the next evaluation is the best")
    return state.without_best()


def _scores(store: CheckpointStore, name: str, state_type: type[RunState]) -> dict[str, Any] | None:
    """What a state must say for a checkpoint to be its best; None where that one is damaged or was not evaluated."""
    if store.damage(name) is not None:
        return None
    saved = state_type.from_json(store.state(name))
    if saved.evaluated_step != saved.step:
        return None
    scores = {f"best_{score}": getattr(saved, f"last_{score}") for score in saved.scores}
    return {**scores, "best_step": saved.step}


S = TypeVar("S", bound=RunState)


class Checkpoints(Generic[S]):
    """Collective save and load for one engine.

    Args:
        kind: the kind of run. A checkpoint of another kind is refused.
        state_type: the state of this kind of run.
    """

    def __init__(
        self,
        store: CheckpointStore,
        engine: Engine,
        ema: Ema | None,
        world: World,
        recipe: RunRecipe,
        reporter: Reporter,
        kind: str,
        state_type: type[S],
    ) -> None:
        self.store = store
        self._engine = engine
        self._ema = ema
        self._world = world
        self._recipe = recipe
        self._reporter = reporter
        self._kind = kind
        self._state_type = state_type
        self.saver = Saver(store, engine, ema, world, recipe.checkpoint, reporter)

    def save(self, state: S, is_best: bool = False, wait: bool = True) -> bool:
        """Write a checkpoint of `state`, as `Saver.save` says. False when any rank failed: nothing has changed then."""
        teacher = teacher_of(self._engine.module)
        content = {
            "format": FORMAT,
            "kind": self._kind,
            **state.to_json(),
            "world_size": self._world.size,
            "zero_stage": self._engine.stage,
            "has_ema": self._ema is not None,
            "teacher": teacher.digest if teacher else None,
            "recipe_sha256": text_digest(dump_recipe(self._recipe)),
        }
        return self.saver.save(state, content, is_best, wait)

    def load(self, state_of: str = "", fresh: Callable[[], nn.Module] | None = None, is_start: bool = True) -> S | None:
        """Load the newest intact checkpoint, or the one in directory `state_of`. None when there is none.

        Args:
            fresh: builds the engine's model anew. With it, and where either run has `schedule.image_sizes`, a state of
                another image size is interpolated. Else it is refused.
            is_start: false if the run only continues with another model.

        Raises:
            RunDirectoryError: no checkpoint is intact, or it is of another model, global batch, version or kind of run.
        """
        check = self._refuse_another_kind if state_of else self._refuse_another_run
        found = agree_on_checkpoint(self.store, state_of, self._world, self._reporter, check)
        if found is None:
            return None
        root, name = found
        saved = CheckpointStore(root).state(name)
        self._refuse_another_run(root / name, saved)
        try:
            check_teacher(self._engine.module, saved)
            grows = bool(saved.get("image_size") or getattr(self._recipe.schedule, "image_sizes", ()))
            is_fitting = fresh is not None and grows
            ranks = [self._world.rank] if not is_fitting and self._has_my_layout(root / name, saved) else None
            with self._world.together():  # none must wait in `restore` for one that refuses its files
                content = read_state(root / name, saved, ranks)
                if is_fitting and fresh is not None and content.shapes != self._shapes:
                    content = fit_state(content, fresh())
            restore(self._engine, self._ema, content, self._world)
        except (RunDirectoryError, RecipeError) as error:
            raise RunDirectoryError(f"checkpoint {root / name}: {error}") from error
        self._restore_generators(root / name, saved)
        state = self._state_type.from_json(saved)
        changes: dict[str, Any] = {}
        if root != self.store.root:
            changes = state.without_best()  # the other run's; this one has no such checkpoint
        else:
            self.saver.note_saved(state)
            if self._world.is_main:
                repair_latest(self.store, name, self._reporter)
            if self._recipe.checkpoint.keep_best:
                mine = repair_best(self.store, state, self._reporter) if self._world.is_main else {}
                changes = self._world.broadcast(mine)
        for field, value in changes.items():
            setattr(state, field, value)
        if is_start:
            state.restarts += 1
            state.seconds_to_first_step = None  # each start has its own
        return state

    @property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {**self._engine.shapes, **{name: tuple(x.shape) for name, x in self._engine.frozen.items()}}

    def _has_my_layout(self, checkpoint: Path, saved: dict[str, Any]) -> bool:
        """Whether each rank finds all it needs in the files of its own number."""
        stage = saved.get("zero_stage", 0)
        differs = saved["world_size"] != self._world.size or stage != self._engine.stage
        with self._world.together():
            if not differs and stage > 0:
                sidecar = read_record(checkpoint / sidecar_name(self._world.rank), Sidecar)
                differs = saved_layout(sidecar) != shard_layout(self._engine.deepspeed)
        return not self._world.any(differs)

    def _refuse_another_kind(self, path: Path, saved: dict[str, Any]) -> None:
        kind = saved.get("kind", "classification")
        if kind != self._kind:
            raise RunDirectoryError(
                f"checkpoint {path} is of a run that trains {kind}, this one trains {self._kind}; to start from its "
                f"weights, use init_from={path}"
            )
        try:
            self._state_type.from_json(saved)
        except ValueError as error:
            raise RunDirectoryError(f"{STATE}: {error}") from None

    def _refuse_another_run(self, path: Path, saved: dict[str, Any]) -> None:
        self._refuse_another_kind(path, saved)
        written = saved["samples"] // max(saved["step"], 1)
        batch = self._recipe.train.global_batch
        if saved["samples"] != saved["step"] * batch:  # the cursor counts steps
            raise RunDirectoryError(
                f"checkpoint {path.name} was written with train.global_batch = {written}, this run has "
                f"{batch}; use train.global_batch={written}"
            )

    def _restore_generators(self, checkpoint: Path, saved: dict[str, Any]) -> None:
        """A rank resumes with the generators of its number. If there are none, they start from the step."""
        path = checkpoint / sidecar_name(self._world.rank)
        if path.is_file():
            restore_generators(read_record(path, Sidecar), self._world.device)
        else:
            seed_generators(self._recipe.run.seed, saved["step"], self._world.rank)


Check = Callable[[Path, dict[str, Any]], object]
"""Looks at the state in a checkpoint's directory; raises RunDirectoryError where it will not do."""


def agree_on_checkpoint(
    store: CheckpointStore, state_of: str, world: World, reporter: Reporter, check: Check = lambda path, state: None
) -> tuple[Path, str] | None:
    """The newest intact checkpoint of a run, or the one in `state_of`: its store's root and its name. Collective.

    Args:
        state_of: a run's directory or a checkpoint in one, for a run that branches from it; empty for `store`'s own.

    Returns:
        None where there is none yet.

    Raises:
        RunDirectoryError: on all ranks alike, where no checkpoint is intact.
    """
    with world.together():
        found = _choose(store, state_of, reporter, check) if world.is_main else None
    return world.broadcast(found)


def _choose(store: CheckpointStore, state_of: str, reporter: Reporter, check: Check) -> tuple[Path, str] | None:
    if not state_of:
        return _newest_intact(store, reporter, check)
    path = Path(state_of).expanduser()
    if not path.is_dir():
        raise RunDirectoryError(f"resume.from = {state_of} is no directory; name a checkpoint's or a run's")
    if (path / "checkpoints").is_dir():
        found = _newest_intact(CheckpointStore(path / "checkpoints", falsehood), reporter, check)
        if found is None:
            raise RunDirectoryError(f"resume.from = {state_of}: this run has no checkpoints yet")
        return found
    damage = _damage(CheckpointStore(path.parent, falsehood), path.name, reporter, check)
    if damage:
        raise RunDirectoryError(f"resume.from = {state_of}: {damage}; name a complete checkpoint or a run's directory")
    return path.parent, path.name


def _newest_intact(store: CheckpointStore, reporter: Reporter, check: Check) -> tuple[Path, str] | None:
    names = store.names()
    latest = store.pointed("latest")
    damage = None
    for name in sorted(names, key=lambda n: n != latest):
        damage = _damage(store, name, reporter, check)
        if damage is None:
            return store.root, name
        reporter.warn(f"checkpoint {name} is damaged: {damage}; trying the one before")
    if names:
        raise RunDirectoryError(
            f"{store.root}: none of {len(names)} checkpoints is intact ({damage}); "
            "remove the directory to start from the beginning, or restore one from a copy"
        )
    return None


def _damage(store: CheckpointStore, name: str, reporter: Reporter, check: Check) -> str | None:
    damage = store.damage(name, reporter.display.verify)
    if damage is None:
        try:
            check(store.root / name, store.state(name))
        except RunDirectoryError as error:
            return str(error)
    return damage
