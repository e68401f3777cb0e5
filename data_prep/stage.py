"""Runs stage of karat_scale/data/prepare/finished.py, as `karat prepare stage` does."""

from karat_scale.data.prepare.finished import stage
from karat_scale.foundation.errors import run_script

if __name__ == "__main__":
    run_script(stage)
