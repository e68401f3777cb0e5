"""The kernels of augmentation: what they compute, how many they are, and that ptxas takes them."""

import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from karat_scale.data.augmentation import device_fused
from karat_scale.data.augmentation.augment import TrainTransform
from karat_scale.data.augmentation.device_augment import DeviceAugment
from karat_scale.data.augmentation.device_program import pack, turns
from karat_scale.data.augmentation.draw import Draw
from karat_scale.data.augmentation.normalize import Normalize
from karat_scale.recipe import AugmentConfig
from tests.conftest import ROOT


@pytest.mark.slow
def test_the_kernels_compute_what_torch_does():
    """By Triton's interpreter, in a process of its own."""
    pytest.importorskip("triton")
    file = Path(__file__).with_name("interpreted_augment.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90, 120])
def test_the_kernels_keep_their_numbers_in_registers(architecture):
    pytest.importorskip("triton")
    from karat_scale.data.augmentation.device_triton import tables_kernel, turn_kernel

    for kernel, constants in (
        (turn_kernel, {"CUBIC": True, "BLOCK": device_fused.TURN_BLOCK}),
        (tables_kernel, {"BLOCK": device_fused.TABLE_BLOCK}),
    ):
        registers, stack = resources(kernel, constants, architecture)
        assert (registers <= 168, stack) == (True, 0), (kernel, registers, stack)


def resources(kernel: Any, constants: dict[str, Any], architecture: int) -> tuple[int, int]:
    """Registers of a thread and its bytes of stack, as ptxas compiles a launch with these constants."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = {**dict.fromkeys(("images", "tables", "result"), "*u8"), "program": "*fp64"}
    kinds |= {name: "fp32" for name in kernel.arg_names if name.startswith(("mean", "std"))}
    kinds |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, {name: kinds.get(name, "i32") for name in kernel.arg_names}, constants, {})
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=device_fused.OPTIONS)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        command = [tool, "-res-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", usage)[1]), int(re.search(r"STACK:(\d+)", usage)[1])


@pytest.mark.slow
def test_tritons_own_binder_takes_the_launches(monkeypatch):
    """It specialises the arguments and compiles; only the card is missing."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    launched = []
    properties = {"max_shared_mem": 232448, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32}
    driver = SimpleNamespace(
        utils=SimpleNamespace(
            load_binary=lambda *_: (1, 2, 64, 0, 1024), get_device_properties=lambda _: properties, unload_module=print
        ),
        launcher_cls=lambda _source, metadata: lambda *grid_and_arguments: launched.append(metadata.name),
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda _=None: 0,
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    recipe = AugmentConfig(run_on="device")
    program, by_table = pack(turns([Draw((0, 0, 1, 1), ops=(("Equalize", ()), ("Rotate", (3.0,))))] * 2), 33, 17)
    images = torch.zeros(2, 3, 17, 33, dtype=torch.uint8)
    device_fused.augment(images, program, by_table, (124, 116, 104), recipe.mean, recipe.std, True)
    assert launched == ["tables_kernel", "turn_kernel", "turn_kernel"]


class Launches(TorchDispatchMode):
    """Counts what would be launched for `meta` tensors: operations that are no views, and copies from the host."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.copies = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.is_meta and not function.is_view:
            if any(isinstance(x, torch.Tensor) and x.device.type == "cpu" and x.dim() for x in args):
                self.copies += 1
            else:
                self.kernels[str(function)] += 1
        return result


def test_a_batch_takes_few_kernels_and_one_copy():
    """1,218 kernels and 74 copies while each operation had its own."""
    for augment in (AugmentConfig(run_on="device"), AugmentConfig(run_on="device", erasing=0.25)):
        transform = TrainTransform(augment, 224)
        draws = [transform.draw(seed, 500, 375) for seed in range(256)]
        images = torch.empty(256, 3, 224, 224, dtype=torch.uint8, device="meta")
        on_device = DeviceAugment(augment, 224)
        with Launches() as counted:
            on_device(images, draws)
        assert counted.copies == 1
        # RandAugment's two operations, three of jitter, erasing: a kernel each, and one for tables of levels.
        assert counted.kernels.total() <= 12, counted.kernels


def test_normalising_copies_its_constants_once():
    normalize, images = Normalize((0.5,) * 3, (0.5,) * 3), torch.empty(4, 3, 8, 8, dtype=torch.uint8, device="meta")
    normalize(images)
    with Launches() as counted:
        normalize(images)
    assert (counted.copies, counted.kernels.total()) == (0, 3)
