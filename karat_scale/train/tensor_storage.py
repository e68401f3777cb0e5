"""How tensors reach the disk and come back: flushed to it, and read as data, never as code."""

import os
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine

from karat_scale.train.ds_internals import checkpoint_globals


def save_tensors(value: Any, path: Path) -> None:
    """Write tensors and plain data, and wait until they are on disk."""
    with path.open("wb") as file:
        torch.save(value, file)
        file.flush()
        os.fsync(file.fileno())


def load_tensors(path: Path, map_location: Any = "cpu", mmap: bool = False) -> Any:
    """Read what `save_tensors` wrote, with `mmap` each tensor when it is used.

    A file that would run code is refused with torch's UnpicklingError.
    """
    with torch.serialization.safe_globals(checkpoint_globals()):
        return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)


class DurableStorage(CheckpointEngine):
    """DeepSpeed's writer of checkpoint files, made durable.

    A rank that cannot write must not raise inside DeepSpeed's collective save, where its peers would wait
    for it for ever: the error is kept in `error`, and the caller lets all ranks agree on the outcome.
    """

    def __init__(self) -> None:
        super().__init__()
        self.name = "durable"
        self.error: OSError | None = None

    def create(self, info: CheckpointCommitInfo) -> None:
        """DeepSpeed announces a save; forget the last one's error."""
        self.error = None

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Create a directory of the checkpoint."""
        Path(path).mkdir(parents=True, exist_ok=exist_ok)

    def save(self, state_dict: Any, path: str) -> None:
        """Write one file of DeepSpeed's."""
        if self.error is None:
            try:
                save_tensors(state_dict, Path(path))
            except (OSError, RuntimeError) as error:  # torch wraps a failed write in RuntimeError
                self.error = as_os_error(error)

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read one file of DeepSpeed's."""
        return load_tensors(Path(path), map_location)

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """DeepSpeed's files are written; ours follow, so there is nothing to commit yet."""
        return True


def as_os_error(error: Exception) -> OSError:
    """The OSError behind a failed write."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause if isinstance(cause, OSError) else OSError(str(error).splitlines()[0])
