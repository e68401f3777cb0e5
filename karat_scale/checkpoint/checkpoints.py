"""Save and load one training state on all ranks together.

All ranks agree on every outcome: a checkpoint that one rank could not write exists for none, and all ranks load the
same one.

A save runs during training, which pauses only while each rank copies its state to host memory. A process of each rank
writes the copy, and a thread waits for it. At the first agreement at which all are done, rank 0's thread gives the
checkpoint its manifest and its name. At the next agreement all ranks learn of it.

With `checkpoint.local`, saves in between go to a disk of each node, in the same way: there the first rank of each node
does what rank 0 does for the run's directory.
"""

import math
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import nn

from karat_scale.checkpoint import records, restore
from karat_scale.checkpoint.store import STATE, CheckpointStore, NearStore, checkpoint_name, holding
from karat_scale.checkpoint.tensor_storage import DurableStorage, describe, planned_bytes
from karat_scale.checkpoint.weights import fit_state
from karat_scale.engine.deepspeed_internals import shard_layout, use_storage
from karat_scale.engine.distributed import World, wait_for
from karat_scale.engine.engine import Engine
from karat_scale.engine.optimizers import Ema
from karat_scale.engine.reporting.progress import Reporter
from karat_scale.engine.run_state import RunState
from karat_scale.foundation.errors import RecipeError, RunDirectoryError
from karat_scale.foundation.files import Fingerprint
from karat_scale.foundation.machine import Background
from karat_scale.models.transfer import teacher_of
from karat_scale.recipe import RunRecipe
from karat_scale.recipe.loading import dump_recipe, text_digest

_BEAT_SECONDS = 1.0
S = TypeVar("S", bound=RunState)


@dataclass
class _Written:
    """The result of writing or committing: what is wrong, and the files by name."""

    problem: str | None = None
    files: dict[str, Fingerprint] | None = None
    warning: str | None = None


@dataclass
class _Save:
    """One save under way; all ranks have it at the same time."""

    state: RunState
    store: CheckpointStore
    content: dict[str, Any]
    is_best: bool
    seconds: float
    """The time that this rank has worked on it. A save that is ready may have to wait for the next agreement."""
    task: Background[_Written] | None
    stall: float | None
    """The seconds that training paused for it; None means all of them."""
    is_committing: bool = False


