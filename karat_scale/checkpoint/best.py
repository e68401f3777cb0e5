"""The pointers `best` and `latest` after a kill, a full disk or damage: what they name is what the state says."""

from typing import Any

from karat_scale.checkpoint.store import CheckpointStore, checkpoint_name
from karat_scale.checkpoint.tensor_storage import describe
from karat_scale.engine.run_state import RunState
from karat_scale.reporting.progress import Reporter


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
