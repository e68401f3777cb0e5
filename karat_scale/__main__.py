"""`python -m karat_scale` is `karat`, for launchers that start modules."""

from karat_scale.commands.cli import entry_point

if __name__ == "__main__":
    entry_point()
