"""The device and the software that drives it: what is installed, and how fast it runs the stages of a step.

The stages are transfer, model, optimizer and communication. All ranks measure together. The checks of GPUs, libraries
and optional parts say how to install what is missing.
"""

import importlib
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.loss import SoftTargetCrossEntropy
from torch import nn

from karat_scale.commands.doctor.report import Finding, found
from karat_scale.data.augmentation.augment import TrainTransform
from karat_scale.data.augmentation.device_augment import DeviceAugment, Normalize
from karat_scale.data.augmentation.mixing import Mixer
from karat_scale.data.batch import Batch
from karat_scale.engine.devices import wait_for
from karat_scale.engine.distributed import World
from karat_scale.engine.engine import PRECISIONS, cast_images, pixel_dtype
from karat_scale.foundation.errors import one_line
from karat_scale.foundation.native_build import PACKAGES, LoadError, find_compiler
from karat_scale.foundation.tables import EXTRAS, how_to_install, is_installed
from karat_scale.models import parameter_count
from karat_scale.recipe import Recipe
from karat_scale.training.loop import Parts

FEWEST = 2


def timed(action: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call, including the device's work."""
    wait_for(device)
    begun = time.perf_counter()
    action()
    wait_for(device)
    return time.perf_counter() - begun


def repeated(action: Callable[[], float], seconds: float, world: World) -> float:
    """Return the median of `action` over about `seconds`; of the slowest rank, with the same count on each.

    The first call is the warm-up and does not count.
    """
    action()
    begun = time.perf_counter()
    measured: list[float] = []
    while len(measured) < FEWEST or not world.any(time.perf_counter() - begun > seconds):
        measured.append(action())
    return slowest(statistics.median(measured), world)


def slowest(value: float, world: World) -> float:
    """Return the largest of all ranks' values."""
    return max(world.gather(value))


def random_batch(recipe: Recipe, size: int) -> Batch:
    """Return a batch of noise, in page-locked memory if there is a GPU, as from the loader."""
    side = recipe.model.image_size
    transform = TrainTransform(recipe.augment, side)
    batch = Batch(
        images=torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8),
        labels=torch.randint(0, recipe.model.num_classes, (size,)),
        sample_ids=torch.arange(size),
        valid=torch.ones(size, dtype=torch.bool),
        draws=tuple(transform.draw(seed, side, side) for seed in range(size)),
    )
    return batch.pin_memory() if torch.cuda.is_available() else batch


