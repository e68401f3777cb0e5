"""Tensors on disk: how they are written, how they are read, and how many bytes a checkpoint of them takes.

What is written is flushed to the disk. What is read is data, never code. The size is known before anything is written.
"""

import copy
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from karat_scale.engine.deepspeed_internals import checkpoint_globals
from karat_scale.engine.engine import PRECISIONS
from karat_scale.foundation.errors import RunDirectoryError, one_line
from karat_scale.foundation.files import (
    Fingerprint,
    FingerprintedFile,
    commit_file,
    open_regular,
    open_to_read,
    temporary_file,
)
from karat_scale.recipe import RunRecipe


def save_tensors(value: Any, path: Path, on_bytes: Callable[[int], None] | None = None) -> Fingerprint:
    """Write tensors and plain data, and wait until they are on disk.

    Raises:
        OSError: they could not be written. torch's RuntimeError about it is turned into one.
    """
    with path.open("wb") as file:
        fingerprinted = FingerprintedFile(file, on_bytes)
        try:
            torch.save(value, fingerprinted)  # type: ignore[arg-type]  # it asks for `write` and `flush` alone
        except RuntimeError as error:
            raise as_os_error(error) from error
        file.flush()
        os.fsync(file.fileno())
    return fingerprinted.fingerprint()


def save_safetensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write whole tensors to one file that appears whole or not at all. No two may share memory.

    Raises:
        OSError: it could not be written.
    """
    with temporary_file(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:
            raise as_os_error(error) from error
        commit_file(temporary, path)


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file; empty if there is none. Raises SafetensorError and OSError."""
    os.close(open_regular(path))  # safetensors would wait at a pipe
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def load_tensors(path: Path, map_location: Any = "cpu", mmap: bool = False) -> Any:
    """Read what `save_tensors` wrote, with `mmap` each tensor when it is used.

    Raises:
        RunDirectoryError: it holds more than tensors and plain data, so that reading it would run code, or it is not
            as `save_tensors` writes it.
        OSError: it cannot be read.
    """
    with open_to_read(path) as file:
        if file.read(2) != b"PK":
            raise RunDirectoryError(f"{path}: not a file of tensors")
    with torch.serialization.safe_globals(checkpoint_globals()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's of a TorchScript program
        try:
            return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
        except (OSError, MemoryError):
            raise
        except pickle.UnpicklingError:
            raise RunDirectoryError(f"{path}: holds more than tensors and plain data; it is not read") from None
        except Exception as error:  # the many of a file that is not what it says
            raise RunDirectoryError(f"{path}: not a whole file of tensors: {one_line(error)[:200]}") from None


def host_copy(value: Any) -> Any:
    """A copy of tensors and plain data in host memory. Tensors that are one memory are one in the copy, too.

    Copies of a GPU's tensors are only begun, one behind the other, into page-locked memory: wait for the device before
    they are read. torch keeps that memory for the next copies of these sizes.
    """
    copies: dict[tuple[Any, ...], torch.Tensor] = {}

    def copied(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            place = (item.data_ptr(), item.dtype, item.shape, item.stride(), item.device)
            if place not in copies or not item.numel():
                copies[place] = torch.empty_like(item, device="cpu", pin_memory=item.is_cuda, requires_grad=False)
                copies[place].copy_(item.detach(), non_blocking=True)
            return copies[place]
        if isinstance(item, dict):
            twin = copy.copy(item)  # of the same class, with what DeepSpeed and torch hang on it
            twin.update({key: copied(part) for key, part in item.items()})
            return twin
        if type(item) in (list, tuple):
            return type(item)(copied(part) for part in item)
        return copy.deepcopy(item)

    return copied(value)


class DurableStorage:
    """In place of DeepSpeed's `CheckpointEngine`: it only collects checkpoint files, and `write` puts them on the disk.

    So nothing that a disk does can raise inside DeepSpeed's collective save, where the other ranks would wait for this
    one for ever. What still fails there is kept in `error`, and the caller lets all ranks agree on the outcome.
    """

    def __init__(self) -> None:
        self.name = "durable"
        self.error: OSError | None = None
        self.written = 0
        """Bytes that the file system has taken so far: they tell a slow disk from one that hangs."""
        self._copies = False
        self._files: list[tuple[Any, Path]] = []

    def begin(self, copies: bool) -> None:
        """Forget the last save. With `copies` the files may be written while training changes the tensors."""
        self.error = None
        self._files.clear()
        self._copies = copies

    def write(self) -> dict[Path, Fingerprint]:
        """Write the collected files and flush them to the disk, and let go of each one after it.

        Raises:
            OSError: one could not be written.
        """
        written = {}
        while self._files:
            value, path = self._files.pop(0)
            written[path] = save_tensors(value, path, self._count)
        return written

    def _count(self, size: int) -> None:
        self.written += size

    def create(self, info: Any) -> None:
        """DeepSpeed announces a save; `begin` did so already."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Create a directory of the checkpoint."""
        try:
            Path(path).mkdir(parents=True, exist_ok=exist_ok)
        except OSError as error:
            self.error = self.error or error

    def save(self, state_dict: Any, path: str) -> None:
        """Take in one file."""
        try:
            self._files.append((host_copy(state_dict) if self._copies else state_dict, Path(path)))
        except (MemoryError, RuntimeError) as error:
            self.error = self.error or as_os_error(error)

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read one file of DeepSpeed's."""
        return load_tensors(Path(path), map_location)

    def commit(self, info: Any) -> bool:
        """DeepSpeed has handed over its files; ours follow, so there is nothing to commit yet."""
        return True

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        """Which of the ranks that hold the same writes it."""
        return dp_rank == 0

    def is_decoupled(self) -> bool:
        """Whether DeepSpeed has to commit at a later step."""
        return False

    def preserves_storage_sharing(self) -> bool:
        """Whether tensors that are one memory are written as one."""
        return True


def describe(error: OSError) -> str:
    """An OSError in words a user can act on."""
    where = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror or error}{where}"


def as_os_error(error: Exception) -> OSError:
    """The OSError behind a failed write, or one that says the same."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause if isinstance(cause, OSError) else OSError(one_line(error))


def checkpoint_bytes(parameters: int, stage: int, has_ema: bool, weight_bytes: int) -> int:
    """Return the bytes of a checkpoint of a model with so many parameters, with all that AdamW keeps.

    stage: of ZeRO. weight_bytes: of a parameter in the module. From stage 1 on the fp32 weights are apart from these.
    """
    fp32_tensors = 3 + has_ema  # weights, two moments, averages
    return parameters * (4 * fp32_tensors + (weight_bytes if stage else 0))


def planned_bytes(recipe: RunRecipe, stage: int, parameters: int) -> int:
    """Return the bytes of a checkpoint of a run of this recipe."""
    weights = PRECISIONS[recipe.train.precision].weights
    return checkpoint_bytes(parameters, stage, recipe.train.ema_decay > 0, weights.itemsize)
