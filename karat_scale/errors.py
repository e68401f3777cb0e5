"""The errors that a user can fix. Each is one clear line and ends a command with exit code 2."""

from pathlib import Path

# The exit code of a run that saved on a signal and should be run again: sysexits' EX_TEMPFAIL.
EXIT_STOPPED = 75


class UserError(Exception):
    """The user's request cannot be done; the message says what is wrong and how to fix it."""


class RecipeError(UserError):
    """The recipe or an override is wrong."""


class DataError(UserError):
    """The data of the recipe is missing or damaged, or does not fit the recipe."""


class DivergedError(UserError):
    """The loss or the gradients are not finite, and the recipe says to stop."""


class RunDirectoryError(UserError):
    """The run directory or one of its checkpoints does not fit the command."""


def not_written(file: str | Path, error: OSError) -> RunDirectoryError:
    """Return the error for a file of a run that could not be written."""
    return RunDirectoryError(f"{file}: {error.strerror or error}; fix that and run the same command to resume")
