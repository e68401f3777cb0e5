"""Runs karat_scale/data/prepare/stage.py, as `karat prepare stage` does."""

from karat_scale.data.prepare.stage import main
from karat_scale.foundation.errors import run_script

if __name__ == "__main__":
    run_script(main)
