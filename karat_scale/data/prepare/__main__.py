"""Runs one of the scripts by its name in SCRIPTS, as `karat prepare` does."""

import sys

from karat_scale.data.prepare import SCRIPTS
from karat_scale.foundation.errors import run_script
from karat_scale.foundation.tables import load

if __name__ == "__main__":
    run_script(load(SCRIPTS[sys.argv.pop(1)]))