class Preparation:
    """Convert a batch in RAM to the model's input: transfer, augment, normalise, mix."""

    def __init__(self, recipe: Recipe, world: World) -> None:
        self._augment = DeviceAugment(recipe.augment, recipe.model.image_size)
        self._normalize = Normalize(recipe.augment.mean, recipe.augment.std, pixel_dtype(recipe.train, world.device))
        self._mixer = Mixer(recipe.augment, recipe.model.num_classes, recipe.run.seed)
        self._device = world.device

    def __call__(self, cpu_batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        batch = cpu_batch.to(self._device)
        mix = self._mixer.params(batch.epoch, batch.batch, *batch.images.shape[-2:])
        images = self._normalize(self._augment(batch.images, batch.draws), mix)
        return images, self._mixer.targets(batch.labels, mix)


def transfer_seconds(recipe: Recipe, micro_batch: int, seconds: float, world: World) -> float:
    """Return the seconds to transfer one micro batch and to augment (if asked), normalise and mix it there."""
    prepare, batch = Preparation(recipe, world), random_batch(recipe, micro_batch)
    return repeated(lambda: timed(lambda: prepare(batch), world.device), seconds, world)


class BareModel:
    """Forward and backward without DeepSpeed: the time of the model by itself."""

    def __init__(self, model: nn.Module, recipe: Recipe, world: World) -> None:
        self._precision = PRECISIONS[recipe.train.precision]
        self._model = model.to(world.device, self._precision.weights).train()
        self._recipe, self._world = recipe, world
        self._prepare = Preparation(recipe, world)
        self._objective = SoftTargetCrossEntropy()

    def leave_device(self) -> None:
        """Free the device's memory."""
        self._model.to("cpu")

    def seconds(self, micro_batch: int, seconds: float) -> float:
        """Return the seconds of one forward and backward over a micro batch, measured for about `seconds`."""
        images, targets = self._prepare(random_batch(self._recipe, micro_batch))
        images = cast_images(images, self._precision)

        def pass_through() -> None:
            with self._precision.autocast(self._world.device.type):
                logits = self._model(images)
            self._objective(logits.float(), targets).backward()
            self._model.zero_grad(set_to_none=True)

        return repeated(lambda: timed(pass_through, self._world.device), seconds, self._world)


def optimizer_seconds(parts: Parts, recipe: Recipe, micro_batch: int, seconds: float) -> float:
    """Return the seconds of the engine's step on existing gradients, with clipping and the EMA."""
    images, targets = Preparation(recipe, parts.world)(random_batch(recipe, micro_batch))
    objective, steps = SoftTargetCrossEntropy(), 0

    def finish() -> None:
        nonlocal steps
        steps += 1
        parts.engine.step()
        if parts.ema is not None:
            parts.ema.update(steps)

    def step() -> float:
        for _ in range(parts.plan.accumulation - 1):
            parts.engine.backward(objective(parts.engine.forward(images), targets))
            parts.engine.step()
        parts.engine.backward(objective(parts.engine.forward(images), targets))
        return timed(finish, parts.world.device)

    return repeated(step, seconds, parts.world)


@dataclass(frozen=True)
class Communication:
    """The all-reduce of all gradients at once: seconds, and bytes that each rank sends."""

    seconds: float
    bytes: int


def communication(model: Any, recipe: Recipe, seconds: float, world: World) -> Communication | None:
    """Time an all-reduce of the size of the gradients, or return None for a single rank."""
    if world.size == 1:
        return None
    dtype = PRECISIONS[recipe.train.precision].weights
    gradients = torch.zeros(parameter_count(model), dtype=dtype, device=world.device)
    one = repeated(lambda: timed(lambda: dist.all_reduce(gradients), world.device), seconds, world)
    return Communication(one, gradients.numel() * gradients.element_size())


GIB = 2**30
DRIVER_FILE = Path("/proc/driver/nvidia/version")
SMI_SECONDS = 20
# The Triton kernels and bf16 need Ampere.
OLDEST_CAPABILITY = (8, 0)


def examine_gpus() -> Iterator[Finding]:
    """Yield driver, CUDA, NCCL, and each GPU with its memory and compute capability."""
    import torch

    driver = driver_version()
    yield found("driver", driver or "no NVIDIA driver", version=driver)
    built_for = f"none: a build for ROCm {torch.version.hip}" if torch.version.hip else "none: a CPU build of torch"
    yield found("CUDA of torch", torch.version.cuda or built_for, version=torch.version.cuda)
    if not torch.cuda.is_available():
        yield no_gpu(driver, torch.version.cuda)
        return
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    yield found("NCCL", nccl, version=nccl)
    for number in range(torch.cuda.device_count()):
        yield _examine_gpu(number)


def driver_version() -> str | None:
    """Return the NVIDIA driver's version, from the kernel module or nvidia-smi."""
    if DRIVER_FILE.is_file():
        version = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", DRIVER_FILE.read_text())
        if version:
            return version[1]
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SMI_SECONDS)
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else None


def no_gpu(driver: str | None, cuda: str | None) -> Finding:
    """Return why torch sees no GPU, and what helps.

    Args:
        driver: its version, or None where there is none.
        cuda: the version that torch is built for, or None in a build for CPUs.
    """
    if not driver:
        return found("GPU", "there is no NVIDIA driver, so training runs on the CPU", count=0)
    why, shown = _refusal_of_cuda() if cuda else "", os.environ.get("CUDA_VISIBLE_DEVICES")
    if cuda is None:
        text = "there is a driver, but this torch is for CPUs only"
        fix = "install torch for CUDA as https://pytorch.org/get-started says"
    elif "too old" in why:
        text = f"the driver {driver} is too old for this torch, which is built for CUDA {cuda}"
        fix = "update the driver, or install torch for an older CUDA"
    elif shown is not None:
        text = f"CUDA_VISIBLE_DEVICES={shown!r} shows torch no GPU"
        fix = "unset it, or list numbers that nvidia-smi -L has"
    else:
        text, fix = f"there is a driver, but torch sees no GPU: {why}", "check nvidia-smi"
    return found("GPU", text, fix, wrong=True, count=0)


