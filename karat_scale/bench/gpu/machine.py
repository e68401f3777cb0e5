"""What a report says of the machine it was made on."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from karat_scale.doctor.gpus import driver_version
from karat_scale.machine import usable_cores

PACKAGES = ("torch", "triton", "deepspeed", "timm", "torchvision", "nvidia-dali-cuda130", "torchcodec")


def machine_facts(device: str) -> dict[str, Any]:
    """Card, driver, CUDA and versions. On CUDA this process takes the card up."""
    found = {name: installed for name in PACKAGES if (installed := _installed(name))}
    # A build's own version says more, such as 2.13.0+cu130.
    facts = {"cores": usable_cores(), "python": platform.python_version()}
    versions = {**found, "torch": torch.__version__}
    if device == "cpu":
        return {"card": f"CPU with {torch.backends.cpu.get_cpu_capability()}", **facts, "versions": versions}
    properties = torch.cuda.get_device_properties(0)
    return {
        "card": properties.name,
        "cards": torch.cuda.device_count(),
        "capability": f"{properties.major}.{properties.minor}",
        "memory_mb": round(properties.total_memory / 1e6),
        "processors": properties.multi_processor_count,
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **facts,
        "versions": versions,
    }


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
