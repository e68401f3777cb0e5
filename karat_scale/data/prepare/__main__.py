"""Runs one of the scripts by its name in SCRIPTS, as `karat prepare` does."""

import sys

from karat_scale.data.prepare import SCRIPTS
from karat_scale.foundation.errors import run_script
from karat_scale.foundation.tables import load

if __name__ == "__main__":
    name = sys.argv.pop(1)
    sys.argv[0] = f"karat prepare {name}"
    run_script(load(SCRIPTS[name]))
