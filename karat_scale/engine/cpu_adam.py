"""DeepSpeed's AdamW for CPUs, which is compiled when it is first used."""

import fcntl
import shlex
import shutil
import time
from contextlib import suppress
from pathlib import Path

# A build writes files all the time, and compiles none for longer than this.
QUIET_SECONDS = 60.0


def cpu_adam_can_be_built() -> bool:
    """Whether this machine has what it is compiled with. DeepSpeed's own `is_compatible` does not look."""
    from torch.utils.cpp_extension import get_cxx_compiler, is_ninja_available

    return is_ninja_available() and shutil.which(shlex.split(get_cxx_compiler())[0]) is not None


def build_cpu_adam() -> None:
    """Compile it, if that has not been done, one process at a time.

    torch marks a build with a file and waits until that file is gone. A build that was killed leaves its file, and
    every later one would wait forever. Our lock ends with the process that holds it.
    """
    from deepspeed.ops.op_builder import CPUAdamBuilder
    from torch.utils.cpp_extension import _get_build_directory

    builder = CPUAdamBuilder()
    directory = Path(_get_build_directory(builder.name, verbose=False))
    with (directory / "karat.lock").open("w") as lock:
        with suppress(OSError):  # some file systems have no locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        remove_stale_mark(directory)
        builder.load(verbose=False)


def remove_stale_mark(directory: Path) -> None:
    """Remove torch's mark of a build in `directory` if nothing there has changed for QUIET_SECONDS."""
    newest = max((file.stat().st_mtime for file in directory.iterdir() if file.name != "karat.lock"), default=0.0)
    if time.time() - newest > QUIET_SECONDS:
        (directory / "lock").unlink(missing_ok=True)
