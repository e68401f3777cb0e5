"""Runs karat_scale/data/prepare/join_splits.py, as `karat prepare join` does."""

from karat_scale.data.prepare.join_splits import main
from karat_scale.foundation.errors import run_script

if __name__ == "__main__":
    run_script(main)
