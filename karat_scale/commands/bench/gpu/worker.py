"""A section's own process, alone or a rank of torchrun's.

python -m karat_scale.commands.bench.gpu.worker SECTION SETTINGS
"""

import json
import os
import platform
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from karat_scale.commands.bench.gpu.process import Channel, one_line
from karat_scale.commands.bench.gpu.sections import SECTIONS
from karat_scale.commands.bench.gpu.task import Budget, Task
from karat_scale.commands.bench.gpu.watch import watch
from karat_scale.commands.doctor.gpus import driver_version
from karat_scale.commands.doctor.software import installed_version
from karat_scale.data.loading.workers import be_killed_with_parent
from karat_scale.foundation.machine import usable_cores

PACKAGES = ("torch", "triton", "deepspeed", "timm", "torchvision", "nvidia-dali-cuda130", "torchcodec")


def machine_facts(device: str) -> dict[str, Any]:
    """Card, driver, CUDA and versions. On CUDA this process takes the card up."""
    found = {name: installed for name in PACKAGES if (installed := installed_version(name))}
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


def main(section: str, settings: str) -> None:
    """Measure; on a failure, report it and exit with code 1."""
    be_killed_with_parent()
    channel = Channel(os.dup(1))
    os.dup2(2, 1)  # libraries talk on standard output
    given = json.loads(settings)
    task = Task(given["device"], Budget(given["seconds"]), channel, Path(given["scratch"]), given["batch"])
    watch(channel, task.device)
    try:
        if os.environ.get("RANK", "0") == "0":
            channel.machine(machine_facts(task.device))
        import_module(f"karat_scale.commands.bench.gpu.{SECTIONS[section].module}").measure(task)
    except Exception as error:
        traceback.print_exc()
        channel.ended(one_line(error))
        sys.stderr.flush()
        os._exit(1)  # what CUDA and NCCL do on the way out may wait for ever


if __name__ == "__main__":
    main(*sys.argv[1:])
