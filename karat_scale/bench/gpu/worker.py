"""A section's own process: `python -m karat_scale.bench.gpu.worker SECTION SETTINGS`, alone or a rank of torchrun's."""

import json
import os
import sys
import traceback
from importlib import import_module

from karat_scale.bench.gpu.budget import Budget
from karat_scale.bench.gpu.channel import Channel, one_line
from karat_scale.bench.gpu.machine import machine_facts
from karat_scale.bench.gpu.task import Task


def main(section: str, settings: str) -> None:
    """Measure, and tell what fails; the process ends with exit code 1 then."""
    tell = Channel(os.dup(1))
    os.dup2(2, 1)  # libraries talk on standard output
    given = json.loads(settings)
    task = Task(given["device"], Budget(given["seconds"]), tell, given["batch"])
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        if is_main:
            tell.machine(machine_facts(task.device))
        import_module(f"karat_scale.bench.gpu.{section}").measure(task)
    except Exception as error:
        traceback.print_exc()
        if is_main:
            tell.failed("the section", one_line(error))
        sys.stderr.flush()
        os._exit(1)  # what CUDA and NCCL do on the way out may wait for ever


if __name__ == "__main__":
    main(*sys.argv[1:])
