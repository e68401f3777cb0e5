"""Runs verify of karat_scale/data/prepare/finished.py, as `karat prepare verify` does."""

from karat_scale.data.prepare.finished import verify
from karat_scale.foundation.errors import run_script

if __name__ == "__main__":
    run_script(verify)
