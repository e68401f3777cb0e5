"""Where the folders that ship beside the package are: `ds_configs`, `slurm` and `data_prep`."""

from pathlib import Path


def shipped_directory(name: str) -> Path:
    """The folder `name`: inside the package of an installed wheel, or at the top of a clone."""
    package = Path(__file__).resolve().parent
    installed = package / name
    return installed if installed.is_dir() else package.parent / name
