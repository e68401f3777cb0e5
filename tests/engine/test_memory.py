"""Memory: freed memory is kept for the next step, and if memory runs out, one line says what to change."""

import platform
import sys
from pathlib import Path

import pytest
import torch

from karat_scale.engine.distributed import World
from karat_scale.engine.memory import memory_snapshot, one_line_out_of_memory, record_memory
from karat_scale.foundation.errors import UserError
from karat_scale.training.tasks.classification.task import ClassificationTask
from tests.conftest import karat_environment, output_of

STEPS = """
import resource, sys
import torch
from karat_scale.engine.memory import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

print(keep_freed_memory())
for step in range(35):
    if step == 15:
        before = faults()
    tensors = [torch.ones(2**21) for _ in range(8)]
    del tensors
print(faults() - before)
"""


def steps(**settings: str) -> tuple[bool, int]:
    """Return whether memory is kept, and the page faults of 20 steps that write 64 MB each."""
    environment = {name: value for name, value in karat_environment().items() if not name.startswith("MALLOC_")}
    kept, faults = output_of(sys.executable, "-c", STEPS, env={**environment, **settings}).split()
    return kept == "True", int(faults)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_freed_memory_is_kept_unless_the_environment_says_otherwise() -> None:
    kept, faults = steps()
    assert kept
    for settings in ({"MALLOC_TOP_PAD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.top_pad=131072"}):
        given_back, more = steps(**settings)
        assert not given_back
        assert more > 10 * faults


def explained(recipe, failing) -> str:
    with pytest.raises(UserError) as caught, one_line_out_of_memory(lambda: ClassificationTask.less_memory(recipe, 2)):
        failing()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def fail(error: Exception):
    def failing() -> None:
        raise error

    return failing


def test_torchs_own_failure_names_what_to_change(small_recipe) -> None:
    recipe = small_recipe("train.recompute.policy=attention", "deepspeed.config=zero1")
    text = explained(recipe, lambda: torch.empty(1 << 50))
    assert text.startswith("out of memory: can't allocate memory: you tried to allocate 4503599627370496 bytes.")
    for part in ("train.micro_batch (now 4)", "train.recompute.policy (now attention)", "deepspeed.config (now zero1)"):
        assert part in text


OF_CUDNN = "CUDNN_STATUS_ALLOC_FAILED", "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"


def test_every_kind_is_known_and_other_errors_pass(small_recipe) -> None:
    cuda = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB of which 1 is free."
    kinds = {
        "CUDA out of memory. Tried to allocate 2.00 GiB;": torch.OutOfMemoryError(cuda),
        "out of memory in KArAt attention;": MemoryError("out of memory in KArAt attention"),
        "MemoryError;": MemoryError(),
        "CUDA error: out of memory;": RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA"),
        "std::bad_alloc;": RuntimeError("std::bad_alloc"),
        **{f"cuDNN error: {status};": RuntimeError(f"cuDNN error: {status}") for status in OF_CUDNN},
    }
    for text, error in kinds.items():
        assert explained(small_recipe(), fail(error)).startswith(f"out of memory: {text}")
    with pytest.raises(RuntimeError, match="shape"), one_line_out_of_memory(str):
        torch.zeros(2).view(3)


def test_a_gpu_leaves_a_snapshot(tmp_path, monkeypatch) -> None:
    """An allocation that fails on a GPU leaves a snapshot. Stand-ins replace torch's functions, which need a GPU."""
    recorded: list[int] = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda max_entries: recorded.append(max_entries))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_bytes(b"snapshot"))
    world = World(1, 2, 1, torch.device("cuda", 1), None)
    record_memory(world.device)
    record_memory(torch.device("cpu"))
    assert len(recorded) == 1

    def snapshot() -> str:
        return memory_snapshot(tmp_path / "diagnostics", world)

    with pytest.raises(UserError) as caught, one_line_out_of_memory(lambda: "lower it", snapshot):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")
    path = tmp_path / "diagnostics" / "memory-1.pickle"
    assert path.read_bytes() == b"snapshot"
    assert str(caught.value).endswith(f"lower it; {path} shows what is allocated (drop it on pytorch.org/memory_viz)")
    (tmp_path / "file").touch()
    assert memory_snapshot(tmp_path / "file" / "x", world) == ""  # a directory that cannot be made
    assert memory_snapshot(tmp_path, World(0, 1, 0, torch.device("cpu"), None)) == ""
