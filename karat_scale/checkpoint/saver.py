"""Save one training state on all ranks together while training goes on.

Training stands still only while each rank copies its state to host memory. A thread of each rank writes the copy. At
the first agreement at which all are done, rank 0's thread gives the checkpoint its manifest and its name. At the next
agreement all ranks hear of it. A checkpoint that one rank could not write exists for none.
"""

import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from karat_scale.checkpoint.records import generator_states
from karat_scale.checkpoint.restore import sidecar_name
from karat_scale.checkpoint.store import CheckpointStore, checkpoint_name
from karat_scale.checkpoint.tensor_storage import DurableStorage, checkpoint_bytes, describe
from karat_scale.engine.deepspeed_internals import shard_layout, use_storage
from karat_scale.engine.devices import wait_for
from karat_scale.engine.distributed import World
from karat_scale.engine.ema import Ema
from karat_scale.engine.engine import Engine
from karat_scale.engine.reporting.progress import Reporter
from karat_scale.engine.run_state import RunState
from karat_scale.foundation.errors import RunDirectoryError
from karat_scale.foundation.files import Fingerprint
from karat_scale.recipe.base import SaveConfig

_BEAT_SECONDS = 1.0
T = TypeVar("T")


class Background(Generic[T]):
    """Work beside training, in a thread that does not outlive the process."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._value: T
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="background", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._work()
        except BaseException as error:
            self._error = error

    def wait(self, seconds: float) -> bool:
        """Wait for its end; whether it has come."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def result(self) -> T:
        """What the finished work returned; raises what it raised."""
        if self._error is not None:
            raise self._error
        return self._value


@dataclass
class _Written:
    """How writing, or committing, ended: what is wrong, and the files by name."""

    problem: str | None = None
    files: dict[str, Fingerprint] | None = None
    warning: str | None = None


@dataclass
class _Save:
    """One save under way; all ranks have it at the same time."""

    state: RunState
    directory: Path
    content: dict[str, Any]
    is_best: bool
    begun: float
    task: Background[_Written] | None
    stall: float | None
    """Seconds that training stood still for it; all of them when None."""
    is_committing: bool = False


