"""The errors a user can mend. Each is one clear line and ends a command with exit code 2."""

from pathlib import Path

# Of a run that saved on a signal, "run me again": sysexits' EX_TEMPFAIL.
EXIT_STOPPED = 75


class UserError(Exception):
    """Something the user asked for cannot be done as asked; the message says what and how to mend it."""


class RecipeError(UserError):
    """The recipe, or an override of it, is wrong."""


class DataError(UserError):
    """The data the recipe names is missing, damaged or does not fit the recipe."""


class DivergedError(UserError):
    """Training left the finite numbers, and the recipe says to end there."""


class RunDirectoryError(UserError):
    """The run directory or a checkpoint in it does not fit what was asked."""


def not_written(file: str | Path, error: OSError) -> RunDirectoryError:
    """A file of a run that the disk did not take, as an error to raise."""
    return RunDirectoryError(f"{file}: {error.strerror or error}; mend that and run the same command to go on")
