"""Runs karat_scale/data/prepare/make_dali_index.py, as `karat prepare dali-index` does."""

from karat_scale.data.prepare.make_dali_index import main
from karat_scale.foundation.errors import run_script

if __name__ == "__main__":
    run_script(main)
