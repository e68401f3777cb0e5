"""What a small run imports, DeepSpeed for the CPU among it, without the trackers that libraries would import too."""

import importlib

from karat_scale.engine.distributed import tell_deepspeed
from karat_scale.foundation.tables import trackers_hidden

tell_deepspeed("cpu")
with trackers_hidden():
    for name in (
        "deepspeed.runtime.zero.muon.muon_optimizer",
        "karat_scale.commands.evaluate.command",
        "karat_scale.data.backends.images",
        "karat_scale.engine.deepspeed_internals",
        "karat_scale.training.run",
        "karat_scale.training.tasks.classification.task",
    ):
        importlib.import_module(name)
