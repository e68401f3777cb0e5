"""Runs make_dali_index of karat_scale/data/prepare/finished.py, as `karat prepare dali-index` does."""

from karat_scale.data.prepare.finished import make_dali_index
from karat_scale.foundation.errors import run_script

if __name__ == "__main__":
    run_script(make_dali_index)
