"""Tensors on disk: how they are written, how they are read, and how many bytes a checkpoint of them takes.

Written files are flushed to the disk. Only data is read, never code. The size is known before anything is written.
During training, a separate process writes a copy of the state from shared memory.
"""

import io
import itertools
import mmap
import os
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from karat_scale.data.loading.workers import kill_workers, start_worker
from karat_scale.engine.deepspeed_internals import checkpoint_globals
from karat_scale.engine.engine import PRECISIONS
from karat_scale.foundation.errors import RunDirectoryError, causes, one_line
from karat_scale.foundation.files import (
    Fingerprint,
    FingerprintedFile,
    commit_file,
    open_regular,
    open_to_read,
    temporary_folder,
)
from karat_scale.recipe import RunRecipe


def save_tensors(value: Any, path: Path, on_bytes: Callable[[int], object] = lambda size: None) -> Fingerprint:
    """Write tensors and plain data, and wait until they are on disk.

    Raises:
        OSError: they could not be written. torch's RuntimeError about it is turned into one.
    """
    with path.open("wb") as file:
        fingerprinted = FingerprintedFile(file, on_bytes)
        try:
            torch.save(value, fingerprinted)  # type: ignore[arg-type]  # it asks only for `write` and `flush`
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
    # In a folder: safetensors has its own temporary file, which a kill leaves behind, and loses the lock of ours.
    with temporary_folder(path) as folder:
        try:
            save_file(tensors, folder / path.name, metadata)
        except SafetensorError as error:
            raise as_os_error(error) from error
        commit_file(folder / path.name, path)


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file; empty if there is none. Raises SafetensorError and OSError."""
    os.close(open_regular(path))  # safetensors would wait at a pipe
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def load_tensors(path: Path, mmap: bool = False) -> Any:
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
        warnings.simplefilter("ignore")  # torch's warning of a TorchScript program
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except (OSError, MemoryError):
            raise
        except pickle.UnpicklingError:
            raise RunDirectoryError(f"{path}: holds more than tensors and plain data; it is not read") from None
        except Exception as error:  # one of the many errors of a file that is not what it says
            if "Cannot allocate memory" in str(error):  # for mmap
                raise MemoryError(f"{path}: {one_line(error)[:200]}") from None
            raise RunDirectoryError(f"{path}: not a whole file of tensors: {one_line(error)[:200]}") from None


_BLOCK_BYTES, _ALIGNED = 128 << 20, 64
Place = tuple[int, int, torch.dtype, tuple[int, ...], tuple[int, ...]]
"""The place of a tensor in kept memory: the number of its block, its first byte there, dtype, size and strides."""
_numbers = itertools.count()
_released: list[int] = []
"""The blocks that the writer need not keep any more."""


class Block(NamedTuple):
    """A file in memory, and its bytes."""

    number: int
    descriptor: int
    bytes: torch.Tensor
    is_locked: bool


class KeptMemory:
    """Host memory for the copy of a state. It is kept from save to save, page-locked for a GPU, and the writer sees it.

    It grows by blocks, each of which is a file in memory. Only their used part takes memory. If CUDA does not lock one,
    `warn` is told once, and copies to it and to later ones are slower.
    """

    def __init__(self, warn: Callable[[str], object] = lambda text: None) -> None:
        self.blocks: list[Block] = []
        self._block = self._end = 0
        self._warn, self._locks = warn, True
        weakref.finalize(self, _release, self.blocks).atexit = False

    def begin(self) -> None:
        """Begin again: nothing in it is needed any more."""
        self._block = self._end = 0

    def copy(self, tensor: torch.Tensor) -> Place:
        """Copy a tensor, or only begin that if a GPU has it; returns its place. Raises OSError."""
        stride = torch.empty_like(tensor, device="meta").stride()
        size = tensor.numel() * tensor.element_size()
        while self._block < len(self.blocks) and self._end + size > self.blocks[self._block].bytes.numel():
            self._block, self._end = self._block + 1, 0
        if self._block == len(self.blocks):
            # The blocks grow with what there is: each takes a descriptor.
            self._add(max(size, _BLOCK_BYTES, sum(block.bytes.numel() for block in self.blocks) // 4))
        block, start = self.blocks[self._block], self._end
        self._end = -(-(start + size) // _ALIGNED) * _ALIGNED
        flat = block.bytes[start : start + size].view(tensor.dtype)
        flat.as_strided(tensor.shape, stride).copy_(tensor.detach(), non_blocking=True)
        return block.number, start, tensor.dtype, tuple(tensor.shape), stride

    def _add(self, size: int) -> None:
        descriptor = os.memfd_create("karat-save")
        try:
            os.ftruncate(descriptor, size)
            content = torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)
            is_locked = torch.cuda.is_initialized() and self._locks and self._lock(content)
        except BaseException:
            os.close(descriptor)
            raise
        self.blocks.append(Block(next(_numbers), descriptor, content, is_locked))

    def _lock(self, content: torch.Tensor) -> bool:
        runtime = torch.cuda.cudart()
        code = runtime.cudaHostRegister(content.data_ptr(), content.numel(), 0)
        self._locks = code == runtime.cudaError.success
        if not self._locks:
            with suppress(RuntimeError):  # CUDA keeps the error, and the next kernel raises it: let that be this one
                torch.zeros(1, device="cuda")
            why = runtime.cudaGetErrorString(code)
            self._warn(f"copies of checkpoints are not page-locked (CUDA: {why}), so saves stop training for longer")
        return self._locks


def _release(blocks: list[Block]) -> None:
    for block in blocks:
        if block.is_locked:
            torch.cuda.cudart().cudaHostUnregister(block.bytes.data_ptr())
        os.close(block.descriptor)
        _released.append(block.number)


class _Copier(pickle.Pickler):
    """Pickles a state with its tensors in kept memory. The same tensor is copied only once."""

    def __init__(self, file: io.BytesIO, memory: KeptMemory) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._memory = memory
        self._copied: dict[tuple[Any, ...], tuple[torch.Tensor, Place]] = {}

    def persistent_id(self, item: Any) -> Place | None:
        if not isinstance(item, torch.Tensor) or not item.numel():
            return None
        source = (item.data_ptr(), item.dtype, item.shape, item.stride(), item.device)
        if source not in self._copied:
            # Keep the tensor, so that no other one gets its address meanwhile.
            self._copied[source] = item, self._memory.copy(item)
        return self._copied[source][1]

    def reducer_override(self, item: Any) -> Any:
        """Make an empty GPU tensor a CPU one: the writer has no GPU, and at ZeRO stage 3 a module's are empty."""
        if isinstance(item, torch.Tensor) and item.device.type != "cpu":
            item = torch.empty_strided(item.shape, item.stride(), dtype=item.dtype)
            return item.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        return NotImplemented


