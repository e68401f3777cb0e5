import enum
import mmap
import os
import signal
from collections import OrderedDict
from pathlib import Path

import psutil
import pytest
import torch

from karat_scale.checkpoint import tensor_storage
from karat_scale.checkpoint.tensor_storage import (
    DurableStorage,
    load_tensors,
    read_metadata,
    save_safetensors,
    save_tensors,
)
from karat_scale.foundation.files import commit_file, file_sha256, remove_leftovers
from tests.conftest import forked


def test_tensors_survive_the_round_trip(tmp_path) -> None:
    value = {"ema": [torch.arange(5.0)], "rng": torch.get_rng_state(), "none": None}
    written = save_tensors(value, tmp_path / "t.pt")
    assert written == ((tmp_path / "t.pt").stat().st_size, file_sha256(tmp_path / "t.pt"))
    again = load_tensors(tmp_path / "t.pt")
    assert torch.equal(again["ema"][0], value["ema"][0])
    assert again["none"] is None


def test_a_copy_keeps_what_was_there_and_what_belongs_together(tmp_path) -> None:
    storage = DurableStorage()
    for start, size in ((0.0, 6), (10.0, 40_000_000)):  # the second one needs more of the kept memory
        weight = torch.arange(start, start + size)
        state = OrderedDict(a=weight, b=weight, part=weight[2:4], nested={"list": [weight[2:4], (1, "x")]})
        state |= {"columns": weight[:6].view(2, 3).t(), "empty": torch.empty(0, 3), "flags": weight[:3] > 1}
        state["elsewhere"] = torch.empty(0, dtype=torch.bfloat16, device="meta")  # as of a GPU at ZeRO stage 3
        state._metadata = {"version": 1}  # type: ignore[attr-defined]  # as torch's state_dict has it
        storage.begin(copies=True)
        storage.save(state, str(tmp_path / "t.pt"))
        weight.zero_()
        (written,) = storage.write().values()
        assert 0 <= written.bytes - storage.written < 64e6  # told in pieces
        twin = load_tensors(tmp_path / "t.pt")
        assert type(twin) is OrderedDict
        assert twin._metadata == {"version": 1}
        assert twin["a"].data_ptr() == twin["b"].data_ptr()
        assert torch.equal(twin["a"], torch.arange(start, start + size))
        assert twin["part"].data_ptr() == twin["nested"]["list"][0].data_ptr()
        assert twin["part"].untyped_storage().nbytes() == 2 * 4  # a view's copy is no larger than the view
        assert twin["nested"]["list"][1] == (1, "x")
        assert torch.equal(twin["columns"], torch.arange(start, start + 6).view(2, 3).t())
        assert twin["columns"].stride() == (1, 3)
        assert twin["empty"].shape == (0, 3)
        assert (twin["elsewhere"].shape, twin["elsewhere"].dtype) == ((0,), torch.bfloat16)
        assert twin["elsewhere"].device.type == "cpu"
        assert twin["flags"].tolist() == [start + number > 1 for number in range(3)]


def test_memory_that_there_is_not_takes_no_descriptor() -> None:
    before = psutil.Process().num_fds()
    with pytest.raises(OSError, match="memory"):
        tensor_storage.KeptMemory()._add(2**50)
    assert psutil.Process().num_fds() == before


class CudaError(enum.Enum):
    success = 0
    memory_allocation = 2


class Runtime:
    """A stand-in for what `torch.cuda.cudart()` returns. It refuses to lock memory from call `refused` on.

    As in CUDA, an error stays until the next kernel, here `torch.zeros`, raises it.
    """

    cudaError = CudaError

    def __init__(self, refused: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[int, int]] = []
        self.locked: list[int] = []
        self._refused, self.pending = refused, False
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self)
        monkeypatch.setattr(torch, "zeros", self._zeros)

    def cudaHostRegister(self, ptr: int, size: int, flags: int) -> CudaError:  # noqa: N802
        assert (len(mapped(ptr)), flags) == (1, 0)
        self.asked.append((ptr, size))
        if len(self.asked) > self._refused:
            self.pending = True
            return CudaError.memory_allocation
        self.locked.append(ptr)
        return CudaError.success

    def cudaHostUnregister(self, ptr: int) -> CudaError:  # noqa: N802
        assert mapped(ptr)
        self.locked.remove(ptr)
        return CudaError.success

    def cudaGetErrorString(self, error: CudaError) -> str:  # noqa: N802
        return {CudaError.memory_allocation: "out of memory"}[error]

    def _zeros(self, size: int, device: str) -> None:
        assert (size, device) == (1, "cuda")
        if self.pending:
            self.pending = False
            raise RuntimeError("CUDA error: out of memory")


