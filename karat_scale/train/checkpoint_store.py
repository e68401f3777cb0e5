"""The files of a run's checkpoints. Knows directories and hashes, nothing of DeepSpeed.

checkpoints/
  step-00001200/        complete: it has this name only after everything in it is on disk
    ...                 DeepSpeed's files and one sidecar per rank
    state.json          where training stood
    manifest.json       every other file with its size and SHA-256, written last
  .saving-step-00001300/   a save under way, or one that a crash cut off; never read
  latest, best          a checkpoint's name, replaced atomically
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from karat_scale.errors import RunDirectoryError
from karat_scale.files import file_sha256, flush_to_disk, write_atomically

MANIFEST = "manifest.json"
STATE = "state.json"
_UNFINISHED = ".saving-"


def checkpoint_name(step: int) -> str:
    """The directory's name of the checkpoint after `step` finished steps."""
    return f"step-{step:08d}"


class CheckpointStore:
    """The `checkpoints` directory of one run; rank 0 alone changes it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def begin(self, step: int) -> Path:
        """An empty directory to write the files of a new checkpoint into."""
        self.discard_unfinished()
        path = self.root / f"{_UNFINISHED}{checkpoint_name(step)}"
        path.mkdir(parents=True)
        return path

    def commit(self, unfinished: Path, state: dict[str, Any]) -> str:
        """Give a written checkpoint its manifest and its name, and point `latest` at it."""
        write_atomically(unfinished / STATE, json.dumps(state, indent=2) + "\n")
        files = {
            path.relative_to(unfinished).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
            for path in sorted(unfinished.rglob("*"))
            if path.is_file()
        }
        write_atomically(unfinished / MANIFEST, json.dumps({"format": 1, "files": files}, indent=2) + "\n")
        name = unfinished.name.removeprefix(_UNFINISHED)
        final = self.root / name
        if final.exists():  # the same step again, say after a damaged save: the new one takes its place
            shutil.rmtree(final)
        unfinished.rename(final)
        flush_to_disk(self.root)
        self.point("latest", name)
        return name

    def point(self, pointer: str, name: str) -> None:
        """Let `latest` or `best` name a checkpoint."""
        write_atomically(self.root / pointer, f"{name}\n")

    def pointed(self, pointer: str) -> str | None:
        """The name in `latest` or `best`, if the file is there and names an existing checkpoint."""
        path = self.root / pointer
        name = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
        return name if name and (self.root / name).is_dir() else None

    def names(self) -> list[str]:
        """Names of the checkpoints here, newest first, complete or damaged."""
        return sorted((path.name for path in self.root.glob("step-*") if path.is_dir()), reverse=True)

    def state(self, name: str) -> dict[str, Any]:
        """A checkpoint's `state.json`."""
        state: dict[str, Any] = json.loads((self.root / name / STATE).read_text(encoding="utf-8"))
        return state

    def damage(self, name: str) -> str | None:
        """What is wrong with a checkpoint's files, in a few words; None if each one is as it was written."""
        return next(self._damages(self.root / name), None)

    def find_intact(self, wanted: str) -> str:
        """The name of the checkpoint `wanted`: best, latest or a name; `best` falls back on `latest`.

        Raises:
            RunDirectoryError: it is not there, or damaged.
        """
        name = self.pointed(wanted) if wanted in ("best", "latest") else wanted
        if wanted == "best" and name is None:
            name = self.pointed("latest")
        if name is None or not (self.root / name).is_dir():
            there = ", ".join(self.names()) or "none"
            raise RunDirectoryError(f"{self.root}: no checkpoint {wanted!r}; there are: {there}")
        damage = self.damage(name)
        if damage:
            raise RunDirectoryError(f"checkpoint {self.root / name} is damaged: {damage}; choose another")
        return name

    def retain(self, keep_last: int) -> None:
        """Remove all but the newest `keep_last` checkpoints and those that `latest` and `best` name."""
        kept = {*self.names()[:keep_last], self.pointed("latest"), self.pointed("best")}
        for name in self.names():
            if name not in kept:
                shutil.rmtree(self.root / name)

    def discard_unfinished(self) -> None:
        """Remove what saves that never finished left behind."""
        for path in self.root.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(path, ignore_errors=True)

    @staticmethod
    def _damages(path: Path) -> Iterator[str]:
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            files = [(name, int(file["bytes"]), str(file["sha256"])) for name, file in manifest["files"].items()]
        except FileNotFoundError:
            yield f"{MANIFEST} is missing"
            return
        except (ValueError, KeyError, TypeError, AttributeError):
            yield f"{MANIFEST} is not readable"
            return
        for name, size, sha256 in files:
            file = path / name
            if not file.is_file():
                yield f"{name} is missing"
            elif file.stat().st_size != size:
                yield f"{name} has {file.stat().st_size} bytes, not {size}"
            elif file_sha256(file) != sha256:
                yield f"{name} has changed since it was written"
