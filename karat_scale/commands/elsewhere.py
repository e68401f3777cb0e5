"""`karat track` and `karat fetch`: bring the trackers of runs up to date, and copy a run from a URL."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from karat_scale.checkpoint.remote import RemoteCheckpoints
from karat_scale.checkpoint.store import MANIFEST, POINTERS
from karat_scale.engine.tracking.follow import Trackers, check_trackers
from karat_scale.foundation.console import plural, printable, work_display
from karat_scale.foundation.errors import RecipeError, RunDirectoryError, UserError
from karat_scale.foundation.tables import TRACKERS, require_trust
from karat_scale.recipe.base import LogConfig, key_of, wanted_by
from karat_scale.recipe.files import read_run_recipe, recipe_of_run
from karat_scale.training.run_copy import RunUrl, keep_run_id, run_id
from karat_scale.training.run_directory import RunDirectory


def track_runs(runs: Sequence[str], to: Sequence[str] | None) -> int:
    """Bring the trackers of runs up to date, one run after the other; returns the exit code.

    Args:
        runs: the directories of the runs.
        to: the trackers to use instead of those in the runs' recipes.

    Raises:
        UserError: a path is not a run, or a tracker is not installed, unknown or not trusted.
    """
    chosen = {Path(path): to or _trackers_in_recipe(recipe_of_run(Path(path))) for path in runs}
    for trackers in chosen.values():
        check_trackers(trackers, "--to" if to else "log.trackers =")
    code = 0
    for run, trackers in chosen.items():

        def say(text: str, run: Path = run) -> None:
            print(printable(f"{run}: {text}"), flush=True)

        try:
            late = Trackers(run, trackers, patient=True, say=say).finish(None)
        except KeyboardInterrupt:
            raise UserError(f"{run}: stopped; run the same command to send the rest") from None
        for name in trackers:
            if name in late:  # a late tracker has reported it
                code = 1
            else:
                say(f"{name}: has everything")
    return code


def _trackers_in_recipe(file: Path) -> Sequence[str]:
    tree = read_run_recipe(file)
    try:
        trackers = LogConfig.model_validate(tree.get("log", {})).trackers
    except ValidationError as error:
        first = error.errors()[0]
        key = f"log.{key_of(first)}".rstrip(".")
        raise RecipeError(f"{file}: {key}: {wanted_by(first)}; name the trackers with --to") from None
    if not trackers:
        raise UserError(f"{file}: log.trackers is empty; name the trackers with --to, such as --to {[*TRACKERS][-1]}")
    for name in trackers:
        require_trust({"log.trackers": name}, file)
    return trackers


def fetch_run(url: str, directory: str, checkpoint: Sequence[str]) -> int:
    """Copy a run from a URL to a directory that is new or already has this run; returns the exit code.

    Args:
        checkpoint: the checkpoints to copy: best, latest, all, or names.

    Raises:
        StoreError: the store does not answer.
        RunDirectoryError: there is no run, the directory has another run or other files, or a wanted checkpoint is
            missing or damaged.
    """
    copy, run = RunUrl(url), RunDirectory(directory)
    owner, remote = copy.owner(), copy.checkpoints
    if owner is None:
        raise RunDirectoryError(f"{copy.url} has no run (it has no owner.json); name the checkpoint.url of one")
    remote.look()
    names = _chosen(remote, checkpoint, copy.url)
    is_run = run_id(run.path) or run.recipe_file.is_file()
    if not is_run and run.path.is_dir() and any(run.path.iterdir()):
        raise RunDirectoryError(f"{directory} has files, but no run; name a new directory")
    run.claim()
    mine = run_id(run.path)
    if mine != owner.run and (mine or run.recipe_file.is_file()):
        raise RunDirectoryError(f"{directory} has another run than {copy.url}; name a new directory")
    is_behind = max(run.store.names(), default="") > max(remote.names(), default="")
    if is_behind:
        more = f"{run.store.names()[0]}, which {copy.url} does not have yet"
        print(f"note: {directory} has {more}; its log and its `latest` stay as they are")
    damaged = {}
    keep_run_id(run.path, owner.run)  # first: if the rest is interrupted, the next command fetches it
    with work_display() as show:
        if not is_behind:
            copy.download_files(run.path, lambda size: None)
        for number, name in enumerate(names):
            show("fetch checkpoints", number, len(names))
            if run.store.damage(name) is None and remote.is_same(name, run.store.root / name / MANIFEST):
                continue  # it is here
            if (damage := remote.download(name, run.store, lambda size: None)) is not None:
                damaged[name] = damage
        show("fetch checkpoints", len(names), len(names))
    for pointer in () if is_behind else POINTERS:
        pointed = remote.pointed(pointer)
        if pointed is not None and pointed in run.store.names():
            run.store.point(pointer, pointed)
    good = [name for name in names if name not in damaged]
    listed = f"{plural(len(good), 'checkpoint')}: {', '.join(good) or 'none'}"
    print(printable(f"{directory} has run {owner.name} with {listed}"))
    if damaged:
        name, damage = next(iter(damaged.items()))
        remote.look()
        if name not in remote.names():
            raise RunDirectoryError(
                f"{copy.url}: the run removed checkpoint {name} meanwhile; run the same command again"
            )
        others = ", ".join(other for other in remote.names() if other not in damaged)
        there = f"--checkpoint NAME takes another one: {others}" if others else "there is no other"
        raise RunDirectoryError(f"{copy.url}: checkpoint {name} cannot be used: {damage}; {there}")
    return 0


def _chosen(remote: RemoteCheckpoints, wanted: Sequence[str], url: str) -> list[str]:
    """Return the names of the wanted checkpoints, newest first."""
    there = remote.names()
    chosen: set[str | None] = set()
    for one in wanted:
        if one == "all":
            chosen |= set(there)
        elif one in POINTERS:
            chosen.add(remote.pointed(one) or next(iter(there), None))
        elif one in there:
            chosen.add(one)
        else:
            fix = f"name one of {', '.join([*POINTERS, 'all', *there])}"
            raise RunDirectoryError(f"--checkpoint {one}: {url} has no such checkpoint; {fix}")
    return [name for name in there if name in chosen]