class Saver:
    """The save side of `Checkpoints`; at most one save is under way."""

    def __init__(
        self,
        store: CheckpointStore,
        engine: Engine,
        ema: Ema | None,
        world: World,
        config: SaveConfig,
        reporter: Reporter,
    ) -> None:
        self._store = store
        self._engine = engine
        self._ema = ema
        self._world = world
        self._config = config
        self._reporter = reporter
        self._storage = DurableStorage()
        use_storage(engine.deepspeed, self._storage)
        self._under_way: _Save | None = None
        self._saved: tuple[int, int] | None = None
        self.problem = ""
        """Why the last save came to nothing, if it did; the same on all ranks."""
        self._told_of = -1

    @property
    def is_under_way(self) -> bool:
        """Whether a save has begun whose outcome the ranks do not know yet; the same on all."""
        return self._under_way is not None

    @property
    def is_busy(self) -> bool:
        """Whether this rank still works on the save under way."""
        task = self._under_way.task if self._under_way else None
        return task is not None and not task.wait(0)

    @property
    def has_only_failed(self) -> bool:
        """Whether a save has failed and the run has no checkpoint: to go on might be for nothing. The same on all."""
        return bool(self.problem) and self._saved is None and self._under_way is None

    def check_room(self) -> None:
        """Raise RunDirectoryError on all ranks, if a run without a checkpoint has no room for one. Collective."""
        with self._world.together():
            if self._world.is_main and self._saved is None and (lack := self._lack()):
                raise RunDirectoryError(
                    f"run.dir = {self._store.root.parent}: there is no room for a checkpoint: {lack}; make room, or "
                    "choose another run.dir"
                )

    def holds(self, state: RunState) -> bool:
        """Whether `state` is saved, or being saved; the same on all ranks."""
        under_way = self._under_way is not None and _identity(self._under_way.state) == _identity(state)
        return under_way or self._saved == _identity(state)

    def note_saved(self, state: RunState) -> None:
        """`state` is in a checkpoint of this run already."""
        self._saved = _identity(state)

    def save(self, state: RunState, content: dict[str, Any], is_best: bool = False, wait: bool = True) -> bool:
        """Save `state` unless that is done; collective. A save of another state that is under way is waited for first.

        Args:
            content: what `state.json` will hold.
            is_best: let `best` name the checkpoint, too.
            wait: until it is complete; else return after the copy.

        Returns: whether it is saved, or without `wait` begun. Where not, nothing has changed.
        """
        begun = time.monotonic()
        wait = wait or not self._config.asynchronous
        if self.holds(state) and not wait:
            return True
        self.finish()
        if self._saved == _identity(state):
            return True
        self.problem = ""
        directory, problem = self._world.broadcast(self._begin(state.step))
        if directory is None:
            self._void(state.step, problem)
            return False
        problem = self._first(self._collect(directory, copies=not wait))
        if problem is not None:
            self._void(state.step, problem)
            return False
        stall = None if wait else time.monotonic() - begun
        self._under_way = _Save(replace(state), directory, content, is_best, begun, Background(self._write), stall)
        return self.finish() if wait else True

    def finish(self) -> bool:
        """Wait for the save under way, if there is one, and agree on its outcome; whether it is good. Collective."""
        good = True
        while self._under_way is not None:
            seen = -1
            while self._under_way.task is not None and not self._under_way.task.wait(_BEAT_SECONDS):
                if self._storage.written != seen:  # a disk that is slow is no hang
                    seen = self._storage.written
                    self._reporter.beat("saving")
            good = self.advance()
        return good

    def advance(self) -> bool:
        """Take the save under way, on which no rank is busy, to its next stage; False when it came to nothing.

        Collective.
        """
        save = self._under_way
        if save is None:
            return True
        done = save.task.result() if save.task is not None else _Written()
        if save.is_committing:
            done = self._world.broadcast(done)
            self._under_way = None
            if done.problem is not None:
                self._void(save.state.step, done.problem)
                return False
            self._report(save, done.warning)
            return True
        everyone = self._world.gather(done)
        problem = next((one.problem for one in everyone if one.problem is not None), None)
        if problem is not None:
            self._under_way = None
            self._void(save.state.step, problem)
            return False
        files = {name: written for one in everyone for name, written in (one.files or {}).items()}
        save.is_committing = True
        save.task = Background(lambda: self._commit(save, files)) if self._world.is_main else None
        return True

    def _report(self, save: _Save, warning: str | None) -> None:
        self._saved = _identity(save.state)
        seconds = time.monotonic() - save.begun
        if warning is not None and self._world.is_main:
            self._reporter.warn(warning)
        stall = seconds if save.stall is None else save.stall
        self._reporter.checkpoint(save.state, checkpoint_name(save.state.step), seconds, stall)

    def _void(self, step: int, problem: str | None) -> None:
        self.problem = problem or ""
        self._storage.begin(copies=False)  # lets go of what was not written
        if self._world.is_main:
            self._store.discard_unfinished()
            kept = self._store.pointed("latest")
            good = f"the last good one is {kept}" if kept else "there is no good one yet"
            if step != self._told_of:  # a run may try the same step again at an evaluation and at its end
                self._reporter.warn(f"checkpoint {checkpoint_name(step)} not saved: {problem}; {good}")
            self._told_of = step

    def _begin(self, step: int) -> tuple[Path | None, str | None]:
        if not self._world.is_main:
            return None, None
        try:
            self._store.root.mkdir(parents=True, exist_ok=True)
            self._store.discard_unfinished()
            self._store.retain(self._config.keep_last)  # the recipe may keep fewer than before
            lack = self._lack()
            return (self._store.begin(step), None) if lack is None else (None, lack)
        except OSError as error:
            return None, describe(error)

    def _lack(self) -> str | None:
        """What the disk lacks for the next checkpoint, in a few words."""
        weight_bytes = next(self._engine.module.parameters()).element_size()
        sizes = self._engine.parameters, self._engine.stage, self._ema is not None, weight_bytes
        needed = self._store.newest_bytes() or checkpoint_bytes(*sizes)
        free = shutil.disk_usage(self._store.root).free
        is_enough = free >= needed
        return (
            None if is_enough else f"it needs {_megabytes(needed)} and {self._store.root} has {_megabytes(free)} free"
        )

    def _collect(self, directory: Path, copies: bool) -> str | None:
        """Hand all that this rank will write to the storage. Returns what went wrong, in a few words."""
        self._storage.begin(copies)
        self._engine.deepspeed.save_checkpoint(str(self._store.root), tag=directory.name, save_latest=False)
        # At stage 0 all ranks hold the same, and rank 0 keeps it.
        owns = self._engine.stage > 0 or self._world.is_main
        sidecar = {
            **generator_states(self._world.device),
            "shapes": self._engine.shapes if owns else None,
            "layout": self._layout() if owns else None,
            "ema": self._ema.shards if self._ema and owns else None,
            "frozen": self._engine.frozen if self._world.is_main else None,
        }
        self._storage.save(sidecar, str(directory / sidecar_name(self._world.rank)))
        if copies:
            wait_for(self._world.device)  # once, for all copies
        return describe(self._storage.error) if self._storage.error is not None else None

    def _layout(self) -> list[list[tuple[Any, ...]]]:
        return [[tuple(fragment) for fragment in fragments] for fragments in shard_layout(self._engine.deepspeed)]

    def _write(self) -> _Written:
        try:
            return _Written(files={path.name: written for path, written in self._storage.write().items()})
        except OSError as error:
            return _Written(describe(error))

    def _commit(self, save: _Save, files: dict[str, Fingerprint]) -> _Written:
        try:
            self._store.commit(save.directory, save.content, files, save.is_best)
        except OSError as error:
            return _Written(describe(error))
        return _Written(warning="; ".join(self._store.retain(self._config.keep_last)) or None)

    def _first(self, problem: str | None) -> str | None:
        return next((p for p in self._world.gather(problem) if p is not None), None)


def _identity(state: RunState) -> tuple[int, int]:
    """An evaluation makes another state of the same step."""
    return state.step, state.evaluated_step


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
