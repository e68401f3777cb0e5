"""A run at a URL: the files of its directory that it needs elsewhere, its checkpoints, and whose it is.

URL/
  owner.json       the run's id and name, and which start of it writes here
  recipe.yaml ...  the files of COPIED in run_directory.py
  checkpoints/     see checkpoint/remote.py
"""

import json
import secrets
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from karat_scale.checkpoint.remote import OnBytes, RemoteCheckpoints
from karat_scale.errors import RunDirectoryError
from karat_scale.files import commit_file, name_in_errors, parse_json, read_text, replace_file
from karat_scale.run.run_directory import COPIED, FIXED
from karat_scale.stores import DEFAULT_TIMEOUT, MissingFileError, WritableStore
from karat_scale.temporaries import temporary_file

_OWNER, _ID = "owner.json", "run_id"
_OWNER_BYTES = 65536


@dataclass(frozen=True)
class Owner:
    """Who writes at a URL. `start` is another one for each start of the run."""

    run: str
    name: str
    start: str
    host: str
    time: float


class RunUrl:
    """Reads and writes a run at a URL. Each method that asks the store raises StoreError."""

    def __init__(self, url: str, timeout: float = DEFAULT_TIMEOUT) -> None:
        self._store = WritableStore(url, timeout)
        self.url = self._store.url
        self.checkpoints = RemoteCheckpoints(self._store)
        self._sent: dict[str, tuple[int, int]] = {}
        self._mine: Owner | None = None

    def owner(self) -> Owner | None:
        """Whose the files are; None where there is no run.

        Raises:
            RunDirectoryError: the file that says it is damaged.
        """
        try:
            content = parse_json(self._store.read_small(_OWNER, _OWNER_BYTES))
            return Owner(**{field.name: content[field.name] for field in fields(Owner)})
        except MissingFileError:
            return None
        except (ValueError, TypeError, KeyError):
            raise RunDirectoryError(f"{self._store.where(_OWNER)} is damaged; remove it, or use another URL") from None

    def take(self, run: str, name: str) -> None:
        """Be the one who writes here from now on: an earlier start of the run copies nothing more."""
        self._mine = Owner(run, name, secrets.token_hex(8), socket.gethostname(), round(time.time(), 3))
        self._store.write(_OWNER, (json.dumps(asdict(self._mine)) + "\n").encode())

    def check_mine(self) -> None:
        """Raise RunDirectoryError if another start writes here by now."""
        if (owner := self.owner()) != self._mine:
            who = f"run {owner.name} on {owner.host}" if owner else "nobody"
            raise RunDirectoryError(f"{self.url} belongs to another start by now: {who}")

    def upload_files(self, run: Path, on_bytes: OnBytes) -> None:
        """Copy what has changed of the run's own files since the last call. Raises OSError, too."""
        for name, path in _own_files(run):
            facts = path.stat()
            mark = facts.st_size, facts.st_mtime_ns
            if self._sent.get(name) == mark:
                continue
            if path.suffix != FIXED:
                data = path.read_bytes()  # of a log, whole lines
                self._store.write(name, data[: data.rfind(b"\n") + 1] if path.suffix == ".jsonl" else data)
            elif not self._has(name, facts.st_size):
                self._store.put(name, path, on_bytes)
            self._sent[name] = mark

    def download_files(self, run: Path, on_bytes: OnBytes) -> None:
        """Copy the run's own files to its directory, in place of those there. Raises OSError, too."""
        for name, facts in self._store.files().items():
            if not _is_own(name):
                continue
            path = run / name
            path.parent.mkdir(exist_ok=True)
            with name_in_errors(path), temporary_file(path) as temporary:
                with temporary.open("wb") as file:
                    for piece in self._store.pieces(name, facts.bytes):
                        on_bytes(file.write(piece))
                commit_file(temporary, path)

    def read_recipe(self, to: Path) -> bool:
        """Copy the recipe alone to a file; whether there is one."""
        try:
            data = self._store.read_small("recipe.yaml", 2**20)
        except MissingFileError:
            return False
        to.write_bytes(data)
        return True

    def _has(self, name: str, size: int) -> bool:
        try:
            return self._store.facts(name).bytes == size
        except MissingFileError:
            return False


def run_id(run: Path) -> str:
    """The id of the run in a directory; empty if it has none. Raises OSError."""
    try:
        return read_text(run / _ID, 256).strip()
    except FileNotFoundError:
        return ""


def keep_run_id(run: Path, name: str) -> None:
    """Let a directory be of the run with this id. Raises OSError."""
    if run_id(run) != name:
        replace_file(run / _ID, f"{name}\n")


def _own_files(run: Path) -> Iterator[tuple[str, Path]]:
    for pattern in COPIED:
        for path in sorted(run.glob(pattern)):
            if path.is_file() and _is_own(name := path.relative_to(run).as_posix()):
                yield name, path


def _is_own(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return ".." not in parts and any(
        name.count("/") == pattern.count("/") and not parts[-1].startswith(".") and fnmatchcase(name, pattern)
        for pattern in COPIED
    )
