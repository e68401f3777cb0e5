"""Prints the memory of a loader and its workers after each epoch.

Run `python -m tests.data.backends.epoch_memory CONFIG EPOCHS`, where CONFIG is a data section in JSON. It is a process
of its own, because the memory of a test process also changes with what earlier tests left behind.
"""

import gc
import json
import sys
from pathlib import Path

import psutil
import torch

from karat_scale.data.backends import ImageSpec, open_backend
from karat_scale.data.plan import TrainPlan
from karat_scale.recipe import AugmentConfig, DataConfig


def resident_mb() -> float:
    """Return the memory of this process and its workers in MB.

    Pages of files are left out, since pages of libraries come and go with other programs.
    """
    gc.collect()
    process = psutil.Process()
    lines = [
        line.split()
        for each in [process, *process.children(recursive=True)]
        for line in Path(f"/proc/{each.pid}/status").read_text().splitlines()
    ]
    return sum(int(line[1]) for line in lines if line[0] in ("RssAnon:", "RssShmem:")) / 1e3


def main(config: str, epochs: int) -> None:
    opened = open_backend(ImageSpec(DataConfig.model_validate_json(config), AugmentConfig(), 128, 4, 0))
    plan = TrainPlan(0, opened.num_train, 16, 16, 0, 1)
    after: list[float] = []
    for number, batch in enumerate(opened.train_batches(plan.slices(0, epochs * plan.steps_per_epoch)), start=1):
        assert batch.images.dtype == torch.uint8
        if number % plan.steps_per_epoch == 0:
            after.append(resident_mb())
    opened.close()
    print(json.dumps(after))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