class _Reader(pickle.Unpickler):
    """Reads what `_Copier` made: a state whose tensors lie in the blocks."""

    def __init__(self, file: io.BytesIO, blocks: Mapping[int, Any]) -> None:
        super().__init__(file)
        self._blocks = blocks
        self._made: dict[Place, torch.Tensor] = {}

    def persistent_load(self, place: Place) -> torch.Tensor:
        if place not in self._made:
            block, start, dtype, size, stride = place
            # Its storage is no larger than it is, so torch writes no more.
            flat = torch.frombuffer(self._blocks[block], dtype=dtype, count=torch.Size(size).numel(), offset=start)
            self._made[place] = flat.as_strided(size, stride)
        return self._made[place]


# The writer reports its progress each time it has written this many bytes.
_TOLD_BYTES = 32 << 20


class WriterEndedError(OSError):
    """The process that writes checkpoints has ended, for example for lack of memory."""


class Writer:
    """A process besides training that writes files of tensors from kept memory, with lower priority on shared cores.

    Raises:
        OSError: there can be no more processes.
    """

    def __init__(self) -> None:
        self._line, theirs = Pipe()
        self._known: set[int] = set()
        self._busy, self._owner = threading.Lock(), os.getpid()
        processes: list[ForkProcess] = []
        self._end = weakref.finalize(self, kill_workers, processes, os.getpid())
        with theirs:
            processes.append(start_worker(0, _write_for, theirs))
        self._process = processes[0]

    @property
    def is_there(self) -> bool:
        """Return whether this process has started the writer, and the writer has not ended."""
        return self._owner == os.getpid() and self._process.is_alive()

    def write(self, path: Path, content: bytes, memory: KeptMemory, on_bytes: Callable[[int], None]) -> Fingerprint:
        """Write what `_Copier` made of a state, and wait until it is on disk. Raises OSError, WriterEndedError."""
        with self._busy:
            try:
                while _released:
                    self._line.send(("release", _released.pop()))
                for block in [block for block in memory.blocks if block.number not in self._known]:
                    self._line.send(("block", (block.number, block.bytes.numel())))
                    send_handle(self._line, block.descriptor, self._process.pid)
                    self._known.add(block.number)
                self._line.send(("file", path))
                self._line.send_bytes(content)
                while isinstance(answer := self._line.recv(), int):
                    on_bytes(answer)
            except (EOFError, ConnectionError):
                self._end()  # it may not be quite gone
                raise WriterEndedError("the process that writes checkpoints has ended") from None
        if isinstance(answer, OSError):
            raise answer
        written: Fingerprint = answer
        return written


def _write_for(line: Connection) -> None:
    os.nice(10)
    blocks: dict[int, mmap.mmap] = {}
    while True:
        kind, what = line.recv()
        if kind == "release":
            blocks.pop(what, None)
        elif kind == "block":
            number, size = what
            descriptor = recv_handle(line)
            blocks[number] = mmap.mmap(descriptor, size)
            os.close(descriptor)
        else:
            line.send(_write(line, what, line.recv_bytes(), blocks))


