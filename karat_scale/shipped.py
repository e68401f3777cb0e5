"""The folders that ship beside the package: `ds_configs`, `slurm`, and `data_prep`, which `karat prepare` runs."""

import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from karat_scale.errors import DataError
from karat_scale.stores.urls import is_url


def shipped_directory(name: str) -> Path:
    """The folder `name`: inside the package of an installed wheel, or at the top of a clone."""
    package = Path(__file__).resolve().parent
    installed = package / name
    return installed if installed.is_dir() else package.parent / name


SCRIPTS = {
    "webdataset": "make_webdataset.py",
    "ffcv": "make_ffcv.py",
    "verify": "verify.py",
    "stage": "stage.py",
    "dali-index": "make_dali_index.py",
    "join": "join_splits.py",
    "fetch": "fetch.py",
}


def run_prepare(script: str, arguments: Sequence[str]) -> int:
    """Become the script `script` of `SCRIPTS`: its output, signals and exit code are those of this process."""
    for option, value in itertools.pairwise([word for text in arguments for word in text.split("=", 1)]):
        # The script would say so, too, after seconds of imports.
        if option == "--src" and not is_url(value) and not Path(value).expanduser().exists():
            raise DataError(f"--src {value}: there is no such file or directory")
    path = shipped_directory("data_prep") / SCRIPTS[script]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, str(path), *arguments])
