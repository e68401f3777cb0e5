"""The imports of a small run, without the trackers that libraries would import too.

DeepSpeed is imported here only on a machine without a GPU: an import is for one kind of device, which a run may choose.
"""

import importlib
import signal
from pathlib import Path

from karat_scale.engine.distributed import tell_deepspeed
from karat_scale.foundation.tables import trackers_hidden

# A run in the tests' own process blocks a signal, which this process would inherit.
signal.pthread_sigmask(signal.SIG_SETMASK, [])
modules = [
    "karat_scale.commands.evaluate.command",
    "karat_scale.data.backends.images",
    "karat_scale.engine.deepspeed_internals",
    "karat_scale.training.run",
    "karat_scale.training.tasks.classification.task",
]
if not Path("/dev/nvidiactl").exists():
    tell_deepspeed("cpu")
    modules.append("deepspeed.runtime.zero.muon.muon_optimizer")
with trackers_hidden():
    for name in modules:
        importlib.import_module(name)
