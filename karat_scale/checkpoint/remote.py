"""Copies of a run's checkpoints in an object store, laid out as in its directory (store.py).

A copy exists if its manifest does: the manifest is written last, and removed first. One process at a time writes.
"""

import os
from collections.abc import Callable, Collection
from multiprocessing.pool import ThreadPool
from pathlib import Path

from karat_scale.checkpoint.store import CHECKPOINT_NAME, MANIFEST, PINNED, CheckpointStore, parse_manifest, step_of
from karat_scale.foundation.files import LARGEST_TEXT, Fingerprint, FingerprintedFile, name_in_errors, read_text
from karat_scale.foundation.stores import ChangedFileError, FileFacts, MissingFileError, WritableStore

_FOLDER = "checkpoints"
_THREADS = 4
OnBytes = Callable[[int], None]
"""A function that is called, in any thread, with the number of bytes just sent or received."""


class RemoteCheckpoints:
    """The folder `checkpoints` of a run at a URL, as the last `look` has found it."""

    def __init__(self, store: WritableStore) -> None:
        self._store = store
        self._files: dict[str, FileFacts] = {}
        self._manifests: dict[str, str] = {}
        self.damaged: set[str] = set()
        """The checkpoints that a download found damaged and that were not uploaded since."""

    def look(self) -> None:
        """List the files. Raises StoreError."""
        found = self._store.files()
        self._files = {name: facts for name, facts in found.items() if name.startswith(f"{_FOLDER}/")}

    def names(self) -> list[str]:
        """The names of the complete checkpoints, newest first."""
        return sorted((name for name in self._folders() if self._has(name, MANIFEST)), reverse=True)

    def pointed(self, pointer: str) -> str | None:
        """The checkpoint that `latest` or `best` names, if it is there. Raises StoreError."""
        name = self._text(pointer).strip()
        return name if name in self.names() else None

    def pinned(self) -> set[str]:
        """Return the names of the pinned checkpoints, which are kept. Raises StoreError."""
        return set(self._text(PINNED).split())

    def upload(self, local: CheckpointStore, name: str, on_bytes: OnBytes, before_commit: Callable[[], None]) -> None:
        """Copy a checkpoint from a run's directory, unless the same one is there.

        Args:
            before_commit: a function to call when only the manifest is missing; it may raise.

        Raises:
            StoreError: the store does not take it.
            OSError: the checkpoint is not there any more or was saved again, or a file is not as it was written.
        """
        directory = local.root / name
        text = read_text(directory / MANIFEST)
        files = parse_manifest(text)
        if name not in self.damaged and self.is_same(name, directory / MANIFEST):
            return
        for file, written in files.items():
            if (size := (directory / file).stat().st_size) != written.bytes:
                raise OSError(f"{file} of {name} has {size} bytes, not {written.bytes}")
        if self._has(name, MANIFEST):
            self._remove(name, [MANIFEST])
        for file in files:
            self._store.put(_path(name, file), directory / file, on_bytes)
        self.look()
        for file, written in files.items():
            if not self._has(name, file) or self._files[_path(name, file)].bytes != written.bytes:
                raise OSError(f"{self._store.where(_path(name, file))} is not as it was written")
        before_commit()
        if read_text(directory / MANIFEST) != text:
            raise OSError(f"{name} was saved again meanwhile")
        self._store.write(_path(name, MANIFEST), text.encode())
        self._manifests[name] = text
        self.damaged.discard(name)
        self.look()

    def is_same(self, name: str, manifest: Path) -> bool:
        """Return whether a checkpoint with this local manifest is there. Raises StoreError, or OSError without one."""
        try:
            return self._has(name, MANIFEST) and self._manifest(name) == read_text(manifest)
        except UnicodeDecodeError:
            return False

    def download(self, name: str, local: CheckpointStore, on_bytes: OnBytes) -> str | None:
        """Copy a checkpoint to a run's directory. It gets its name there when each file is as its manifest says.

        Returns:
            How it is damaged, if so; there is no copy then.

        Raises:
            StoreError: the store does not answer.
            OSError: the disk does not take it.
        """
        if (damage := self._download(name, local, on_bytes)) is not None:
            self.damaged.add(name)
        return damage

    def _download(self, name: str, local: CheckpointStore, on_bytes: OnBytes) -> str | None:
        try:
            text = self._manifest(name)
            files = parse_manifest(text)
        except ValueError:
            return f"{MANIFEST} is not readable"
        except MissingFileError:
            return f"{MANIFEST} is missing"
        unfinished = local.begin(step_of(name))
        with ThreadPool(_THREADS) as threads:
            jobs = ((_path(name, file), unfinished / file, written, on_bytes) for file, written in files.items())
            damage = next((found for found in threads.starmap(self._fetch, jobs) if found is not None), None)
        if damage is not None:
            local.discard_unfinished()
            return damage
        return local.adopt(unfinished, text)

    def point(self, pointer: str, names: Collection[str]) -> None:
        """Let `latest` or `best` name a checkpoint, or `pinned` several. Raises StoreError."""
        text = "".join(f"{name}\n" for name in sorted(names))
        if text and self._text(pointer) != text:
            self._store.write(_path(pointer), text.encode())
            self._files[_path(pointer)] = FileFacts(len(text), "")

    def retain(self, keep_last: int, damaged: Collection[str] = ()) -> None:
        """Remove all checkpoints but the newest, those that pointers name, and pinned ones. Raises StoreError.

        `damaged` are checkpoints that the run has skipped; they do not count.
        """
        intact = [name for name in self.names() if name not in damaged]
        kept = {*intact[:keep_last], self.pointed("latest"), self.pointed("best"), *self.pinned()}
        for name in sorted(self._folders() - kept):
            files = [path.rpartition("/")[2] for path in self._files if path.startswith(f"{_path(name)}/")]
            self._remove(name, sorted(files, key=lambda file: file != MANIFEST))

    def _folders(self) -> set[str]:
        return {part for path in self._files if CHECKPOINT_NAME.fullmatch(part := path.split("/")[1])}

    def _has(self, name: str, file: str) -> bool:
        return _path(name, file) in self._files

    def _manifest(self, name: str) -> str:
        """The text of a manifest; it is read once. Raises StoreError, ValueError."""
        if name not in self._manifests:
            self._manifests[name] = self._store.read_small(_path(name, MANIFEST), LARGEST_TEXT).decode()
        return self._manifests[name]

    def _text(self, pointer: str) -> str:
        if _path(pointer) not in self._files:
            return ""
        return self._store.read_small(_path(pointer), 4096).decode(errors="replace")

    def _remove(self, name: str, files: list[str]) -> None:
        self._manifests.pop(name, None)
        self._store.remove([_path(name, file) for file in files])
        for file in files:
            del self._files[_path(name, file)]

    def _fetch(self, path: str, to: Path, written: Fingerprint, on_bytes: OnBytes) -> str | None:
        """Fetch a file; return how it is damaged, if so."""
        with name_in_errors(to), to.open("wb") as file:
            fetched = FingerprintedFile(file, on_bytes)
            try:
                for piece in self._store.pieces(path, written.bytes):
                    fetched.write(piece)
            except (MissingFileError, ChangedFileError) as error:
                return str(error)
            file.flush()
            os.fsync(file.fileno())
        return None if fetched.fingerprint() == written else f"{to.name} has changed since it was written"


def _path(*parts: str) -> str:
    return "/".join((_FOLDER, *parts))
