"""The errors that a user can fix. Each is one clear line and ends a command with exit code 2.

Also: the nearest known name for an unknown one, and how a failed allocation is recognised, on the CPU and on a GPU.
"""

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from difflib import SequenceMatcher
from pathlib import Path
from typing import NoReturn

from karat_scale.foundation.console import printable

# The exit code of a run that saved on a signal and should be run again: sysexits' EX_TEMPFAIL.
EXIT_STOPPED = 75
# The exit code of a rank that lost another one, so that it does not count as the first to fail: EX_PROTOCOL.
EXIT_LOST_PEER = 76
# As a shell says that Ctrl-C ended a command.
EXIT_INTERRUPTED = 130
INTERRUPTED = "stopped; run the same command again"


class UserError(Exception):
    """The user's request cannot be done; the message says what is wrong and how to fix it."""


class RecipeError(UserError):
    """The recipe or an override is wrong. A command prints a line for each mistake; as text they are one line."""

    def __init__(self, *mistakes: str) -> None:
        super().__init__("; ".join(mistakes))
        self.mistakes = mistakes


class DataError(UserError):
    """The data of the recipe is missing or damaged, or does not fit the recipe."""


class DivergedError(UserError):
    """The loss or the gradients are not finite, and the recipe says to stop."""


class RunDirectoryError(UserError):
    """The run directory or one of its checkpoints does not fit the command."""


class OtherModelError(RecipeError, RunDirectoryError):
    """Tensors are not those of the recipe's model; the message names the first one that differs."""


class PeerError(Exception):
    """Another rank has failed or is gone, so this one ends too: one line and exit code 76."""


def not_written(file: str | Path, error: OSError) -> RunDirectoryError:
    """Return the error for a file of a run that could not be written; raise that of a file server, which may pass."""
    if error.errno in FAULTS_OF_SERVERS:
        error.filename = error.filename or str(file)
        raise error
    return RunDirectoryError(f"{file}: {error.strerror or error}; fix that and run the same command to resume")


def one_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or the name of its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def on_one_line(text: str) -> str:
    """Return a message as one line that no terminal acts on."""
    return printable(" ".join(text.split()))


_LACKS = {
    errno.EMFILE: "too few file descriptors; raise `ulimit -n`, or use fewer workers",
    errno.ENFILE: "too few file descriptors on this machine; use fewer workers",
    errno.EAGAIN: "no more processes or threads; raise `ulimit -u` or the control group's limit, or use fewer workers",
    errno.ENOMEM: "out of memory; use fewer workers or smaller batches",
}
# What libraries say instead of an OSError.
_WORDS = {
    "can't start new thread": errno.EAGAIN,
    "Resource temporarily unavailable": errno.EAGAIN,
    "Too many open files": errno.EMFILE,
    "Cannot allocate memory": errno.ENOMEM,
    "can't allocate memory": errno.ENOMEM,
}
# What CUDA's driver, its libraries and cuDNN 9 say if a GPU's memory is full.
_SIGNS_OF_GPU = ("out of memory", "_STATUS_ALLOC_FAILED", "_ALLOCATION_FAILED")
_GPU_LACKS = "out of GPU memory; end what else uses it, choose another GPU by CUDA_VISIBLE_DEVICES, or lower the batch"


FAULTS_OF_SERVERS = {errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOTCONN}
"""The errors of a network file system that may pass."""


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception, and then the chain of its causes."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        seen.append(cause)
        yield cause
        cause = cause.__cause__ or cause.__context__


def of_the_machine(error: BaseException) -> tuple[str, int] | None:
    """Return a line and an exit code for what a machine lacks or its file system refuses; None for any other error.

    The code is 1 where the machine lacks something or a file server has a fault, and 2 where a file is not what the
    user thought, or where a GPU's memory is full.
    """
    for cause in causes(error):
        if isinstance(cause, MemoryError):
            return _LACKS[errno.ENOMEM], 1
        if isinstance(cause, RuntimeError) and any(sign in str(cause) for sign in _SIGNS_OF_GPU):
            return _GPU_LACKS, 2
        number = cause.errno if isinstance(cause, OSError) else None
        if number is None:  # also an OSError of a data worker, which torch makes anew of its text
            number = next((number for words, number in _WORDS.items() if words in str(cause)), None)
        if number in _LACKS:
            return _LACKS[number], 1
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{str(error.filename)[:200]}: {error.strerror}", 1 if error.errno in FAULTS_OF_SERVERS else 2
    if isinstance(error, RuntimeError) and "home directory" in str(error):
        return "a path begins with ~, but its home directory is not known; write it without ~, or set HOME", 2
    return None


def say_in_one_write(line: str) -> None:
    """Write a line to standard error in one call; if that fails, do nothing.

    Where Python does not buffer, `print` writes the end of a line separately, and the lines of several ranks mix.
    """
    with suppress(OSError):
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


@contextmanager
def ctrl_c_quits() -> Iterator[None]:
    """End the process at once on Ctrl-C inside the block, which imports: an exception could get into C++ and abort."""

    def end(*_: object) -> NoReturn:
        say_in_one_write(f"error: {INTERRUPTED}")
        os._exit(EXIT_INTERRUPTED)

    usual = signal.getsignal(signal.SIGINT)
    if usual is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


def run_script(main: Callable[[], int | None]) -> NoReturn:
    """Run a script and exit with its code; 2 with one line on stderr for what the user can fix, 130 for Ctrl-C."""
    try:
        sys.exit(main() or 0)
    except UserError as error:
        code, message = 2, str(error)
    except OSError as error:
        code, message = 2, _described(error)
    except KeyboardInterrupt:
        code, message = EXIT_INTERRUPTED, INTERRUPTED
    say_in_one_write(f"error: {on_one_line(message)}")
    sys.exit(code)


def _described(error: OSError) -> str:
    reason = error.strerror or error
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error.filename or '--out'}: {reason}; free space there and run the same command again"
    return f"{error.filename or 'the system'}: {reason}"


# Beside the exceptions' own classes: torch's CPU allocator, a GPU, C++.
_SIGNS = ("can't allocate memory", *_SIGNS_OF_GPU, "std::bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """True if an exception says that there was not enough memory."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def nearest(name: str, names: Iterable[str], count: int = 1, likeness: float = 0.6) -> list[str]:
    """Return at most `count` of `names`, the most similar first, whose beginning is similar enough to `name`.

    The beginning is compared first: people omit the long endings of model names, and seldom mistype the start.
    """
    scores = {other: (_ratio(other[: len(name)], name), _ratio(other, name)) for other in names}
    alike = [other for other in scores if scores[other][0] >= likeness]
    return sorted(alike, key=lambda other: scores[other], reverse=True)[:count]


def did_you_mean(name: str, names: Iterable[str], otherwise: str = "", likeness: float = 0.6) -> str:
    """Return a hint for an unknown name: the nearest of `names`, or `otherwise` if none is similar enough."""
    names = [*names]
    close = ["cuda"] if name == "gpu" and "cuda" in names else nearest(name, names, likeness=likeness)
    return f"did you mean {close[0]}?" if close else otherwise


def _ratio(one: str, other: str) -> float:
    return SequenceMatcher(None, one, other).ratio()
