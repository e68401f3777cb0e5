"""The start of a run with `checkpoint.url`: whose the files there are, and what the run's directory lacks of them."""

import secrets
import tempfile
from contextlib import suppress
from pathlib import Path

from karat_scale.checkpoint.checkpoints import Background
from karat_scale.checkpoint.remote import OnBytes
from karat_scale.checkpoint.store import checkpoint_name
from karat_scale.engine.distributed import World
from karat_scale.foundation.errors import RecipeError, RunDirectoryError
from karat_scale.foundation.stores import StoreError
from karat_scale.recipe import RunRecipe
from karat_scale.recipe.loading import differing_keys, load_run_recipe
from karat_scale.training.heartbeats import start_heartbeat
from karat_scale.training.run_copy import Owner, RunCopy, RunUrl, follow, keep_run_id, run_id
from karat_scale.training.run_directory import RunDirectory, describe_keys
from karat_scale.training.signals import StoppedError, StopSignals


def open_copy(recipe: RunRecipe, world: World, directory: RunDirectory, signals: StopSignals) -> RunCopy | None:
    """Take `checkpoint.url` for this start, and bring a newer checkpoint from there; the directory is claimed.

    Collective. Returns what copies the run, on rank 0 alone, and None without `checkpoint.url`.

    Raises:
        StoppedError: a signal asked to stop.
        RunDirectoryError: the files there are another run's, or the store does not answer.
    """
    if not recipe.checkpoint.url:
        return None
    heartbeat = start_heartbeat(directory.path, world)
    try:
        start = _Start(recipe, directory) if world.is_main else None
        if not follow(world, start, lambda: heartbeat.beat("fetching"), lambda: signals.received is not None):
            raise StoppedError
        with world.together():
            return start.result() if start is not None else None
    finally:
        heartbeat.stop()


class _Start:
    """Rank 0's part of `open_copy`, in a thread."""

    def __init__(self, recipe: RunRecipe, directory: RunDirectory) -> None:
        self.moved = 0
        self._background = Background(lambda: _begin(recipe, directory, self._count))
        self.wait, self.result = self._background.wait, self._background.result

    def _count(self, size: int) -> None:
        self.moved += size


def _begin(recipe: RunRecipe, directory: RunDirectory, on_bytes: OnBytes) -> RunCopy:
    checkpoint = recipe.checkpoint
    try:
        url = RunUrl(checkpoint.url, checkpoint.timeout)
        _take(recipe, directory, url)
        notes = _bring(recipe, directory, url, on_bytes)
    except StoreError as error:
        kept = directory.store.pointed("latest")
        raise RunDirectoryError(
            f"checkpoint.url: {error}; put that right, or go on without it by checkpoint.url= "
            f"(from {f'{kept}, the newest in run.dir' if kept else 'the beginning: run.dir has no checkpoint'})"
        ) from None
    return RunCopy(url, directory, checkpoint.keep_last, notes)


def _take(recipe: RunRecipe, directory: RunDirectory, url: RunUrl) -> None:
    """Let this start write at the URL, if the run there is this one or there is none."""
    mine, owner = run_id(directory.path), url.owner()
    url.checkpoints.look()
    there = url.checkpoints.names()
    if owner is None and there:
        raise RunDirectoryError(f"checkpoint.url = {url.url} has checkpoints of an unknown run; choose another one")
    if owner is not None:
        other = _difference(recipe, directory, url, owner, mine)
        if other:
            raise RunDirectoryError(
                f"checkpoint.url = {url.url} belongs to another run, {owner.name} ({other}); use another checkpoint.url"
            )
    if there and recipe.resume.mode == "never":
        raise RunDirectoryError(
            f"checkpoint.url = {url.url} has checkpoints and resume.mode = never; choose another checkpoint.url or use "
            "resume.mode=auto"
        )
    name = owner.run if owner is not None else mine or secrets.token_hex(8)
    keep_run_id(directory.path, name)
    url.take(name, recipe.run.name)


def _difference(recipe: RunRecipe, directory: RunDirectory, url: RunUrl, owner: Owner, mine: str) -> str:
    """Why the run at a URL is not this one; empty if it is. A directory without an id may be a new one of that run."""
    if mine:
        return "" if mine == owner.run else f"run.dir = {directory.path} has another run_id"
    if directory.store.names():
        return f"run.dir = {directory.path} has checkpoints that were never copied there"
    if owner.name != recipe.run.name:
        return f"run.name = {recipe.run.name}"
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "recipe.yaml"
        if not url.read_recipe(file):
            return ""
        try:
            theirs = load_run_recipe(file, (), type(recipe))
        except RecipeError as error:
            said = str(error).replace(str(file), f"checkpoint.url = {url.url}: recipe.yaml")
            raise RecipeError(f"{said}; put it right, or use another checkpoint.url") from None
    keys = [key for key in differing_keys(theirs, recipe, recipe.resume.allow) if key != "train.epochs"]
    return describe_keys(theirs, recipe, keys)


def _bring(recipe: RunRecipe, directory: RunDirectory, url: RunUrl, on_bytes: OnBytes) -> list[str]:
    """Copy the newest intact checkpoint that is newer than the directory's, and the best one; returns what to tell."""
    store, remote = directory.store, url.checkpoints
    newer = [name for name in remote.names() if name > max(store.names(), default="")]
    if not newer:
        return _bring_lost_best(directory, url, on_bytes) if recipe.checkpoint.keep_best else []
    url.download_files(directory.path, on_bytes)
    notes = []
    for name in newer:
        damage = remote.download(name, store, on_bytes)
        if damage is None:
            store.point("latest", name)
            notes.append(f"{name} and the log were fetched from {url.url}")
            break
        notes.append(f"warning: checkpoint {name} at {url.url} is damaged: {damage}; trying the one before")
    else:
        if not store.names():
            raise RunDirectoryError(
                f"checkpoint.url = {url.url}: none of {len(newer)} checkpoints is intact ({damage}); choose another "
                "checkpoint.url to start from the beginning"
            )
    if recipe.checkpoint.keep_best:
        notes += _bring_best(directory, url, on_bytes)
    return notes


def _bring_lost_best(directory: RunDirectory, url: RunUrl, on_bytes: OnBytes) -> list[str]:
    """Copy the best checkpoint of the newest state here, if only the URL has it: an earlier start was cut off."""
    store, remote = directory.store, url.checkpoints
    with suppress(OSError, ValueError, IndexError):
        saved = store.state(store.names()[0]).get("best_step")
        name = checkpoint_name(saved) if isinstance(saved, int) else ""
        if name in remote.names() and name not in store.names():
            if (damage := remote.download(name, store, on_bytes)) is not None:
                return [f"warning: the best checkpoint, {name}, is damaged at {url.url}: {damage}"]
            store.point("best", name)
            return [f"{name}, the best checkpoint, was fetched from {url.url}"]
    return []


def _bring_best(directory: RunDirectory, url: RunUrl, on_bytes: OnBytes) -> list[str]:
    """Copy the checkpoint that `best` names, and the one that the newest state names: a kill may have been between."""
    store, remote, notes = directory.store, url.checkpoints, []
    pointed, saved = remote.pointed("best"), store.state(store.names()[0]).get("best_step")
    best = {pointed, checkpoint_name(saved) if isinstance(saved, int) else None}
    for name in [name for name in remote.names() if name in best and name not in store.names()]:
        if (damage := remote.download(name, store, on_bytes)) is not None:
            notes.append(f"warning: the best checkpoint, {name}, is damaged at {url.url}: {damage}")
    if pointed is not None and pointed in store.names():
        store.point("best", pointed)
    return notes
