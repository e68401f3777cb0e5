"""The files of a run's checkpoints. This module knows directories and hashes, nothing of DeepSpeed.

checkpoints/
  step-00001200/        complete: it has this name only after everything in it is on disk
    ...                 DeepSpeed's files and one sidecar per rank
    state.json          where training stood
    manifest.json       every other file with its size and SHA-256, written last
  .saving-step-00001300/   a save under way, or one that a crash cut off; never read
  latest, best          a checkpoint's name, replaced atomically
  pinned                names of old checkpoints that are kept, one on a line

With `checkpoint.local` each node has such a directory on its own disk: NearStore.

A reader of a checkpoint locks its manifest, so that nobody removes it. Some file systems have no locks.
"""

import errno
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

from karat_scale.foundation.console import printable
from karat_scale.foundation.errors import FAULTS_OF_SERVERS, RunDirectoryError
from karat_scale.foundation.files import (
    Fingerprint,
    file_sha256,
    flush_to_disk,
    lock,
    name_in_errors,
    open_regular,
    open_to_read,
    parse_json,
    read_text,
    remove_leftovers,
    replace_file,
    unlock,
)
from karat_scale.foundation.machine import this_node, usable_cores
from karat_scale.recipe.files import name_one

MANIFEST = "manifest.json"
STATE = "state.json"
Progress = Callable[[int, int], None]
"""A function that is called with how many bytes are done, and of how many."""


def manifest_text(files: Mapping[str, Fingerprint]) -> str:
    """The text of the manifest of these files."""
    listed = {name: files[name]._asdict() for name in sorted(files)}
    return json.dumps({"format": 1, "files": listed}, indent=2) + "\n"


