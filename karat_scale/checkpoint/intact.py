"""The checkpoint that a run resumes from."""

from pathlib import Path

from karat_scale.checkpoint.store import CheckpointStore
from karat_scale.engine.distributed import World
from karat_scale.errors import RunDirectoryError
from karat_scale.reporting.progress import Reporter


def agree_on_checkpoint(
    store: CheckpointStore, state_of: str, world: World, reporter: Reporter
) -> tuple[Path, str] | None:
    """The newest intact checkpoint of a run, or the one in `state_of`: its store's root and its name. Collective.

    Args:
        state_of: a run's directory or a checkpoint in one, for a run that branches from it; empty for `store`'s own.

    Returns:
        None where there is none yet.

    Raises:
        RunDirectoryError: on all ranks alike, where no checkpoint is intact.
    """
    found = world.broadcast(_choose(store, state_of, reporter) if world.is_main else None)
    if isinstance(found, RunDirectoryError):
        raise found
    return found


def _choose(store: CheckpointStore, state_of: str, reporter: Reporter) -> tuple[Path, str] | RunDirectoryError | None:
    if not state_of:
        return _newest_intact(store, reporter)
    path = Path(state_of)
    if (path / "checkpoints").is_dir():
        found = _newest_intact(CheckpointStore(path / "checkpoints"), reporter)
        return found or RunDirectoryError(f"resume.from = {state_of}: this run has no checkpoints yet")
    damage = CheckpointStore(path.parent).damage(path.name, reporter.display.verify)
    if damage:
        return RunDirectoryError(f"resume.from = {state_of}: {damage}; name a complete checkpoint or a run's directory")
    return path.parent, path.name


def _newest_intact(store: CheckpointStore, reporter: Reporter) -> tuple[Path, str] | RunDirectoryError | None:
    names = store.names()
    latest = store.pointed("latest")
    for name in sorted(names, key=lambda n: n != latest):
        damage = store.damage(name, reporter.display.verify)
        if damage is None:
            return store.root, name
        reporter.warn(f"checkpoint {name} is damaged: {damage}; trying the one before")
    if names:
        return RunDirectoryError(
            f"{store.root}: none of {len(names)} checkpoints is intact; "
            "remove the directory to start from the beginning, or restore one from a copy"
        )
    return None


def refuse_another_batch(name: str, saved_samples: int, saved_step: int, global_batch: int) -> None:
    """Raises RunDirectoryError where a checkpoint's steps were of another size: the cursor counts steps."""
    if saved_samples != saved_step * global_batch:
        written = saved_samples // max(saved_step, 1)
        raise RunDirectoryError(
            f"checkpoint {name} was written with train.global_batch = {written}, this run has "
            f"{global_batch}; use train.global_batch={written}"
        )