def _write(line: Connection, path: Path, content: bytes, blocks: dict[int, mmap.mmap]) -> Fingerprint | OSError:
    waiting = 0

    def tell(size: int) -> None:
        nonlocal waiting
        waiting += size
        if waiting >= _TOLD_BYTES:
            line.send(waiting)
            waiting = 0

    try:
        return save_tensors(_Reader(io.BytesIO(content), blocks).load(), path, tell)
    except Exception as error:
        return as_os_error(error)


_writer: Writer | None = None
"""The writer of this process."""


def start_writer() -> Writer:
    """Return this process's writer, which is started if need be: the earlier, the less memory the two share.

    Raises:
        OSError: there can be no more processes.
    """
    global _writer
    if _writer is None or not _writer.is_there:
        _writer = Writer()
    return _writer


class DurableStorage:
    """Replaces DeepSpeed's `CheckpointEngine`: it only collects checkpoint files, and `write` puts them on the disk.

    So no disk error is raised inside DeepSpeed's collective save, where the other ranks would wait for this one
    forever. What still fails there is kept in `error`, and the caller lets all ranks agree on the outcome.
    """

    def __init__(self, warn: Callable[[str], object] = lambda text: None) -> None:
        self.name = "durable"
        self.error: OSError | None = None
        self.written = 0
        """The number of bytes that the file system has taken so far: it tells a slow disk from one that hangs."""
        self._copies = False
        self._files: list[tuple[Any, Path]] = []
        self._memory = KeptMemory(warn)
        self._writer: Writer | None = None

    def begin(self, copies: bool) -> None:
        """Forget the last save. With `copies` the files may be written while training changes the tensors."""
        self.error = None
        self._files.clear()
        self._memory.begin()
        self._copies = copies
        if copies:
            try:
                self._writer = start_writer()
            except OSError as error:
                self.error = error

    def write(self) -> dict[Path, Fingerprint]:
        """Write the collected files and flush them to the disk; free the memory of each one afterwards.

        Raises:
            OSError: one could not be written.
        """
        written = {}
        while self._files:
            value, path = self._files.pop(0)
            if self._copies and self._writer is not None:
                try:
                    written[path] = self._writer.write(path, value, self._memory, self._count)
                    continue
                except WriterEndedError:  # the copy is still here
                    blocks = {block.number: block.bytes.numpy() for block in self._memory.blocks}
                    value = _Reader(io.BytesIO(value), blocks).load()
            written[path] = save_tensors(value, path, self._count)
        return written

    def _count(self, size: int) -> None:
        self.written += size

    def create(self, info: Any) -> None:
        """Do nothing: DeepSpeed announces a save, which `begin` did already."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Create a directory of the checkpoint."""
        try:
            Path(path).mkdir(parents=True, exist_ok=exist_ok)
        except OSError as error:
            self.error = self.error or error

    def save(self, state_dict: Any, path: str) -> None:
        """Take in one file."""
        if not self._copies:
            self._files.append((state_dict, Path(path)))
            return
        content = io.BytesIO()
        try:
            _Copier(content, self._memory).dump(state_dict)
        except (MemoryError, RuntimeError, OSError) as error:
            self.error = self.error or as_os_error(error)
        self._files.append((content.getvalue(), Path(path)))

    def commit(self, info: Any) -> bool:
        """Do nothing: DeepSpeed has handed over its files; ours follow, so there is nothing to commit yet."""
        return True

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        """Return whether this rank, of those that hold the same data, writes it."""
        return dp_rank == 0

    def is_decoupled(self) -> bool:
        """Return whether DeepSpeed has to commit at a later step."""
        return False

    def preserves_storage_sharing(self) -> bool:
        """Return whether tensors that share memory are written once."""
        return True


def describe(error: OSError) -> str:
    """An OSError in words a user can act on."""
    where = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror or error}{where}"


def as_os_error(error: Exception) -> OSError:
    """Return the OSError behind a failed write, or a new one with the same message."""
    return next((cause for cause in causes(error) if isinstance(cause, OSError)), OSError(one_line(error)))


def planned_bytes(recipe: RunRecipe, stage: int, parameters: int, frozen: int) -> int:
    """Return the bytes of a checkpoint of a run of this recipe, with all that AdamW keeps.

    From ZeRO stage 1 on, the fp32 weights are separate from the module's. `parameters` and `frozen` are the numbers of
    trainable and frozen weights. DeepSpeed saves the frozen ones as they are, and rank 0 saves them in fp32.
    """
    size = PRECISIONS[recipe.train.precision].weights.itemsize
    fp32_tensors = 3 + (recipe.train.ema_decay > 0)  # weights, two moments, averages
    return parameters * (4 * fp32_tensors + (size if stage else 0)) + (size + 4) * frozen
