"""Without the extras' libraries: none is loaded before it is asked for, and one line names what to install."""

import subprocess
import sys

from tests.conftest import karat_environment

WITHOUT = """
import sys
import karat_scale.data.backends.dali_pipeline, karat_scale.data.backends.images
assert not any(name.partition(".")[0] in ("nvidia", "ffcv") for name in sys.modules)
sys.modules["nvidia.dali"] = sys.modules["ffcv"] = None  # as Python has it where the import fails

from karat_scale.data.backends import ImageSpec, open_backend
from karat_scale.data.plan import EvalPlan
from karat_scale.foundation.errors import RecipeError
from karat_scale.recipe import AugmentConfig, DataConfig

def opened(backend, path, **fields):
    data = DataConfig(backend=backend, path=path, workers=0, **fields)
    return open_backend(ImageSpec(data, AugmentConfig(), 16, 3, 0))

for backend in ("dali", "ffcv"):
    try:
        opened(backend, sys.argv[1])
    except RecipeError as error:
        print(error)
for path in sys.argv[2:]:
    batches = opened("ffcv", path, decoder="pillow").eval_batches(EvalPlan(11, 4, 0, 1).slices())
    print(sum(int(batch.valid.sum()) for batch in batches))
"""


def without(*paths) -> list[str]:
    command = [sys.executable, "-c", WITHOUT, *map(str, paths)]
    done = subprocess.run(command, env=karat_environment(), capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_error_says_what_to_install_and_another_decoder_reads_betons(betons):
    directory = betons()
    dali, ffcv, counted = without(directory, directory)
    assert dali.startswith("data.backend = dali needs DALI (")
    assert dali.endswith(": pip install -e '.[dali]'")
    assert ffcv.startswith("FFCV cannot be imported (")
    assert (
        "; apt-get install libopencv-dev libturbojpeg0-dev pkg-config g++, then in the clone: pip install -e '.[ffcv]'"
        in ffcv
    )
    assert counted == "11"