def parse_manifest(text: str) -> dict[str, Fingerprint]:
    """The files that a manifest lists. Raises ValueError if it is not, byte for byte, what was written."""
    try:
        files = {name: Fingerprint(**file) for name, file in parse_json(text)["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError from error
    if STATE not in files or any("/" in name for name in files) or text != manifest_text(files):
        raise ValueError
    if not all(type(file.bytes) is int and isinstance(file.sha256, str) for file in files.values()):
        raise ValueError
    return files


def read_manifest(checkpoint: Path) -> dict[str, Fingerprint]:
    """Return the files that a checkpoint's manifest lists. Raises OSError, and ValueError like `parse_manifest`."""
    return parse_manifest(read_text(checkpoint / MANIFEST))


def damage_of(checkpoint: Path, progress: Progress = lambda done, total: None) -> str | None:
    """Return what is wrong with the files of a checkpoint, in a few words; None if each one is as it was written.

    Files are hashed in parallel. Raises OSError if one cannot be read now: that says nothing of the checkpoint.
    """
    try:
        files = read_manifest(checkpoint)
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except ValueError:
        return f"{MANIFEST} is not readable"
    except OSError as error:
        return f"{MANIFEST} cannot be read: {not_readable(error)}"
    total = sum(file.bytes for file in files.values())
    counting, done = threading.Lock(), 0

    def count(size: int) -> None:
        nonlocal done
        with counting:
            done += size
            progress(done, total)

    with ThreadPoolExecutor(min(8, usable_cores())) as threads:
        found = list(threads.map(lambda name: _damage(checkpoint / name, files[name], count), files))
    progress(total, total)  # damaged or not
    return next((damage for damage in found if damage is not None), None)


def _damage(path: Path, written: Fingerprint, count: Callable[[int], None]) -> str | None:
    try:
        size = path.stat().st_size
        if size != written.bytes:
            return f"{path.name} has {size} bytes, not {written.bytes}"
        if file_sha256(path, count) != written.sha256:
            return f"{path.name} has changed since it was written"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read: {not_readable(error)}"
    return None


# Errors that a file server or a limit gives for an intact file.
_NO_DAMAGE = {*FAULTS_OF_SERVERS, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM}


def not_readable(error: OSError) -> str:
    """Return why a file is damaged, in a few words. Raises the error itself if it does not mean damage."""
    if error.errno in _NO_DAMAGE:
        raise error
    return error.strerror or str(error)


def hold(checkpoint: Path) -> BinaryIO | None:
    """Keep a checkpoint from being removed as long as the returned file is open; None if it is not there."""
    try:
        handle = open_to_read(checkpoint / MANIFEST)
    except OSError:
        return None
    lock(handle, shared=True)
    if not (checkpoint / MANIFEST).exists():
        handle.close()
        return None
    return handle


@contextmanager
def holding(checkpoint: Path) -> Iterator[bool]:
    """Keep a checkpoint from being removed inside the block; yield whether it is there."""
    handle = hold(checkpoint)
    if handle is None:
        yield False
        return
    with handle:
        try:
            yield True
        finally:
            unlock(handle)


@contextmanager
def alone(checkpoint: Path) -> Iterator[None]:
    """Keep others from starting to read a checkpoint inside the block. Raises BlockingIOError if somebody reads it."""
    with ExitStack() as stack:
        with suppress(FileNotFoundError):  # a damaged one has no manifest
            path = checkpoint / MANIFEST
            # NFS gives such a lock only on what is open for writing.
            descriptor = open_regular(path, os.O_RDWR if os.access(path, os.W_OK) else os.O_RDONLY)
            handle = stack.enter_context(os.fdopen(descriptor, "rb"))
            if not lock(handle, wait=False):
                raise BlockingIOError(f"{checkpoint} is being read")
        yield


PINNED = "pinned"
CHECKPOINT_NAME = re.compile(r"step-\d{8,}")
_UNFINISHED = ".saving-"
_REPLACED = f"{_UNFINISHED}replaced-"
POINTERS = ("best", "latest")
Falsehood = Callable[[Path], str | None]
"""A function that returns a contradiction in a checkpoint's files, although their hashes are right; or None."""


def checkpoint_name(step: int) -> str:
    """The directory's name of the checkpoint after `step` finished steps."""
    return f"step-{step:08d}"


def step_of(name: str) -> int:
    """The finished steps of the checkpoint of this name."""
    return int(name.removeprefix("step-"))


def branch_point(source: str) -> tuple[Path, str | None]:
    """Return the directory of checkpoints that `resume.from` names, and one of them; None if it names a whole run.

    Raises RunDirectoryError if it names neither.
    """
    path = Path(source).expanduser()
    if (path / "checkpoints").is_dir() or (path / "recipe.yaml").is_file():
        return path / "checkpoints", None
    if path.is_dir() and (CHECKPOINT_NAME.fullmatch(path.name) or (path / MANIFEST).is_file()):
        return path.parent, path.name
    what = "neither a run's directory nor a checkpoint in one"
    raise RunDirectoryError(f"resume.from = {source}: {what}; {name_one(path)}")


class CheckpointStore:
    """The `checkpoints` directory of one run; only rank 0 changes it.

    Args:
        falsehood: a function that looks into a checkpoint whose hashes are right; without it, only hashes are verified.
    """

    def __init__(self, root: Path, falsehood: Falsehood | None = None) -> None:
        self.root, self._falsehood = root, falsehood
        self._held: list[BinaryIO] = []
        self.verified = ""
        """The name of a checkpoint that this process has just read whole, and need not read again."""
        self.passed_over: set[str] = set()
        """Damaged checkpoints newer than the one that training resumed from: `retain` does not count them."""
        self.on_change: Callable[[], object] = lambda: None
        """A function that any thread calls when a checkpoint is complete or pinned."""

    def open(self) -> None:
        """Make the directory, if need be. Raises OSError."""
        self.root.mkdir(parents=True, exist_ok=True)

    def unfinished(self, step: int) -> Path:
        """The directory of a checkpoint that is being written."""
        return self.root / f"{_UNFINISHED}{checkpoint_name(step)}"

    def begin(self, step: int) -> Path:
        """Make an empty directory for the files of a new checkpoint, and return it."""
        self.discard_unfinished()
        path = self.unfinished(step)
        path.mkdir(parents=True)
        return path

    def commit(
        self, unfinished: Path, state: dict[str, Any], files: Mapping[str, Fingerprint], is_best: bool = False
    ) -> str:
        """Give a written checkpoint its manifest and its name, and point `latest` at it, and `best` if `is_best`.

        Args:
            files: the fingerprints of its files, by name, from those who wrote them.
            is_best: whether it is better than the one that `best` names.

        Raises:
            OSError: a file is not there as it was written, or the disk does not take the rest.
        """
        for file in self._to_check(unfinished, files):
            size = (unfinished / file).stat().st_size
            if size != files[file].bytes:
                raise OSError(f"{file} has {size} bytes, but {files[file].bytes} were written")
        replace_file(unfinished / STATE, json.dumps(state, indent=2) + "\n")
        own = {STATE: Fingerprint((unfinished / STATE).stat().st_size, file_sha256(unfinished / STATE))}
        replace_file(unfinished / MANIFEST, manifest_text({**files, **own}))
        name = self._give_name(unfinished)
        if is_best:  # before `latest`: a run resumed from `latest` does not evaluate it again, so `best` would be lost
            self.point("best", name)
        self.point("latest", name)
        self.on_change()
        return name

    def _to_check(self, unfinished: Path, files: Mapping[str, Fingerprint]) -> Iterable[str]:
        """Return which files of a checkpoint must be in this directory."""
        return files

    def adopt(self, unfinished: Path, manifest: str) -> str | None:
        """Give a copy of a checkpoint, whose files are as its manifest says, the manifest and its name.

        Returns:
            What cannot be true in its files; the copy is removed then. Raises OSError like `commit`.
        """
        if self._falsehood is not None and (damage := self._falsehood(unfinished)) is not None:
            shutil.rmtree(unfinished)
            return damage
        replace_file(unfinished / MANIFEST, manifest)
        self._give_name(unfinished)
        return None

    def _give_name(self, unfinished: Path) -> str:
        name = unfinished.name.removeprefix(_UNFINISHED)
        final, replaced = self.root / name, self.root / f"{_REPLACED}{name}"
        if final.exists():  # the same step again, as after a damaged save: the new one takes its place
            final.rename(replaced)
        unfinished.rename(final)
        self.passed_over.discard(name)
        flush_to_disk(self.root)
        shutil.rmtree(replaced, ignore_errors=True)
        return name

    def point(self, pointer: str, name: str) -> None:
        """Let `latest` or `best` name a checkpoint."""
        replace_file(self.root / pointer, f"{name}\n")

    def pointed(self, pointer: str) -> str | None:
        """The name in `latest` or `best`, if that can be read and names a checkpoint. Raises OSError as `names`."""
        before = ""
        while True:
            name = ""
            with suppress(OSError):
                name = self._text(pointer).strip()
            if name in self.names():
                return name
            if name == before:  # else a run that trains meanwhile may have moved the pointer and removed that one
                return None
            before = name

    def _text(self, file: str) -> str:
        """The text of `latest`, `best` or `pinned`; empty if there is none. Raises OSError if it cannot be read now."""
        path = self.root / file
        try:
            with name_in_errors(path):
                return read_text(path)
        except (FileNotFoundError, UnicodeDecodeError):
            return ""

    def not_saved(self, problem: str) -> RunDirectoryError:
        """Return the error to raise if a run ends without its last checkpoint, or without any."""
        kept = self.pointed("latest")
        what = "the last checkpoint could not" if kept else "no checkpoint could"
        begins = f"resumes from {kept}" if kept else "starts from the beginning"
        return RunDirectoryError(
            f"run.dir = {self.root.parent}: {what} be saved: {problem}; fix that and run the same "
            f"command, which {begins}"
        )

    def nothing_saved(self) -> RunDirectoryError:
        """Return the error to raise if a run without a checkpoint is asked for one."""
        return RunDirectoryError(f"{self.root}: no checkpoint; train the run first")

    def names(self) -> list[str]:
        """Names of the checkpoints here, newest first, complete or damaged. Raises OSError if they cannot be listed."""
        try:
            with os.scandir(self.root) as entries:
                own = (entry for entry in entries if CHECKPOINT_NAME.fullmatch(entry.name))
                return sorted((entry.name for entry in own if entry.is_dir()), reverse=True)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def beside(self, name: str) -> str:
        """Return what to add, for a person, to the name of a checkpoint that is not the newest; else an empty text."""
        with suppress(OSError):  # the rest of the line may be the result of hours
            newest = self.names()[:1]
            which = "the best one" if name == self.pointed("best") else "an earlier one"
            return f", {which} (the newest is {newest[0]})" if newest and newest[0] != name else ""
        return ""

    def state(self, name: str) -> dict[str, Any]:
        """A checkpoint's `state.json`."""
        state: dict[str, Any] = parse_json(read_text(self.root / name / STATE))
        return state

    def newest_step(self) -> int:
        """The step of the newest checkpoint, by its name; 0 when there is none."""
        return max(map(step_of, self.names()), default=0)

    def newest_bytes(self) -> int:
        """Return the bytes here of the newest checkpoint; 0 if there is none, or it has no optimizer states."""
        name = self.pointed("latest")
        if name is None or name == checkpoint_name(0):
            return 0
        try:
            files = read_manifest(self.root / name)
            return sum(files[file].bytes for file in self._to_check(self.root / name, files))
        except (OSError, ValueError):
            return 0

    def damage(self, name: str, progress: Progress = lambda done, total: None) -> str | None:
        """Return what is wrong with a checkpoint, in a few words; None if each file is as it was written, and true."""
        path = self.root / name
        damage = damage_of(path, progress)
        return self._falsehood(path) if damage is None and self._falsehood is not None else damage

    def newest_intact(self, progress: Progress = lambda done, total: None) -> str:
        """Return the name of the newest checkpoint that is not damaged, or an empty text; it is `verified` then."""
        names = self.names()
        self.verified = next((n for n in names if n == self.verified or self.damage(n, progress) is None), "")
        return self.verified

    def find(self, wanted: str) -> str:
        """Return the name of the checkpoint `wanted`: best, latest or a name; `best` falls back to `latest`.

        A run that trains meanwhile does not remove it as long as this store exists.

        Raises:
            RunDirectoryError: it is not there.
        """
        if not self.names():
            raise self.nothing_saved()
        name = self._find_held(wanted) if "/" not in wanted else None  # a path may be of another run
        if name is None:
            there = ", ".join([*POINTERS, *self.names()])
            raise RunDirectoryError(f"--checkpoint {wanted}: {self.root} has no such checkpoint; name one of {there}")
        return name

    def find_intact(self, wanted: str) -> str:
        """Return the name of the checkpoint `wanted`, as `find` does, if it is not damaged.

        If `best` or `latest` is damaged, a line says so and the newest intact one is taken.

        Raises:
            RunDirectoryError: it is not there, or damaged, and so are the others.
        """
        name = self.find(wanted)
        damage = self.damage(name)
        if damage is None:
            return name
        problem = f"checkpoint {self.root / name} cannot be used: {damage}"
        for other in self.names() if wanted in POINTERS else ():
            if other != name and self._hold(other) and self.damage(other) is None:
                print(f"note: {printable(problem)}; {other} is taken instead", file=sys.stderr)
                return other
        raise RunDirectoryError(f"{problem}; restore it from a copy, or choose another")

    def _find_held(self, wanted: str) -> str | None:
        """Return the name of a checkpoint that exists and stays. A run that trains meanwhile may move a pointer."""
        before = ""
        while True:
            name = self.pointed(wanted) if wanted in POINTERS else wanted
            if wanted == "best" and name is None:  # the run was killed before that, or keeps none
                best = self.best_by_state()
                name = best if best in self.names() else self.pointed("latest")
            if name is not None and self._hold(name):
                return name
            if name in (before, None):  # no pointer moves
                return name if name in self.names() else None
            before = name

    def _hold(self, name: str) -> bool:
        """Keep `retain` of another process from removing a checkpoint; return whether it is still there."""
        handle = hold(self.root / name)
        if handle is not None:
            self._held.append(handle)
        return handle is not None

    def best_by_state(self) -> str | None:
        """Return the best checkpoint by the newest one's state; None if that does not say. It may not be here."""
        for newest in self.names()[:1]:
            with suppress(OSError, ValueError, TypeError, KeyError):
                return checkpoint_name(self.state(newest)["best_step"])
        return None

    def pin(self, name: str) -> None:
        """Keep a checkpoint until it is removed by hand. Raises OSError if the disk does not take that."""
        replace_file(self.root / PINNED, "".join(f"{one}\n" for one in sorted({*self.pinned(), name})))
        self.on_change()

    def pinned(self) -> list[str]:
        """Return the names of the pinned checkpoints that exist. Raises OSError."""
        listed = self._text(PINNED).split()
        return [name for name in self.names() if name in listed]

    def retain(self, keep_last: int) -> list[str]:
        """Remove all but the newest `keep_last` checkpoints, those that `latest` and `best` name, and pinned ones.

        Returns one line for each that cannot be removed: an old checkpoint must never prevent a new one. It removes
        none while it cannot read which ones to keep.
        """
        try:
            kept = {name for file in (*POINTERS, PINNED) for name in self._text(file).split()}
            names = self.names()
        except OSError as error:
            why = error.strerror or error
            return [f"no old checkpoint is removed: {error.filename} cannot be read: {why}; the next save tries again"]
        last = [name for name in names if name not in self.passed_over][:keep_last]
        problems = []
        for name in names:
            if name in kept or name >= min(last, default=""):
                continue
            try:
                self._remove(name)
            except BlockingIOError:  # somebody is reading it; the next save tries again
                continue
            except OSError as error:
                problems.append(
                    f"old checkpoint {name} cannot be removed: {error.strerror or error}; remove it by hand"
                )
        return problems

    def _remove(self, name: str) -> None:
        """Remove a checkpoint. It loses its name first, while nobody can begin to read it.

        Raises:
            BlockingIOError: another process is reading it.
            OSError: it cannot be removed.
        """
        path, doomed = self.root / name, self.root / f"{_UNFINISHED}removed-{name}"
        with alone(path):
            path.rename(doomed)
        try:
            shutil.rmtree(doomed)
        except OSError:
            doomed.rename(path)
            raise

    def put_back(self) -> None:
        """Give a checkpoint its name again if a kill interrupted its replacement by a new one of the same step."""
        for path in self.root.glob(f"{_REPLACED}*"):
            final = self.root / path.name.removeprefix(_REPLACED)
            if not final.exists():
                path.rename(final)

    def discard_unfinished(self) -> list[str]:
        """Remove the remains of unfinished saves; returns a line for each one that cannot be removed."""
        self.put_back()
        problems = remove_leftovers(self.root)
        for path in self.root.glob(f"{_UNFINISHED}*"):
            try:
                shutil.rmtree(path)
            except OSError as error:
                why = error.strerror or error
                problems.append(f"{path} is left over and cannot be removed: {why}; remove it by hand")
        return problems


class NearStore(CheckpointStore):
    """The part of the newest checkpoints that the ranks of one node wrote, on a disk of this node.

    Every node has the whole manifest. Together the nodes have a checkpoint if each of its files is on one of them.

    Args:
        place: a directory of each node, such as /dev/shm.
        run: the run's directory.
        start: the name of the last start that saved here: those of earlier ones, or of other runs, do not count.
        nodes: the number of the run's nodes.

    Attributes:
        works: false after a save that failed; this start tries no other.
    """

    works = True

    def __init__(self, place: Path, run: Path, start: str, nodes: int = 1) -> None:
        digest = sha256(os.fsencode(run.resolve())).hexdigest()[:12]
        super().__init__(place / f"karat-{run.name}-{digest}-{this_node()}")
        self.start, self.nodes = start, nodes

    def open(self) -> None:
        """Make the directory, or empty it if it is another start's. Raises OSError, also if it is another user's."""
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.root.is_symlink() or self.root.stat().st_uid != os.getuid():
            raise PermissionError(errno.EPERM, "belongs to another user", str(self.root))
        file = self.root / "start"
        if not file.is_file() or read_text(file, 256) != self.start:
            self.empty()
        self.put_back()

    def empty(self) -> None:
        """Remove all checkpoints. Raises OSError."""
        self.remove()
        self.root.mkdir(mode=0o700)
        replace_file(self.root / "start", self.start)

    def remove(self) -> None:
        """Remove the directory."""
        shutil.rmtree(self.root, ignore_errors=True)

    def offers(self) -> dict[str, tuple[str, set[str]]]:
        """Return each checkpoint's manifest, and which of its files are here, by the checkpoint's name."""
        found = {}
        for name in self.names():
            with suppress(OSError, ValueError):
                text = read_text(self.root / name / MANIFEST)
                found[name] = text, {file for file in parse_manifest(text) if (self.root / name / file).is_file()}
        return found

    def _to_check(self, unfinished: Path, files: Mapping[str, Fingerprint]) -> Iterable[str]:
        return [file for file in files if (unfinished / file).exists()]
