"""Runs join_splits of karat_scale/data/prepare/finished.py, as `karat prepare join` does."""

from karat_scale.data.prepare.finished import join_splits
from karat_scale.foundation.errors import run_script

if __name__ == "__main__":
    run_script(join_splits)
