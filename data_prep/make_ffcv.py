"""Runs main of karat_scale/data/prepare/make_ffcv.py, as `karat prepare ffcv` does."""

from karat_scale.data.prepare.make_ffcv import main
from karat_scale.foundation.errors import run_script

if __name__ == "__main__":
    run_script(main)