@dataclass(eq=False)
class Checkpoints(Generic[S]):
    """Collective save and load for one engine; at most one save is under way.

    Attributes:
        kind: the kind of run. A checkpoint of another kind is refused.
        state_type: the state of this kind of run.
        near: the store in which this node also keeps the newest checkpoints.
        cost: the seconds that training paused for the last save in `store`, and those until it was complete.
        problem: why the last save in the run's directory failed, if it did; the same on all ranks.
    """

    store: CheckpointStore
    engine: Engine
    ema: Ema | None
    world: World
    recipe: RunRecipe
    reporter: Reporter
    kind: str
    state_type: type[S]
    near: NearStore | None = None
    problem: str = ""
    cost: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        self._storage = DurableStorage(self.reporter.warn)
        use_storage(self.engine.deepspeed, self._storage)
        self._under_way: _Save | None = None
        self._saved: tuple[int, int] | None = None
        self._told_of = -1
        self._lost_best: int | None = None

    @property
    def is_under_way(self) -> bool:
        """Return whether a save has begun whose outcome the ranks do not know yet; the same on all."""
        return self._under_way is not None

    @property
    def is_busy(self) -> bool:
        """Return whether this rank still works on the save under way."""
        task = self._under_way.task if self._under_way else None
        return task is not None and not task.wait(0)

    @property
    def has_only_failed(self) -> bool:
        """Return whether a save has failed and the run has no checkpoint: its work may be lost. The same on all."""
        return bool(self.problem) and self._saved is None and self._under_way is None

    def forget_lost_best(self, state: RunState) -> None:
        """Set `state` back to the best existing checkpoint if that of its best step was not saved. Collective."""
        if self._lost_best is None or self._lost_best != state.best_step or self._saved == _identity(state):
            return
        self._lost_best = None
        for field, value in self.world.on_main(lambda: restore.repair_best(self.store, state, self.reporter)).items():
            setattr(state, field, value)

    def check_room(self) -> None:
        """Raise RunDirectoryError on all ranks, if a run without a checkpoint has no room for one. Collective."""
        with self.world.together():
            if self.world.is_main and self._saved is None and (lack := self._lack(self.store)):
                raise RunDirectoryError(
                    f"run.dir = {self.store.root.parent}: there is no room for a checkpoint: {lack}; make room, or "
                    "choose another run.dir"
                )

    def holds(self, state: RunState) -> bool:
        """Return whether `state` is saved, or being saved; the same on all ranks."""
        save = self._under_way
        under_way = save is not None and save.store is self.store and _identity(save.state) == _identity(state)
        return under_way or self._saved == _identity(state)

    def saves_near(self, state: RunState) -> bool:
        """Return whether `save_near` would save `state`; the same on all ranks."""
        return self.near is not None and self.near.works and self._under_way is None and not self.holds(state)

    def save_near(self, state: S) -> bool:
        """Save `state` on a disk of each node, or begin to; return whether that worked. Collective."""
        assert self.near is not None
        wait = not self.recipe.checkpoint.asynchronous
        return self._launch(state, self.near, is_best=False, wait=wait, begun=time.monotonic())

    def remove_near(self) -> None:
        """Remove what each node keeps. All of it is in the run's directory by now."""
        if self.near is not None and self._owns(self.near):
            self.near.remove()

    def save(self, state: S, is_best: bool = False, wait: bool = True) -> bool:
        """Save `state` unless that is done; collective. It first waits for a save of another state that is under way.

        Args:
            is_best: let `best` name the checkpoint, too.
            wait: wait until it is complete; else return after the copy.

        Returns: whether it is saved or, without `wait`, begun. If not, nothing has changed.
        """
        begun = time.monotonic()
        wait = wait or not self.recipe.checkpoint.asynchronous
        if self.holds(state) and not wait:
            return True
        self.finish()
        if self._saved == _identity(state):
            return True
        self.problem = ""
        return self._launch(state, self.store, is_best, wait, begun)

    def _launch(self, state: S, store: CheckpointStore, is_best: bool, wait: bool, begun: float) -> bool:
        problem = _first(self.world.gather(self._begin(store, state.step)))
        if problem is None:
            directory = store.unfinished(state.step)
            problem = _first(self.world.gather(self._collect(directory, copies=not wait)))
        if problem is not None:
            self._void(store, state.step, problem, is_best)
            return False
        content = self.world.broadcast(self._content(state))
        seconds = time.monotonic() - begun
        stall = None if wait else seconds
        self._under_way = _Save(replace(state), store, content, is_best, seconds, Background(self._write), stall)
        return self.finish() if wait else True

    def _owns(self, store: CheckpointStore) -> bool:
        """Return whether this rank changes the directory of a store."""
        return self.world.is_main if store is self.store else self.world.local_rank == 0

    def finish(self) -> bool:
        """Wait for the save under way, if any, and agree on its outcome; return whether it is good. Collective."""
        good = True
        while self._under_way is not None:
            seen = -1
            while self._under_way.task is not None and not self._under_way.task.wait(_BEAT_SECONDS):
                if self._storage.written != seen:  # a disk that is slow is no hang
                    seen = self._storage.written
                    self.reporter.move("saving")
            good = self.advance()
        return good

    def advance(self) -> bool:
        """Take the save under way, on which no rank is busy, to its next stage; return False if it has failed.

        Collective.
        """
        save = self._under_way
        if save is None:
            return True
        done = _Written()
        if save.task is not None:
            done = save.task.result()
            save.seconds += save.task.seconds
        everyone = self.world.gather(done)
        problem = _first(one.problem for one in everyone)
        if problem is not None:
            self._under_way = None
            self._void(save.store, save.state.step, problem, save.is_best)
            return False
        if save.is_committing:
            self._under_way = None
            is_near = save.store is self.near
            if done.warning is not None:
                self.reporter.warn(done.warning)
            stall = save.seconds if save.stall is None else save.stall
            if not is_near:
                self._saved, self.cost = _identity(save.state), (stall, save.seconds)
                if self.near is not None and not self.near.works:
                    self.remove_near()  # what it kept is older now
            self.reporter.checkpoint(save.state, checkpoint_name(save.state.step), save.seconds, stall, is_near)
            return True
        files = {name: written for one in everyone for name, written in (one.files or {}).items()}
        save.is_committing = True
        save.task = Background(lambda: self._commit(save, files)) if self._owns(save.store) else None
        return True

    def _void(self, store: CheckpointStore, step: int, problem: str, is_best: bool) -> None:
        self._storage.begin(copies=False)  # lets go of what was not written
        if store is self.near:
            self.near.works = False
            if self._owns(store):
                with suppress(OSError):
                    store.discard_unfinished()
            if self.world.is_main:
                self.reporter.warn(f"checkpoint.local: {problem}; this start saves nothing there any more")
            return
        self.problem = problem
        if is_best:
            self._lost_best = step
        if self.world.is_main:
            with suppress(OSError):  # on this rank alone
                self.store.discard_unfinished()
            try:
                kept = self.store.pointed("latest")
                good = f"the last good one is {kept}" if kept else "there is no good one yet"
            except OSError as error:
                good = f"{self.store.root} cannot be read: {error.strerror}"
            if step != self._told_of:  # a run may try the same step again at an evaluation and at its end
                self.reporter.warn(f"checkpoint {checkpoint_name(step)} not saved: {problem}; {good}")
            self._told_of = step

    def _begin(self, store: CheckpointStore, step: int) -> str | None:
        """Make room for a checkpoint and begin its directory. Returns what prevents that, in a few words."""
        if not self._owns(store):
            return None
        try:
            store.open()
            store.discard_unfinished()
            # The recipe may keep fewer than before. Each node has the last one whole by now.
            store.retain(1 if store is self.near else self.recipe.checkpoint.keep_last)
            lack = self._lack(store)
            if lack is None:
                store.begin(step)
            return lack
        except OSError as error:
            return describe(error)

    def _lack(self, store: CheckpointStore) -> str | None:
        """Return what the disk lacks for the next checkpoint, in a few words, or None."""
        engine = self.engine
        nodes = store.nodes if isinstance(store, NearStore) and engine.stage > 0 else 1
        frozen = sum(weight.numel() for weight in engine.frozen.values())
        planned = planned_bytes(self.recipe, engine.stage, engine.parameters, frozen)
        needed = store.newest_bytes() or planned // nodes
        free = shutil.disk_usage(store.root).free
        if free >= needed:
            return None
        needed, free = math.ceil(needed / 1e5), free // 10**5  # in tenths of MB, and never the same
        return f"it needs {needed / 10:,.1f} MB and {store.root} has {free / 10:,.1f} MB free"

    def _collect(self, directory: Path, copies: bool) -> str | None:
        """Hand all that this rank will write to the storage. Returns what went wrong, in a few words."""
        self._storage.begin(copies)
        self.engine.deepspeed.save_checkpoint(str(directory.parent), tag=directory.name, save_latest=False)
        # At stage 0 all ranks hold the same, and rank 0 keeps it.
        owns = self.engine.stage > 0 or self.world.is_main
        sidecar = {
            **records.generator_states(self.world.device),
            "shapes": self.engine.shapes if owns else None,
            "layout": [list(map(tuple, one)) for one in shard_layout(self.engine.deepspeed)] if owns else None,
            "ema": self.ema.shards if self.ema and owns else None,
            "frozen": self.engine.frozen if self.world.is_main else None,
        }
        self._storage.save(sidecar, str(directory / restore.sidecar_name(self.world.rank)))
        if copies:
            wait_for(self.world.device)  # once, for all copies
        return describe(self._storage.error) if self._storage.error is not None else None

    def _content(self, state: S) -> dict[str, Any]:
        """Return the content of `state.json`."""
        teacher = teacher_of(self.engine.module)
        sizes = getattr(self.recipe.schedule, "image_sizes", ())  # the run's own recipe has the last one
        recipe = self.recipe.changed(model__image_size=sizes[-1][1]) if sizes else self.recipe
        return {
            "format": records.FORMAT,
            "kind": self.kind,
            **state.to_json(),
            "world_size": self.world.size,
            "zero_stage": self.engine.stage,
            "has_ema": self.ema is not None,
            "teacher": teacher.digest if teacher else None,
            "recipe_sha256": text_digest(dump_recipe(recipe)),
        }

    def _write(self) -> _Written:
        try:
            return _Written(files={path.name: written for path, written in self._storage.write().items()})
        except OSError as error:
            return _Written(describe(error))

    def _commit(self, save: _Save, files: dict[str, Fingerprint]) -> _Written:
        try:
            save.store.commit(save.store.unfinished(save.state.step), save.content, files, save.is_best)
            if save.store is self.near:  # another node may not have come so far
                return _Written()
        except OSError as error:
            return _Written(describe(error))
        return _Written(warning="; ".join(self.store.retain(self.recipe.checkpoint.keep_last)) or None)

    def load(self, state_of: str = "", fresh: Callable[[], nn.Module] | None = None, is_start: bool = True) -> S | None:
        """Load the newest intact checkpoint, or the one in directory `state_of`. None when there is none.

        Args:
            fresh: a function that builds the engine's model anew. With it, and if either run has
                `schedule.image_sizes`, a state of another image size is interpolated. Else it is refused.
            is_start: false if the run only continues with another model.

        Raises:
            RunDirectoryError: no checkpoint is intact, or it is of another model, global batch, version or kind of run.
        """
        check = self._refuse_another_kind if state_of else self._refuse_another_run
        found = self.world.on_main(lambda: restore.choose_checkpoint(self.store, state_of, self.reporter, check))
        if found is None:
            return None
        root, name = found
        with holding(root / name):  # if it is another run's, that run may train on meanwhile
            saved = CheckpointStore(root).state(name)
            self._refuse_another_run(root / name, saved)
            try:
                restore.check_teacher(self.engine.module, saved)
                grows = bool(saved.get("image_size") or getattr(self.recipe.schedule, "image_sizes", ()))
                is_fitting = fresh is not None and grows
                ranks = [self.world.rank] if not is_fitting and self._has_my_layout(root / name, saved) else None
                with self.world.together():  # none must wait in `restore` for one that refuses its files
                    content = restore.read_state(root / name, saved, ranks)
                    if is_fitting and fresh is not None and content.shapes != self.engine.all_shapes:
                        content = fit_state(content, fresh())
                restore.restore(self.engine, self.ema, content, self.world)
            except (RunDirectoryError, RecipeError) as error:
                raise RunDirectoryError(f"checkpoint {root / name}: {error}") from error
            # A rank resumes with the generators of its number. If there are none, they start from the step.
            if (sidecar := root / name / restore.sidecar_name(self.world.rank)).is_file():
                records.restore_generators(records.read_record(sidecar, records.Sidecar), self.world.device)
            else:
                records.seed_generators(self.recipe.run.seed, saved["step"], self.world.rank)
        state = self.state_type.from_json(saved)
        changes: dict[str, Any] = {}
        if root != self.store.root:
            # These are the other run's: this run does not have that best checkpoint, and has its own pace and peak.
            own = {"timed_samples": 0, "timed_seconds": 0.0, "peak_memory_mb": 0.0}
            changes = {**state.without_best(), **own}
        else:
            self._saved = _identity(state)
            with self.world.together():
                if self.world.is_main:
                    restore.repair_latest(self.store, name, self.reporter)
                    self.store.passed_over = {other for other in self.store.names() if other > name}
            if self.recipe.checkpoint.keep_best:
                changes = self.world.on_main(lambda: restore.repair_best(self.store, state, self.reporter))
        for field, value in changes.items():
            setattr(state, field, value)
        if is_start:
            state.restarts += 1
            state.seconds_to_first_step = None  # each start has its own
        return state

    def _has_my_layout(self, checkpoint: Path, saved: dict[str, Any]) -> bool:
        """Return whether each rank finds all it needs in the files of its own number."""
        stage = saved.get("zero_stage", 0)
        differs = saved["world_size"] != self.world.size or stage != self.engine.stage
        with self.world.together():
            if not differs and stage > 0:
                sidecar = records.read_record(checkpoint / restore.sidecar_name(self.world.rank), records.Sidecar)
                differs = restore.saved_layout(sidecar) != shard_layout(self.engine.deepspeed)
        return not self.world.any(differs)

    def _refuse_another_kind(self, path: Path, saved: dict[str, Any]) -> None:
        kind = saved.get("kind", "classification")
        if kind != self.kind:
            raise RunDirectoryError(
                f"checkpoint {path} is of a run that trains {kind}, this one trains {self.kind}; to start from its "
                f"weights, use init_from={path}"
            )
        try:
            self.state_type.from_json(saved)
        except ValueError as error:
            raise RunDirectoryError(f"{STATE}: {error}") from None

    def _refuse_another_run(self, path: Path, saved: dict[str, Any]) -> None:
        self._refuse_another_kind(path, saved)
        written = saved["samples"] // max(saved["step"], 1)
        batch = self.recipe.train.global_batch
        if saved["samples"] != saved["step"] * batch:  # the cursor counts steps
            raise RunDirectoryError(
                f"checkpoint {path.name} was written with train.global_batch = {written}, this run has "
                f"{batch}; use train.global_batch={written}"
            )


def _identity(state: RunState) -> tuple[int, int]:
    """Return the identity of a state: an evaluation makes another state of the same step."""
    return state.step, state.evaluated_step


def _first(problems: Iterable[str | None]) -> str | None:
    return next((problem for problem in problems if problem is not None), None)
