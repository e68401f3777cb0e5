"""Cores, memory, limits and directories that this process may use."""

import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

from karat_scale.commands.doctor.report import Finding, found
from karat_scale.foundation.machine import cpu_quota, usable_cores, usable_memory
from karat_scale.foundation.native_build import cache_directory

GIB = 2**30
SHM = Path("/dev/shm")
SMALL_SHM = GIB
# For open shards, tensors sent by workers, and sockets of the ranks.
FEW_FILES = 1024
CACHE_ROOM = 64 * 2**20


def cache_memory() -> int:
    """Return the bytes that can hold data now: free memory, and the page cache."""
    import psutil  # here, so that a missing psutil is a finding and not a crash

    return min(int(psutil.virtual_memory().available), usable_memory())


def examine_resources() -> Iterator[Finding]:
    """Yield cores, load, RAM, /dev/shm, limits, and the cache of compiled kernels."""
    yield _examine_cores()
    yield _examine_load()
    yield _examine_memory()
    yield _examine_shm()
    yield from _examine_limits()
    yield examine_cache(cache_directory())


def _examine_cores() -> Finding:
    total, usable, quota = os.cpu_count() or 1, usable_cores(), cpu_quota()
    pieces = [f"{usable} of {total} usable"]
    if quota is not None:
        pieces.append(f"a control group allows {quota:g}")
    allocation = {key: os.environ[key] for key in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE") if key in os.environ}
    pieces += [f"{key}={value}" for key, value in allocation.items()]
    fix = ""
    asked = allocation.get("SLURM_CPUS_PER_TASK", "")
    if asked.isdigit() and int(asked) > usable:
        fix = "the step has fewer cores than the job: start it with srun --cpus-per-task=$SLURM_CPUS_PER_TASK"
    elif usable < total and "OMP_NUM_THREADS" not in os.environ and quota is not None:
        fix = f"math libraries do not see a quota: set OMP_NUM_THREADS={usable} when training on the CPU"
    return found("cores", ", ".join(pieces), fix, usable=usable, total=total, quota=quota, slurm=allocation)


def _examine_load() -> Finding:
    load, cores = os.getloadavg()[0], usable_cores()
    fix = "other processes are running and distort the timings: try again later" if load >= cores else ""
    return found("load", f"{load:.1f} in the last minute", fix, minute=load)


def _examine_memory() -> Finding:
    import psutil

    memory, usable, available = psutil.virtual_memory(), usable_memory(), cache_memory()
    text = f"{usable / GIB:.1f} GiB usable, {available / GIB:.1f} GiB available"
    if usable < memory.total:
        text += f" (the machine has {memory.total / GIB:.1f}; a control group limits it)"
    fix = "less than 2 GiB: another process may be using it" if available < 2 * GIB else ""
    return found("RAM", text, fix, usable_bytes=usable, available_bytes=available, total_bytes=int(memory.total))


def _examine_shm() -> Finding:
    if not SHM.is_dir():
        return found("/dev/shm", "missing", "data workers and NCCL need it: mount a tmpfs", wrong=True)
    size, _, free = shutil.disk_usage(SHM)
    text = f"{size / GIB:.2f} GiB, {free / GIB:.2f} free"
    fix = "NCCL uses it: docker run --shm-size=8g (or --ipc=host)" if free < SMALL_SHM else ""
    return found("/dev/shm", text, fix, total_bytes=size, free_bytes=free)


def _examine_limits() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    fix = f"few: ulimit -n {hard if 0 < hard < 65536 else 65536}" if soft < FEW_FILES else ""
    yield found("open files", f"{_limit(soft)} (ulimit -n; up to {_limit(hard)})", fix, soft=soft, hard=hard)
    space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if space != resource.RLIM_INFINITY:
        fix = "CUDA and memory maps need many more addresses than memory: ulimit -v unlimited"
        yield found("address space", f"{space / GIB:.1f} GiB (ulimit -v)", fix, soft=space)


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


def examine_cache(directory: Path) -> Finding:
    """Check that compiled kernels can be stored there."""
    fix = "compiled kernels cannot be stored: set KARAT_CACHE_DIR to a writable directory"
    if not is_writable(directory):
        return found("cache", f"{directory} cannot be written", fix, path=str(directory), writable=False)
    free = shutil.disk_usage(nearest_existing(directory)).free
    if free < CACHE_ROOM:
        return found("cache", f"{directory}: only {free / 2**20:.0f} MiB free", fix, path=str(directory), writable=True)
    return found("cache", f"{directory} can be written", path=str(directory), writable=True)


def nearest_existing(path: Path) -> Path:
    """Return the path itself or the first existing directory above it."""
    path = path.expanduser().absolute()
    return next(part for part in (path, *path.parents) if part.exists())


def is_writable(directory: Path) -> bool:
    """True if files can be made in a directory, or the directory in the nearest existing one."""
    existing = nearest_existing(directory)
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
