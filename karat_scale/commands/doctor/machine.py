"""Checks of this machine: Python and its libraries, GPUs, cores, memory, limits; and how to get what is missing.

They include trials: each implementation of KArAt attends over a few tokens, and each decoder reads a JPEG. This module
imports no library at its top: a missing one is a finding, not a crash.
"""

import importlib
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from karat_scale.commands.doctor.report import Finding, examine, found
from karat_scale.foundation.errors import on_one_line, one_line
from karat_scale.foundation.machine import cpu_quota, gpu_faults, usable_cores, usable_memory
from karat_scale.foundation.native_build import PACKAGES, LoadError, cache_directory, find_compiler, is_in_the_package
from karat_scale.foundation.tables import DECODERS, EXTRAS, how_to_install, is_installed

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
        properties = torch.cuda.get_device_properties(number)
        capability, (free, total) = (properties.major, properties.minor), torch.cuda.mem_get_info(number)
        text = f"{properties.name}, {total / GIB:.0f} GiB ({free / GIB:.0f} free), "
        text += f"compute capability {properties.major}.{properties.minor}"
        fix = ""
        if capability < OLDEST_CAPABILITY:
            fix = "below 8.0 there are no Triton kernels and bf16 is slow; use train.precision=fp32, or fp16"
        elif free < 0.9 * total:
            fix = "another process uses a part of its memory; see nvidia-smi"
        figures: dict[str, Any] = {"total_bytes": total, "free_bytes": free, "capability": capability}
        yield found(f"GPU {number}", text, fix, model=properties.name, **figures)
    faults = gpu_faults()
    if faults is None:
        yield found("GPU health", "not known: NVML does not answer", faults=None)
        return
    fix = "do not train on this node until the GPU is reset or replaced" if faults else ""
    for line in faults or ["no errors of memory or links, no throttling"]:
        yield found("GPU health", line, fix, faults=faults)


def driver_version() -> str | None:
    """Return the NVIDIA driver's version, from the kernel module or nvidia-smi."""
    if DRIVER_FILE.is_file():
        version = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", DRIVER_FILE.read_text())
        if version:
            return version[1]
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SMI_SECONDS)
    except (OSError, subprocess.TimeoutExpired):  # it is not installed, or hangs because of a card
        return None
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else None


def no_gpu(driver: str | None, cuda: str | None) -> Finding:
    """Return why torch sees no GPU, and what helps.

    Args:
        driver: the driver's version, or None if there is none.
        cuda: the version that torch is built for, or None in a build for CPUs.
    """
    if not driver:
        return found("GPU", "there is no NVIDIA driver, so training runs on the CPU", count=0)
    if cuda is None:
        fix = "install torch for CUDA as https://pytorch.org/get-started says"
        return found("GPU", "there is a driver, but this torch is for CPUs only", fix, wrong=True, count=0)
    import torch

    shown, why = os.environ.get("CUDA_VISIBLE_DEVICES"), "it does not say why"
    try:
        torch.cuda.init()
    except RuntimeError as error:
        why = one_line(error)
    if "too old" in why:
        text = f"the driver {driver} is too old for this torch, which is built for CUDA {cuda}"
        fix = "update the driver, or install torch for an older CUDA"
    elif shown is not None:
        text = f"CUDA_VISIBLE_DEVICES={shown!r} shows torch no GPU"
        fix = "unset it, or list numbers that nvidia-smi -L has"
    else:
        text, fix = f"there is a driver, but torch sees no GPU: {why}", "check nvidia-smi"
    return found("GPU", text, fix, wrong=True, count=0)


DISTRIBUTION = "karat-scale"

# The libraries needed in a bare clone, which has no record of them.
LIBRARIES = ("torch", "torchvision", "timm", "deepspeed", "numpy", "pillow", "pydantic", "pyyaml", "webdataset")


def examine_libraries() -> Iterator[Finding]:
    """Yield Python, and the required libraries and triton, against the versions that the package requires."""
    yield found("python", f"{platform.python_version()} ({sys.executable})")
    for name, wanted in (wanted_versions() or dict.fromkeys(LIBRARIES, "")).items():
        yield examine_library(name, wanted)
    triton = installed_version("triton")
    fix = "" if triton else "only the GPU kernels need it: pip install 'triton>=3.3,<4'"
    yield found("triton", triton or "not installed", fix, version=triton)


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

    installed = installed_version(name)
    if installed and SpecifierSet(wanted).contains(installed, prereleases=True):
        return found(name, installed, version=installed)
    text = f"{installed}, but {wanted} is needed" if installed else "not installed"
    return found(name, text, f"pip install '{name}{wanted}'", wrong=True, version=installed)


