"""Runs main of karat_scale/data/prepare/fetch.py, as `karat prepare fetch` does."""

from karat_scale.data.prepare.fetch import main
from karat_scale.foundation.errors import run_script

if __name__ == "__main__":
    run_script(main)
