"""Which checkpoint a run resumes from, and the pointers `latest` and `best`.

All ranks choose the same intact checkpoint. The pointers name what the state says, even after a kill, a full disk or
damage.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from karat_scale.checkpoint.restore import falsehood
from karat_scale.checkpoint.store import CheckpointStore, checkpoint_name
from karat_scale.checkpoint.tensor_storage import describe
from karat_scale.engine.distributed import World
from karat_scale.engine.reporting.progress import Reporter
from karat_scale.engine.run_state import RunState
from karat_scale.foundation.errors import RunDirectoryError


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