def mapped(start: int) -> list[int]:
    """Return the sizes of this process's mappings of kept memory that begin at an address: one or none."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:karat-save" in line]
    ranges = [[int(bound, 16) for bound in line[0].split("-")] for line in lines]
    return [end - begin for begin, end in ranges if begin == start]


@pytest.mark.parametrize("refused", [3, 1, 0])
def test_kept_memory_is_page_locked_while_it_is_mapped_and_copies_do_without_where_cuda_refuses(
    refused: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_storage, "_BLOCK_BYTES", 5000)
    tensor_storage.start_writer()
    runtime, descriptors = Runtime(refused, monkeypatch), psutil.Process().num_fds()
    warnings: list[str] = []
    storage = DurableStorage(warnings.append)
    storage.begin(copies=True)
    state = [torch.arange(size) for size in (500, 1500, 4501)]  # each needs a block of its own
    storage.save(state, str(tmp_path / "t.pt"))
    storage.write()
    assert all(map(torch.equal, load_tensors(tmp_path / "t.pt"), state))
    blocks = storage._memory.blocks
    for (start, size), block in zip(runtime.asked, blocks, strict=False):
        assert (start, size) == (block.bytes.data_ptr(), block.bytes.numel())
        assert start % mmap.PAGESIZE == 0
        assert 0 <= mapped(start)[0] - size < mmap.PAGESIZE
    assert [block.is_locked for block in blocks] == [number < refused for number in range(3)]
    assert len(runtime.asked) == min(refused + 1, 3)  # once refused, it is not asked again
    assert not runtime.pending
    why = "copies of checkpoints are not page-locked (CUDA: out of memory), so saves stop training for longer"
    assert warnings == ([why] if refused < 3 else [])
    del storage, blocks, block
    assert not runtime.locked
    assert not any(mapped(start) for start, _ in runtime.asked)
    assert psutil.Process().num_fds() == descriptors


def test_without_its_writer_a_save_is_written_all_the_same_and_the_next_has_another(tmp_path) -> None:
    storage, weight = DurableStorage(), torch.ones(3)
    storage.begin(copies=True)
    for name in ("t.pt", "u.pt"):
        storage.save([weight], str(tmp_path / name))
    writer = tensor_storage.start_writer()
    psutil.Process(writer._process.pid).kill()
    weight.zero_()  # a step changes it meanwhile
    written = storage.write()
    for path, fingerprint in written.items():
        assert torch.equal(load_tensors(path)[0], torch.ones(3))
        assert fingerprint.sha256 == file_sha256(path)
    assert len(written) == 2
    storage.begin(copies=True)
    assert tensor_storage.start_writer() is not writer
    storage.save([torch.ones(3)], str(tmp_path / "nowhere" / "t.pt"))
    with pytest.raises(FileNotFoundError) as error:
        storage.write()
    assert error.value.filename == str(tmp_path / "nowhere" / "t.pt")
    storage.begin(copies=True)
    storage.save([torch.ones(3)], str(tmp_path / "t.pt"))
    storage.write()
    assert torch.equal(load_tensors(tmp_path / "t.pt")[0], torch.ones(3))


@pytest.mark.parametrize("read", [load_tensors, read_metadata, file_sha256])
def test_nobody_waits_at_a_pipe_in_place_of_tensors(read, tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        read(tmp_path / "pipe")


def test_what_is_being_written_is_no_leftover_to_others_until_its_writer_is_gone(tmp_path, monkeypatch) -> None:
    def clean() -> None:
        assert remove_leftovers(tmp_path) == []

    def commit(temporary: Path, path: Path) -> None:
        assert os.waitpid(forked(clean), 0)[1] == 0  # a second writer while the first still writes
        assert temporary.is_file()
        commit_file(temporary, path)

    monkeypatch.setattr(tensor_storage, "commit_file", commit)
    save_safetensors({"weight": torch.ones(3)}, tmp_path / "at.safetensors", {"step": "1"})
    assert read_metadata(tmp_path / "at.safetensors") == {"step": "1"}

    monkeypatch.setattr(tensor_storage, "commit_file", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    weights = {"weight": torch.zeros(3)}
    writer = forked(lambda: save_safetensors(weights, tmp_path / "at.safetensors", {"step": "2"}))
    assert os.waitstatus_to_exitcode(os.waitpid(writer, 0)[1]) == -signal.SIGKILL
    assert len([*tmp_path.iterdir()]) == 2
    assert remove_leftovers(tmp_path) == []
    assert [*tmp_path.iterdir()] == [tmp_path / "at.safetensors"]
