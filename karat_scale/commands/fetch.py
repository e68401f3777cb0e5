"""`karat fetch`: the directory of a run from its copy at a URL."""

from collections.abc import Sequence

from karat_scale.checkpoint.remote import RemoteCheckpoints
from karat_scale.checkpoint.store import MANIFEST
from karat_scale.foundation.console import plural, printable, work_display
from karat_scale.foundation.errors import RunDirectoryError
from karat_scale.training.run_copy import RunUrl, keep_run_id, run_id
from karat_scale.training.run_directory import RunDirectory

POINTERS = ("best", "latest")


def fetch_run(url: str, directory: str, checkpoint: Sequence[str]) -> int:
    """Copy a run from a URL to a directory, which is new or has this run; returns the exit code.

    Args:
        checkpoint: best, latest, all, or names.

    Raises:
        StoreError: the store does not answer.
        RunDirectoryError: there is no run, the directory is another's, or a wanted checkpoint is missing or damaged.
    """
    copy, run = RunUrl(url), RunDirectory(directory)
    owner, remote = copy.owner(), copy.checkpoints
    if owner is None:
        raise RunDirectoryError(f"{copy.url} has no run (it has no owner.json); name the checkpoint.url of one")
    remote.look()
    names = _chosen(remote, checkpoint, copy.url)
    run.claim()
    mine = run_id(run.path)
    if mine != owner.run and (mine or run.recipe_file.is_file() or run.store.names()):
        raise RunDirectoryError(f"{directory} has another run than {copy.url}; name a new directory")
    is_behind = max(run.store.names(), default="") > max(remote.names(), default="")
    if is_behind:
        more = f"{run.store.names()[0]}, which {copy.url} does not have yet"
        print(f"note: {directory} has {more}; its log and its `latest` stay as they are")
    damaged = {}
    with work_display() as show:
        if not is_behind:
            copy.download_files(run.path, lambda size: None)
        keep_run_id(run.path, owner.run)
        for number, name in enumerate(names):
            show("fetch checkpoints", number, len(names))
            if (damage := _fetch(remote, name, run)) is not None:
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
        raise RunDirectoryError(f"{copy.url}: checkpoint {name} is damaged: {damage}; {there}")
    return 0


def _chosen(remote: RemoteCheckpoints, wanted: Sequence[str], url: str) -> list[str]:
    """The names of the checkpoints that are wanted, newest first."""
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
            raise RunDirectoryError(f"{url}: no checkpoint {one!r}; there are: {', '.join(there) or 'none'}")
    return [name for name in there if name in chosen]


def _fetch(remote: RemoteCheckpoints, name: str, directory: RunDirectory) -> str | None:
    """Copy a checkpoint unless it is in the directory; how it is damaged, if so."""
    if directory.store.damage(name) is None and remote.is_same(name, directory.store.root / name / MANIFEST):
        return None
    return remote.download(name, directory.store, lambda size: None)