def _refusal_of_cuda() -> str:
    import torch

    try:
        torch.cuda.init()
    except RuntimeError as error:
        return one_line(error)
    return "it does not say why"


def _examine_gpu(number: int) -> Finding:
    import torch

    properties = torch.cuda.get_device_properties(number)
    capability = (properties.major, properties.minor)
    free, total = torch.cuda.mem_get_info(number)
    text = (
        f"{properties.name}, {total / GIB:.0f} GiB ({free / GIB:.0f} free), "
        f"compute capability {properties.major}.{properties.minor}"
    )
    fix = ""
    if capability < OLDEST_CAPABILITY:
        fix = "below 8.0 there are no Triton kernels and bf16 is slow; use train.precision=fp32"
    elif free < 0.9 * total:
        fix = "another process uses a part of its memory; see nvidia-smi"
    model, name = properties.name, f"GPU {number}"
    return found(name, text, fix, model=model, total_bytes=total, free_bytes=free, capability=capability)


DISTRIBUTION = "karat-scale"
OLDEST_PYTHON = (3, 10)
# In a bare clone, whose needs are not recorded.
LIBRARIES = ("torch", "torchvision", "timm", "deepspeed", "numpy", "pillow", "pydantic", "pyyaml", "webdataset")


def examine_python() -> Iterator[Finding]:
    """Yield the finding about the Python interpreter."""
    old = sys.version_info[:2] < OLDEST_PYTHON
    fix = "use Python 3.10 or newer" if old else ""
    yield found("python", f"{platform.python_version()} ({sys.executable})", fix, wrong=old)


def examine_libraries() -> Iterator[Finding]:
    """Yield the required libraries and triton, against the versions that the package requires."""
    for name, wanted in (wanted_versions() or dict.fromkeys(LIBRARIES, "")).items():
        yield examine_library(name, wanted)
    yield _examine_triton()


def wanted_versions() -> dict[str, str]:
    """Return the version range of each required distribution from the installed package; empty in a bare clone."""
    from packaging.requirements import Requirement

    try:
        needs = [Requirement(text) for text in requires(DISTRIBUTION) or ()]
    except PackageNotFoundError:
        return {}
    return {need.name: str(need.specifier) for need in needs if need.marker is None}


def examine_library(name: str, wanted: str) -> Finding:
    """Return the finding about one required distribution and its range `wanted`, such as ">=2.6,<3"."""
    from packaging.specifiers import SpecifierSet

    install = f"pip install '{name}{wanted}'"
    installed = installed_version(name)
    if installed is None:
        return found(name, "not installed", install, wrong=True, version=None)
    if not SpecifierSet(wanted).contains(installed, prereleases=True):
        return found(name, f"{installed}, but {wanted} is needed", install, wrong=True, version=installed)
    return found(name, installed, version=installed)


def installed_version(name: str) -> str | None:
    """Return the version of a distribution, or None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _examine_triton() -> Finding:
    installed = installed_version("triton")
    if installed is None:
        fix = "only the GPU kernels need it: pip install 'triton>=3.3,<4'"
        return found("triton", "not installed", fix, version=None)
    return found("triton", installed, version=installed)


def examine_extras() -> Iterator[Finding]:
    """Yield the optional libraries, and the compiler that the native parts need."""
    for name, extra in EXTRAS.items():
        distribution = next(filter(installed_version, extra.distributions), extra.distributions[0])
        hint = f"for {extra.needed_for}: {how_to_install(name)}"
        yield _examine_extra(name, extra.module, distribution, hint)
    yield _examine_compiler()


def _examine_extra(name: str, module: str, distribution: str, install: str) -> Finding:
    label = f"extra {name}"
    if not is_installed(module):
        return found(label, "not installed", install, present=False)
    try:
        importlib.import_module(module)
    except Exception as error:  # a missing system library can raise anything
        reason = f"installed, but cannot be imported: {type(error).__name__}: {error}"
        return found(label, " ".join(reason.split()), install, present=False)
    return found(label, installed_version(distribution) or "installed", present=True)


def _examine_compiler() -> Finding:
    try:
        compiler = find_compiler()
    except LoadError as error:
        fix = f"the CPU attention kernel and the native JPEG decoder need it: apt-get install {PACKAGES}"
        return found("C++ compiler", str(error).partition(";")[0], fix, path=None)
    return found("C++ compiler", compiler, path=compiler)
