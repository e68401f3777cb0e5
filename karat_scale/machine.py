"""Cores and memory that this process may use, within the limits of control groups (versions 1 and 2)."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
# Version 1 writes the largest multiple of a page for "no limit".
UNLIMITED = 1 << 60


def usable_cores() -> int:
    """Return the cores that may run this process: affinity (set by SLURM or taskset), and a control group's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def usable_memory() -> int:
    """Return the most bytes of RAM that this process may use."""
    import psutil  # here, so that the doctor reports its absence and does not crash

    total = int(psutil.virtual_memory().total)
    return min(total, memory_limit() or total)


def cpu_quota(root: Path = ROOT, membership: Path = MEMBERSHIP) -> float | None:
    """Return the CPU time, in cores, that the tightest group allows, or None if no group limits it."""
    quotas: list[float] = []
    for directory in _directories(root, membership, "cpu"):
        words = (_text(directory / "cpu.max") or "").split()
        if not words:
            quota, period = _text(directory / "cpu.cfs_quota_us"), _text(directory / "cpu.cfs_period_us")
            words = [quota, period] if quota and period else []
        if len(words) == 2 and words[0] not in ("max", "-1"):
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def memory_limit(root: Path = ROOT, membership: Path = MEMBERSHIP) -> int | None:
    """Return the bytes that the tightest group allows, or None if no group limits them."""
    limits: list[float] = []
    for directory in _directories(root, membership, "memory"):
        text = _text(directory / "memory.max") or _text(directory / "memory.limit_in_bytes")
        limits.append(int(text) if text and text != "max" else math.inf)
    tightest = min(limits, default=math.inf)
    return int(tightest) if tightest < UNLIMITED else None


def _directories(root: Path, membership: Path, controller: str) -> Iterator[Path]:
    """Yield the groups of this process for a controller, and those above. A container may show its own as the root."""
    for line in (_text(membership) or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top = root
        elif controller in controllers.split(","):
            top = next((p for p in (root / controllers, root / controller) if p.is_dir()), root / controller)
        else:
            continue
        group = Path(path.lstrip("/"))
        yield from (top / part for part in (group, *group.parents))


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
