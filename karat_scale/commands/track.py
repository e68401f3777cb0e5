"""`karat track RUN...`: send to the trackers what they have not got, such as from a node that reaches the network."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from karat_scale.engine.tracking.follow import Trackers, check_trackers
from karat_scale.foundation.console import printable
from karat_scale.foundation.errors import RecipeError, RunDirectoryError, UserError
from karat_scale.foundation.tables import TRACKERS, require_trust
from karat_scale.recipe.base import LogConfig
from karat_scale.recipe.files import read_run_recipe


def track_runs(runs: Sequence[str], to: Sequence[str] | None) -> int:
    """Bring the trackers of runs up to date, one run after the other; returns the exit code.

    Args:
        runs: their directories.
        to: the trackers, in place of those in the runs' recipes.

    Raises:
        UserError: a path is no run, or a tracker is not installed, unknown or not trusted.
    """
    for path in runs:
        if not (Path(path) / "recipe.yaml").is_file():
            raise RunDirectoryError(f"{path}: not a run directory (it has no recipe.yaml)")
    chosen = {path: to or _trackers_in_recipe(Path(path) / "recipe.yaml") for path in runs}
    for trackers in chosen.values():
        check_trackers(trackers)
    late = [path for path, trackers in chosen.items() if not _send(Path(path), trackers)]
    return 1 if late else 0


def _trackers_in_recipe(file: Path) -> Sequence[str]:
    tree = read_run_recipe(file)
    try:
        trackers = LogConfig.model_validate(tree.get("log", {})).trackers
    except ValidationError as error:
        raise RecipeError(f"{file}: log: {error.errors()[0]['msg']}; name the trackers with --to") from None
    if not trackers:
        raise UserError(f"{file}: log.trackers is empty; name the trackers with --to, such as --to {[*TRACKERS][-1]}")
    for name in trackers:
        require_trust({"log.trackers": name}, file)
    return trackers


def _send(run: Path, names: Sequence[str]) -> bool:
    """Send a run to its trackers; whether they have everything."""

    def say(text: str) -> None:
        print(printable(f"{run}: {text}"), flush=True)

    try:
        late = Trackers(run, names, patient=True, say=say).finish(None)
    except KeyboardInterrupt:
        raise UserError(f"{run}: stopped; run the same command to send the rest") from None
    for name in names:
        if name not in late:  # what is late has said so
            say(f"{name}: has everything")
    return not late
