"""What a checkpoint must hold: `manifest.json` lists every other file with its size and SHA-256."""

import json
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from karat_scale.files import Fingerprint, file_sha256, parse_json, read_text
from karat_scale.machine import usable_cores

MANIFEST = "manifest.json"
STATE = "state.json"
_HASHING_THREADS = 8
Progress = Callable[[int, int], None]
"""Hears how many bytes are done, and of how many."""


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
    """The files that the manifest of a checkpoint lists. Raises OSError, and ValueError as `parse_manifest`."""
    return parse_manifest(read_text(checkpoint / MANIFEST))


def damage_of(checkpoint: Path, progress: Progress | None = None) -> str | None:
    """What is wrong with the files of a checkpoint, in a few words; None if each one is as it was written.

    Files are hashed side by side.
    """
    try:
        files = read_manifest(checkpoint)
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError):
        return f"{MANIFEST} is not readable"
    total = sum(file.bytes for file in files.values())
    count = _counter(total, progress)
    with ThreadPoolExecutor(min(_HASHING_THREADS, usable_cores())) as threads:
        found = list(threads.map(lambda name: _damage(checkpoint / name, files[name], count), files))
    if progress is not None:
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
        return f"{path.name} cannot be read: {error.strerror}"
    return None


def _counter(total: int, progress: Progress | None) -> Callable[[int], None]:
    """Adds up the sizes that threads report."""
    lock, done = threading.Lock(), 0

    def count(size: int) -> None:
        nonlocal done
        if progress is not None:
            with lock:
                done += size
                progress(done, total)

    return count
