"""Saving during training, and what happens when the disk refuses to write."""

import errno
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from karat_scale.checkpoint import checkpoints as saving
from karat_scale.checkpoint import tensor_storage
from karat_scale.checkpoint.checkpoints import Checkpoints
from karat_scale.checkpoint.tensor_storage import load_tensors
from karat_scale.foundation.files import read_text
from karat_scale.training.tasks.classification.task import TrainState
from tests.conftest import wait_until
from tests.small_engines import FEW_CELLS, equal, train_steps


@pytest.fixture
def slow_disk(monkeypatch) -> Iterator[Event]:
    """Yield an event; the disk writes nothing until it is set, and writes normally after that."""
    let_go = get_context("fork").Event()  # for the process that writes, too
    save_tensors = tensor_storage.save_tensors

    def save_later(*arguments: object) -> object:
        assert let_go.wait(60)
        return save_tensors(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(tensor_storage, "save_tensors", save_later)
    monkeypatch.setattr(tensor_storage, "_writer", None)  # the next one has the slow function
    yield let_go
    let_go.set()


def _tensors(checkpoints: Checkpoints, step: int) -> dict[str, object]:
    name = f"step-{step:08d}"
    assert checkpoints.store.damage(name) is None
    return {path.name: load_tensors(path) for path in sorted((checkpoints.store.root / name).glob("*.pt"))}


def _to_the_end(checkpoints: Checkpoints) -> bool:
    """Advance a save to its end, as the training loop does between steps; return whether it is good."""
    good = True
    while checkpoints.is_under_way:
        if not checkpoints.is_busy:
            good = checkpoints.advance()
    return good


@pytest.mark.parametrize(("config", "precision"), FEW_CELLS)
def test_a_save_beside_training_is_of_its_step(small_recipe, make_checkpoints, slow_disk, tmp_path, config, precision):
    recipe = small_recipe(f"deepspeed.config={config}", f"train.precision={precision}")
    beside, blocking = (make_checkpoints(recipe, tmp_path / name) for name in ("beside", "blocking"))
    state = TrainState(step=2, samples=16)
    for checkpoints in (beside, blocking):
        train_steps(checkpoints, 1, 2)
    torch.manual_seed(7)
    assert beside.save(state, wait=False)
    train_steps(beside, 3, 4)
    state.step = 4  # the loop's state goes on, too
    assert beside.is_busy
    assert beside.store.names() == []
    slow_disk.set()
    assert _to_the_end(beside)
    torch.manual_seed(7)
    assert blocking.save(TrainState(step=2, samples=16))
    assert equal(_tensors(beside, 2), _tensors(blocking, 2))
    assert beside.store.state("step-00000002") == blocking.store.state("step-00000002")
    assert beside.store.pointed("latest") == "step-00000002"


class CopiesOfAGpu(TorchFunctionMode):
    """Copies as a GPU makes them: some wait, and those into page-locked memory arrive only at the next wait."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[str] = []
        self._begun: list[Callable[[], object]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.copy_ and kwargs.get("non_blocking"):
            args[0].fill_(77)
            self.done.append("copy")
            source = args[1].clone()  # the device reads it before what is launched later writes to it
            self._begun.append(lambda: args[0].copy_(source))
            return args[0]
        if func is torch.Tensor.cpu or (func is torch.Tensor.to and kwargs.get("copy")):
            self.done.append("wait")
        return func(*args, **kwargs)

    def wait(self, device: torch.device) -> None:
        self.done.append("wait")
        while self._begun:
            self._begun.pop()()


@pytest.mark.parametrize("config", ["zero0", "zero2"])
def test_on_a_gpu_all_copies_are_begun_before_one_wait(small_recipe, make_checkpoints, monkeypatch, tmp_path, config):
    recipe = small_recipe(f"deepspeed.config={config}")
    beside, blocking = (make_checkpoints(recipe, tmp_path / name) for name in ("beside", "blocking"))
    gpu, collect = CopiesOfAGpu(), beside._collect

    def collect_as_on_a_gpu(directory: Path, copies: bool) -> str | None:
        with gpu, pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "is_cuda", True)
            return collect(directory, copies)

    monkeypatch.setattr(saving, "wait_for", gpu.wait)
    monkeypatch.setattr(beside, "_collect", collect_as_on_a_gpu)
    for checkpoints in (beside, blocking):
        train_steps(checkpoints, 1, 2)
    torch.manual_seed(7)
    assert beside.save(TrainState(step=2, samples=16), wait=False)
    assert _to_the_end(beside)
    assert gpu.done.count("copy") > 3
    assert gpu.done.index("wait") == len(gpu.done) - 1
    torch.manual_seed(7)
    assert blocking.save(TrainState(step=2, samples=16))
    assert equal(_tensors(beside, 2), _tensors(blocking, 2))


def test_a_second_save_waits_and_none_is_made_twice(small_recipe, make_checkpoints, slow_disk, tmp_path, capsys):
    checkpoints = make_checkpoints(small_recipe(), tmp_path / "c")
    assert checkpoints.save(TrainState(step=1, samples=8), wait=False)
    threading.Timer(0.2, slow_disk.set).start()
    assert checkpoints.save(TrainState(step=2, samples=16), wait=False)
    assert checkpoints.store.names() == ["step-00000001"]
    assert checkpoints.save(TrainState(step=2, samples=16))  # waits for the one under way
    assert not checkpoints.is_under_way
    assert checkpoints.save(TrainState(step=2, samples=16, evaluated_step=2), is_best=True)
    assert checkpoints.store.pointed("best") == "step-00000002"
    assert capsys.readouterr().out.count("saved step-") == 3


def test_what_a_finished_save_waits_for_training_does_not_count(
    small_recipe, make_checkpoints, slow_disk: Event, tmp_path: Path, monkeypatch
) -> None:
    checkpoints = make_checkpoints(small_recipe(), tmp_path / "c")
    assert checkpoints.save(TrainState(step=1, samples=8), wait=False)
    slow_disk.set()
    wait_until(lambda: not checkpoints.is_busy)
    now = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: now() + 1e6)  # a long step
    assert checkpoints.finish()
    assert checkpoints.cost[1] < 1e6


def test_the_same_state_is_not_waited_for(small_recipe, make_checkpoints, slow_disk: Event, tmp_path: Path) -> None:
    # A step at which an evaluation has found a best and `every_steps` is due.
    checkpoints = make_checkpoints(small_recipe(), tmp_path / "c")
    for _ in range(2):
        assert checkpoints.save(TrainState(step=1, samples=8), is_best=True, wait=False)
    assert checkpoints.is_busy
    assert not slow_disk.is_set()


def _free(path: Path) -> int:
    return shutil.disk_usage(path).free


def test_space_is_asked_for_before_anything_is_written(small_recipe, make_checkpoints, small_disk, capsys) -> None:
    checkpoints = make_checkpoints(small_recipe(), small_disk / "c")
    (small_disk / "filler").write_bytes(bytes(_free(small_disk) - 300_000))
    assert not checkpoints.save(TrainState(step=1, samples=8))  # counted from the model
    assert re.search(r"step-00000001 not saved: it needs 0\.\d MB and .* has 0\.2 MB free", capsys.readouterr().out)
    (small_disk / "filler").unlink()
    train_steps(checkpoints, 1, 2)
    assert checkpoints.save(TrainState(step=2, samples=16))
    (small_disk / "filler").write_bytes(bytes(_free(small_disk) - 300_000))
    assert not checkpoints.save(TrainState(step=3, samples=24))  # known from the last one
    (line,) = capsys.readouterr().out.splitlines()[1:]
    assert re.search(r"step-00000003 not saved: it needs 0\.\d MB and .* has 0\.2 MB free; ", line)
    assert "the last good one is step-00000002" in line


@pytest.mark.parametrize("wait", [True, False], ids=["blocking", "beside training"])
@pytest.mark.parametrize("config", ["zero0", "zero2"])
def test_a_disk_that_fills_up_voids_the_save_and_leaves_the_last_good_one(
    small_recipe, make_checkpoints, small_disk, monkeypatch, capsys, config, wait
) -> None:
    checkpoints = make_checkpoints(small_recipe(f"deepspeed.config={config}"), small_disk / "c")

    begin = checkpoints._begin

    def fill_after(*arguments: Any) -> object:
        problem = begin(*arguments)
        (small_disk / "filler").write_bytes(bytes(_free(small_disk) - 100_000))
        return problem

    assert checkpoints.save(TrainState(step=1, samples=8))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_begin", fill_after)
        assert checkpoints.save(TrainState(step=2, samples=16), wait=wait) != wait
    assert _to_the_end(checkpoints) == wait
    output = capsys.readouterr().out
    assert "step-00000002 not saved: No space left on device" in output
    assert "the last good one is step-00000001" in output
    assert checkpoints.store.names() == ["step-00000001"]
    assert checkpoints.store.damage("step-00000001") is None
    assert not list(checkpoints.store.root.glob(".saving-*"))
    (small_disk / "filler").unlink()
    assert checkpoints.save(TrainState(step=3, samples=24))


def test_a_directory_that_became_read_only_voids_the_save(small_recipe, make_checkpoints, small_disk, capsys) -> None:
    def remount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(small_disk)], check=True)

    checkpoints = make_checkpoints(small_recipe("deepspeed.config=zero1"), small_disk / "c")
    assert checkpoints.save(TrainState(step=1, samples=8))
    remount("ro")
    assert not checkpoints.save(TrainState(step=2, samples=16), wait=False)
    assert "step-00000002 not saved: Read-only file system" in capsys.readouterr().out
    assert checkpoints.store.damage("step-00000001") is None
    remount("rw")
    assert checkpoints.save(TrainState(step=3, samples=24))


def test_a_directory_that_cannot_be_read_voids_only_what_needs_it(
    small_recipe, make_checkpoints, tmp_path, monkeypatch, capsys, unlisted
) -> None:
    checkpoints = make_checkpoints(small_recipe(), tmp_path / "c")
    assert checkpoints.save(TrainState(step=1, samples=8), is_best=True)
    with unlisted(tmp_path / "c"):
        assert not checkpoints.save(TrainState(step=2, samples=16))
    said = f"step-00000002 not saved: Permission denied ({tmp_path / 'c'}); {tmp_path / 'c'} cannot be read: Permission"
    assert said in capsys.readouterr().out

    def unreadable(path: Path, *most: int) -> str:
        if path.name == "best":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read_text(path, *most)

    monkeypatch.setattr("karat_scale.checkpoint.store.read_text", unreadable)
    for step in (3, 4, 5):
        assert checkpoints.save(TrainState(step=step, samples=8 * step))
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(warnings) == 3
    assert f"no old checkpoint is removed: {tmp_path / 'c' / 'best'} cannot be read: Input/output" in warnings[0]
    assert "step-00000001" in checkpoints.store.names()


def test_a_directory_that_goes_meanwhile_voids_the_save(small_recipe, make_checkpoints, slow_disk, tmp_path):
    checkpoints = make_checkpoints(small_recipe("deepspeed.config=zero3"), tmp_path / "c")
    assert checkpoints.save(TrainState(step=1, samples=8), wait=False)
    shutil.rmtree(tmp_path / "c")
    slow_disk.set()
    assert not _to_the_end(checkpoints)
    blocking = make_checkpoints(small_recipe("checkpoint.asynchronous=false"), tmp_path / "c")
    assert blocking.save(TrainState(step=2, samples=16), wait=False)
    assert not blocking.is_under_way
    assert blocking.store.names() == ["step-00000002"]