def installed_version(name: str) -> str | None:
    """Return the version of a distribution, or None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def examine_extras() -> Iterator[Finding]:
    """Yield the optional libraries, and the compiler that the native parts need."""
    missing = []
    for name, extra in EXTRAS.items():
        label, fix = f"extra {name}", f"needed for {extra.needed_for}"
        if not is_installed(extra.module):
            missing.append(name)
            yield found(label, "not installed", fix, present=False)
            continue
        if sys.modules.get(extra.module, sys) is None:
            del sys.modules[extra.module]  # it is hidden from other libraries
        try:
            importlib.import_module(extra.module)
        except Exception as error:  # a missing system library can raise anything
            reason = f"installed, but cannot be imported: {type(error).__name__}: {error}"
            yield found(label, " ".join(reason.split()), fix, present=False)
        else:
            installed = next(filter(None, map(installed_version, extra.distributions)), "installed")
            yield found(label, installed, present=True)
    if missing:
        fix = f"install what you need by its name, {missing[0]} for example: {how_to_install(missing[0])}"
        yield found("extras", f"{len(missing)} not installed", fix)
    if is_in_the_package():
        yield found("C++ compiler", "not needed: the compiled kernels came with the package", path=None)
        return
    try:
        compiler = find_compiler()
        yield found("C++ compiler", " ".join(compiler), path=compiler[0])
    except LoadError as error:
        fix = f"the CPU attention kernel and the native JPEG decoder need it: apt-get install {PACKAGES}"
        yield found("C++ compiler", str(error).partition(";")[0], fix, path=None)


SHM = Path("/dev/shm")
SMALL_SHM = GIB
# For open shards, tensors sent by workers, and sockets of the ranks.
FEW_FILES = 1024
CACHE_ROOM = 64 * 2**20


def cache_memory() -> int:
    """Return the bytes that can hold data now: free memory, and the page cache."""
    import psutil

    return min(int(psutil.virtual_memory().available), usable_memory())


def examine_resources() -> Iterator[Finding]:
    """Yield cores, load, RAM, /dev/shm, limits, and the cache of compiled kernels."""
    import psutil

    yield _examine_cores()
    load, cores = os.getloadavg()[0], usable_cores()
    fix = "other processes are running and distort the timings: try again later" if load >= cores else ""
    yield found("load", f"{load:.1f} in the last minute", fix, minute=load)
    memory, usable, available = psutil.virtual_memory(), usable_memory(), cache_memory()
    text = f"{usable / GIB:.1f} GiB usable, {available / GIB:.1f} GiB available"
    if usable < memory.total:
        text += f" (the machine has {memory.total / GIB:.1f}; a control group limits it)"
    fix = "less than 2 GiB: another process may be using it" if available < 2 * GIB else ""
    yield found("RAM", text, fix, usable_bytes=usable, available_bytes=available, total_bytes=int(memory.total))
    if SHM.is_dir():
        size, _, free = shutil.disk_usage(SHM)
        fix = "NCCL uses it: docker run --shm-size=8g (or --ipc=host)" if free < SMALL_SHM else ""
        text = f"{size / GIB:.2f} GiB, {free / GIB:.2f} free"
        yield found("/dev/shm", text, fix, total_bytes=size, free_bytes=free)
    else:
        yield found("/dev/shm", "missing", "NCCL needs it: mount a tmpfs", wrong=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    fix = f"few: ulimit -n {hard if 0 < hard < 65536 else 65536}" if soft < FEW_FILES else ""
    now, most = ("unlimited" if value == resource.RLIM_INFINITY else str(value) for value in (soft, hard))
    yield found("open files", f"{now} (ulimit -n; up to {most})", fix, soft=soft, hard=hard)
    space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if space != resource.RLIM_INFINITY:
        fix = "CUDA and memory maps need many more addresses than memory: ulimit -v unlimited"
        yield found("address space", f"{space / GIB:.1f} GiB (ulimit -v)", fix, soft=space)
    yield examine_cache(cache_directory())


def _examine_cores() -> Finding:
    total, usable, quota = os.cpu_count() or 1, usable_cores(), cpu_quota()
    pieces = [f"{usable} of {total} usable"]
    if quota is not None:
        pieces.append(f"a control group allows {quota:g}")
    allocation = {key: os.environ[key] for key in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE") if key in os.environ}
    pieces += [f"{key}={value}" for key, value in allocation.items()]
    fix = ""
    asked = allocation.get("SLURM_CPUS_PER_TASK", "")
    if asked.isdigit() and int(asked) > usable:
        fix = "the step has fewer cores than the job: start it with srun --cpus-per-task=$SLURM_CPUS_PER_TASK"
    elif usable < total and "OMP_NUM_THREADS" not in os.environ and quota is not None:
        fix = f"math libraries do not see a quota: set OMP_NUM_THREADS={usable} when training on the CPU"
    return found("cores", ", ".join(pieces), fix, usable=usable, total=total, quota=quota, slurm=allocation)


def examine_cache(directory: Path) -> Finding:
    """Check that compiled kernels can be stored in a directory."""
    fix = "compiled kernels cannot be stored: set KARAT_CACHE_DIR to a writable directory"
    if not is_writable(directory):
        return found("cache", f"{directory} cannot be written", fix, path=str(directory), writable=False)
    free = shutil.disk_usage(nearest_existing(directory)).free
    if free < CACHE_ROOM:
        return found("cache", f"{directory}: only {free / 2**20:.0f} MiB free", fix, path=str(directory), writable=True)
    return found("cache", f"{directory} can be written", path=str(directory), writable=True)


def nearest_existing(path: Path) -> Path:
    """Return the path itself or the first existing directory above it."""
    path = path.expanduser().absolute()
    return next(part for part in (path, *path.parents) if part.exists())


def is_writable(directory: Path) -> bool:
    """True if files can be made in a directory, or the directory in the nearest existing one."""
    existing = nearest_existing(directory)
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


SIDE = 32
BATCH, HEADS, TOKENS, WIDTH, RANK, GRID = 1, 1, 16, 16, 4, 2


def examine_attention() -> Iterator[Finding]:
    """Yield one finding per implementation: it runs, gradient included, or the reason why not."""
    import torch

    from karat_scale.attention import fourier_karat_attention
    from karat_scale.attention.functional import AUTOMATIC, AUTOMATIC_ON_A_GPU, IMPLEMENTATIONS

    cuda, runs = torch.cuda.is_available(), []
    for name in IMPLEMENTATIONS:
        device = "cuda" if cuda and name != "cpu" else "cpu"
        shapes = [(BATCH, HEADS, TOKENS, WIDTH)] * 3 + [(HEADS, RANK, TOKENS, GRID)] * 2 + [(HEADS, TOKENS, RANK)]
        begun = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a failed build warns, and then raises the same as an error
                tensors = [torch.randn(*shape, device=device, requires_grad=True) for shape in shapes]
                fourier_karat_attention(*tensors, implementation=name).sum().backward()
            runs.append(name)
            text = f"runs on {device}"
        except Exception as error:  # such as a kernel that does not compile or launch
            refusal = str(error).partition("cannot take this call: ")[2]
            text = f"cannot run: {refusal or f'{type(error).__name__}: {on_one_line(str(error))}'}"
        seconds = round(time.perf_counter() - begun, 3)
        figures: dict[str, Any] = {"runs": name in runs, "device": device, "seconds": seconds}
        if name in runs or (name == "triton" and not cuda):
            yield Finding(f"attention {name}", "ok" if name in runs else "note", text, figures=figures)
        else:
            yield found(f"attention {name}", text, "auto uses another; a recipe that names it is refused", **figures)
    chosen = next(name for name in (AUTOMATIC_ON_A_GPU if cuda else AUTOMATIC) if name in runs)
    yield found("attention auto", f"uses {chosen}", chosen=chosen)


def examine_decoders() -> Iterator[Finding]:
    """Yield one finding per decoder of the folder and webdataset backends: it reads a JPEG, or the reason why not."""
    from karat_scale.data.decoders import make_decoder
    from karat_scale.data.decoders.decode import blank_jpeg, crop_view
    from karat_scale.recipe import DataConfig

    runs = []
    for name in DECODERS:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a failed build warns, and then raises the same as an error
                decoder = make_decoder(DataConfig.model_validate({"path": "-", "decoder": name}), "bicubic")
            decoder.read(blank_jpeg(SIDE), lambda width, height: crop_view((0, 0, width, height), SIDE // 2))
        except Exception as error:  # any error of a broken library
            reason = " ".join(str(error).split()).removeprefix(f"data.decoder = {name} cannot run: ")
            yield found(f"decoder {name}", "cannot run", reason, runs=False)
        else:
            runs.append(name)
            yield found(f"decoder {name}", "runs", runs=True)
    if runs:
        yield found("decoder auto", f"uses {runs[0]}", chosen=runs[0])


def examine_machine() -> list[Finding]:
    """Return the findings about software, GPUs and resources. Raises nothing, whatever is missing."""
    examinations = {
        "libraries": examine_libraries,
        "extras": examine_extras,
        "decoders": examine_decoders,
        "attention": examine_attention,
        "GPU": examine_gpus,
        "resources": examine_resources,
    }
    return [finding for name, examination in examinations.items() for finding in examine(name, examination)]
