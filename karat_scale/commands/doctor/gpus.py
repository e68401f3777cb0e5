"""The GPUs and the software that drives them."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from karat_scale.commands.doctor.report import Finding, found
from karat_scale.foundation.errors import one_line

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
