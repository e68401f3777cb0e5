"""Runs main of karat_scale/data/prepare/make_webdataset.py, as `karat prepare webdataset` does."""

from karat_scale.data.prepare.make_webdataset import main
from karat_scale.foundation.errors import run_script

if __name__ == "__main__":
    run_script(main)
