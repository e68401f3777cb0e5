"""Tests of the kernels of augmentation: what they compute, how many they are, and that ptxas compiles them."""

import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from karat_scale.data.augmentation import device_fused
from karat_scale.data.augmentation.augment import TrainTransform
from karat_scale.data.augmentation.device_augment import DeviceAugment, Normalize, resize_views
from karat_scale.data.augmentation.device_program import pack, turns
from karat_scale.data.augmentation.mixing import MixParams
from karat_scale.data.batch import Draw
from karat_scale.data.decoders.decode import crop_view
from karat_scale.recipe import AugmentConfig
from tests.conftest import karat_environment, output_of


@pytest.mark.slow
def test_the_kernels_compute_what_torch_does():
    """In Triton's interpreter the kernels give torch's results; the interpreter needs a process of its own."""
    pytest.importorskip("triton")
    file = Path(__file__).with_name("interpreted_augment.py")
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file)
    output_of(*command, env={**karat_environment(), "TRITON_INTERPRET": "1"})


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90, 100, 120])
def test_the_kernels_keep_their_numbers_in_registers(architecture):
    pytest.importorskip("triton")
    from karat_scale.data.augmentation.device_triton import input_kernel, tables_kernel, turn_kernel, views_kernel

    of_views = {"ROWS": device_fused.VIEW_ROWS, "WIDTH": device_fused.VIEW_WIDTH}
    for kernel, constants, most in (
        (turn_kernel, {"CUBIC": True, "BLOCK": device_fused.TURN_BLOCK}, 168),
        (tables_kernel, {"BLOCK": device_fused.TABLE_BLOCK}, 168),
        (views_kernel, {"CUBIC": True, **of_views}, 128),
        (views_kernel, {"CUBIC": False, **of_views}, 128),
        *((input_kernel, {"MIX": mix, "BLOCK": device_fused.INPUT_BLOCK}, 64) for mix in range(3)),
    ):
        registers, stack = resources(kernel, constants, architecture)
        assert (registers <= most, stack) == (True, 0), (kernel, registers, stack)


def resources(kernel: Any, constants: dict[str, Any], architecture: int) -> tuple[int, int]:
    """Return the registers of a thread and its bytes of stack, as ptxas compiles a launch with these constants."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = {**dict.fromkeys(("images", "tables", "result"), "*u8"), "program": "*fp64", "table": "*i64"}
    kinds |= {name: "fp32" for name in kernel.arg_names if name.startswith(("mean", "std", "scale", "shift", "o"))}
    kinds |= {"result": "*bf16"} if "MIX" in constants else {}
    kinds |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, {name: kinds.get(name, "i32") for name in kernel.arg_names}, constants, {})
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=device_fused.OPTIONS)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = output_of(tool, "-res-usage", cubin.name)
    return int(re.search(r"REG:(\d+)", usage)[1]), int(re.search(r"STACK:(\d+)", usage)[1])


@pytest.mark.slow
def test_tritons_own_binder_takes_the_launches(monkeypatch):
    """Triton's own binder specialises the arguments and compiles the kernels; only the GPU is a stand-in."""
    triton = pytest.importorskip("triton")
    from tests.attention.kernels.fake_driver import FakeDriver

    driver = FakeDriver(90)
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    recipe = AugmentConfig(run_on="device")
    program, by_table = pack(turns([Draw((0, 0, 1, 1), ops=(("Equalize", ()), ("Rotate", (3.0,))))] * 2), 33, 17)
    images = torch.zeros(2, 3, 17, 33, dtype=torch.uint8)
    device_fused.augment(images, program, by_table, (124, 116, 104), recipe.mean, recipe.std, True)
    device_fused.resized_views([images[0], images[1]], [crop_view((0, 0, 5, 5), 8)] * 2, [True, False], 8, True)
    # Each batch has another box. A kernel specialised for the box would be compiled in the middle of training.
    normalize = Normalize(recipe.mean, recipe.std, torch.bfloat16)
    with monkeypatch.context() as patched:
        patched.setattr(device_fused, "can_run", lambda _: True)
        for box in ((0, 16, 1, 5), (1, 17, 16, 32), (3, 5, 0, 1), (16, 17, 32, 33)):
            normalize(images, MixParams("cutmix", 0.5, box))
    launched = ["tables_kernel", "turn_kernel", "turn_kernel", "views_kernel", *["input_kernel"] * 4]
    assert [launch.name for launch in driver.launches] == launched
    assert [name for name, *_ in driver.binaries].count("input_kernel") == 1


class Launches(TorchDispatchMode):
    """Counts what would be launched for `meta` tensors: operations that are not views, and copies from the host."""

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
    """A batch takes at most 12 kernels and one copy; with a kernel for each operation it took 1,218 and 74."""
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


def test_all_crops_of_a_batch_are_resized_by_one_kernel():
    """One kernel resizes all crops of a batch; resizing one crop after another took 2,000."""
    images = [torch.empty(3, 375, 500, dtype=torch.uint8, device="meta") for _ in range(256)]
    views = [crop_view((10 + number % 50, 20, 300, 200), 224) for number in range(256)]
    flips = [number % 2 == 0 for number in range(256)]
    with Launches() as counted:
        resize_views(images, views, flips, 224, "bicubic")
    assert (counted.copies, counted.kernels) == (1, {"karat_scale.resized_views.default": 1})


class Bytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations read and write, once for each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view and "empty" not in str(function):
            tensors = [x for x in (*tree_leaves(args), result) if isinstance(x, torch.Tensor)]
            self.moved += sum(x.numel() * x.element_size() for x in tensors)
        return result


@pytest.mark.parametrize(
    "mix", [MixParams("none"), MixParams("mixup", 0.4), MixParams("cutmix", 0.6, (10, 150, 20, 160))]
)
def test_the_models_input_is_read_and_written_once(mix):
    normalize = Normalize((0.5,) * 3, (0.5,) * 3, torch.bfloat16)
    images = torch.empty(256, 3, 224, 224, dtype=torch.uint8, device="meta")
    with Bytes() as counted, Launches() as launches:
        made = normalize(images, mix)
    assert (made.dtype, made.shape) == (torch.bfloat16, images.shape)
    assert counted.moved == 3 * images.numel()  # one byte read, and two of bf16 written
    assert (launches.copies, launches.kernels.total()) == (0, 1)
