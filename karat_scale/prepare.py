"""`karat prepare`: the scripts of `data_prep`, from a clone or from an installed wheel."""

import os
import sys
from collections.abc import Sequence

from karat_scale.shipped import shipped_directory

SCRIPTS = {
    "webdataset": "make_webdataset.py",
    "ffcv": "make_ffcv.py",
    "verify": "verify.py",
    "stage": "stage.py",
    "dali-index": "make_dali_index.py",
    "join": "join_splits.py",
    "fetch": "fetch.py",
}


def prepare(script: str, arguments: Sequence[str]) -> int:
    """Become the script `script` of `SCRIPTS`: its output, signals and exit code are those of this process."""
    path = shipped_directory("data_prep") / SCRIPTS[script]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, str(path), *arguments])
