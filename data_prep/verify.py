"""Runs karat_scale/data/prepare/verify.py, as `karat prepare verify` does."""

from karat_scale.data.prepare.verify import main
from karat_scale.foundation.errors import run_script

if __name__ == "__main__":
    run_script(main)
