"""This machine: its limits, the GPUs we know, its local disk for caches, and the launcher that started this process.

Cores and memory are those that this process may use, within the limits of control groups (versions 1 and 2).

Triton and TorchInductor keep what they compile on a disk of the node. Triton's default is in the home directory. On a
cluster that is a network file system, where all ranks of a job look for, write and rename hundreds of small files at
the same moment.

The versions are those of the libraries that decide what a run computes.

A launcher is torchrun, `karat launch` or `karat sweep`. A run ends with it, and a process of ours ends with the one
that started it.
"""

import contextlib
import ctypes
import importlib
import math
import os
import platform
import re
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Generic, TypeVar

from karat_scale import __version__
from karat_scale.foundation.errors import UserError, nearest
from karat_scale.foundation.native_build import cpu_flags, cpuinfo, home

T = TypeVar("T")
ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
# Version 1 writes the largest multiple of a page for "no limit".
UNLIMITED = 1 << 60
_PR_SET_PDEATHSIG = 1
_LIBRARIES = ("torch", "timm", "deepspeed")


def library_versions() -> dict[str, str]:
    """Return the versions of this package and of the libraries, without importing these."""
    return {"karat_scale": __version__, **{name: _version(name) for name in _LIBRARIES}}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        os.close(os.open(os.devnull, os.O_RDONLY))  # raises where no descriptor is left to read a package's record
        raise


def be_killed_with_parent() -> None:
    """Let the kernel end this process with the thread that started it, even while it is stopped (SIGSTOP)."""
    with contextlib.suppress(OSError, AttributeError):  # no Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)
"""The signals that ask a run to save and stop. SIGHUP comes when a terminal or an ssh connection is closed."""


def catch_stop_signals(handler: Callable[[int, Any], Any]) -> dict[signal.Signals, Any]:
    """Let `handler` handle the stop signals, except a SIGHUP that nohup ignores; returns the previous handlers."""
    is_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    caught = [number for number in STOP_SIGNALS if not (is_ignored and number == signal.SIGHUP)]
    return {number: signal.signal(number, handler) for number in caught}


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Catch the stop signals inside the context; yields the numbers of those that have come."""
    told: list[int] = []
    before = catch_stop_signals(lambda number, _: told.append(number))
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def this_node() -> str:
    """Return this node's name; under SLURM, the one that SLURM uses."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


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


def processor_name() -> str:
    """Return the kernel's name for this machine's processor; if it has none, the architecture."""
    return cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_has_bf16() -> bool:
    """Return whether the processor has instructions that multiply bf16; True if nothing is known."""
    flags = cpu_flags()
    return not flags or bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


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
    """Yield this process's groups for a controller, and those above. A container may show its own group as the root."""
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


PRECISIONS = ("fp32", "tf32", "bf16", "fp16")


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    `peaks` holds FLOP/s by precision, with sums in fp32; it leaves out precisions that the matrix units lack.
    """

    key: str
    cuda_name: str
    """The end of `torch.cuda.get_device_name`."""
    memory_bytes: int
    bandwidth: float
    """Bandwidth of its memory, in bytes per second."""
    peaks: dict[str, float]

    @property
    def has_triton(self) -> bool:
        """Whether our Triton kernels run on it: from Ampere on, whose matrix units have bf16."""
        return "bf16" in self.peaks


def find_gpu(name: str) -> Gpu | None:
    """Return the GPU with a key such as "h100-80" or with a name that CUDA reports; None if it is not in the table.

    A slice of a GPU (MIG) and a variant (Laptop, D) have longer names, and are not in the table.
    """
    for gpu in GPUS:
        if name == gpu.key or re.search(rf"\b{re.escape(gpu.cuda_name)}$", name):
            return gpu
    return None


_OTHER_GPU = "For any other card, use karat plan RECIPE --memory GB"


# The variant that most machines with such a card have: with NVLink and the larger memory.
_USUAL = {"h100": "h100-80", "a100": "a100-80"}


def known_gpu(name: str) -> Gpu:
    """Return the GPU of that name, or the usual or only one that begins with it. Raises UserError that lists names."""
    keys = [gpu.key for gpu in GPUS]
    alike = [key for key in keys if key.startswith(f"{name.lower()}-")]
    gpu = find_gpu(_USUAL.get(name.lower(), name)) or (find_gpu(alike[0]) if len(alike) == 1 else None)
    if gpu is None:
        close = alike or nearest(name.lower(), keys, count=3)
        known = f"; did you mean {' or '.join(close)}?" if close else f" ({', '.join(keys)})."
        raise UserError(f"--gpu {name}: not in the table{known} {_OTHER_GPU}")
    return gpu


def _gpu(key: str, cuda_name: str, gib: float, gb_s: float, *teraflops: float | None) -> Gpu:
    known = zip(PRECISIONS, teraflops, strict=True)
    peaks = {precision: 1e12 * peak for precision, peak in known if peak is not None}
    return Gpu(key, cuda_name, int(gib * 2**30), 1e9 * gb_s, peaks)


# Peaks and bandwidths are those of NVIDIA's data sheets and architecture white papers, named above each group of rows,
# without sparsity (some sheets print only the sparse figure, which is twice this). Memory is about what CUDA reports,
# as published out-of-memory messages show it: less than on the sheet.
# The columns: GiB, GB/s, then TFLOP/s in fp32, TF32, bf16 and fp16.
GPUS = (
    # HGX B200 data sheet (an eighth of the board); the RTX Blackwell white paper.
    _gpu("b200-180", "B200", 178.3, 7700, 75.0, 1125.0, 2250.0, 2250.0),
    _gpu("rtx5090-32", "RTX 5090", 31.3, 1792, 104.8, 104.8, 209.5, 209.5),
    # H200, H100 and GH200 data sheets; the H100 white paper.
    _gpu("gh200-96", "GH200 480GB", 94.5, 4000, 66.9, 494.7, 989.4, 989.4),
    _gpu("h200-141", "H200", 139.7, 4800, 66.9, 494.7, 989.4, 989.4),
    _gpu("h100-nvl-94", "H100 NVL", 93.0, 3900, 60.0, 417.5, 835.5, 835.5),
    _gpu("h100-pcie-80", "H100 PCIe", 79.1, 2000, 51.2, 378.0, 756.0, 756.0),
    _gpu("h100-80", "H100 80GB HBM3", 79.1, 3350, 66.9, 494.7, 989.4, 989.4),
    # A100, A30, A10, A40 and RTX A6000 data sheets; AWS's page on G5 instances for the A10G.
    _gpu("a100-80", "A100-SXM4-80GB", 79.1, 2039, 19.5, 156.0, 312.0, 312.0),
    _gpu("a100-40", "A100-SXM4-40GB", 39.4, 1555, 19.5, 156.0, 312.0, 312.0),
    _gpu("a100-pcie-80", "A100 80GB PCIe", 79.1, 1935, 19.5, 156.0, 312.0, 312.0),
    _gpu("a100-pcie-40", "A100-PCIE-40GB", 39.4, 1555, 19.5, 156.0, 312.0, 312.0),
    _gpu("a30-24", "A30", 23.5, 933, 10.3, 82.0, 165.0, 165.0),
    _gpu("a10g-24", "A10G", 22.0, 600, 35.0, 35.0, 70.0, 70.0),
    _gpu("a10-24", "A10", 22.0, 600, 31.2, 62.5, 125.0, 125.0),
    _gpu("a40-48", "A40", 44.3, 696, 37.4, 74.8, 149.7, 149.7),
    _gpu("a6000-48", "RTX A6000", 47.4, 768, 38.7, 77.4, 154.8, 154.8),
    # L4, L40 and L40S data sheets; the Ada white paper.
    _gpu("l40s-48", "L40S", 44.4, 864, 91.6, 183.0, 362.1, 362.1),
    _gpu("l40-48", "L40", 44.4, 864, 90.5, 90.5, 181.1, 181.1),
    _gpu("l4-24", "L4", 22.0, 300, 30.3, 60.0, 121.0, 121.0),
    _gpu("rtx4090-24", "RTX 4090", 23.6, 1008, 82.6, 82.6, 165.2, 165.2),
    # The GA102 white paper; V100 and T4 data sheets, whose matrix units have only fp16.
    _gpu("rtx3090-24", "RTX 3090", 23.6, 936, 35.6, 35.6, 71.0, 71.0),
    _gpu("v100-32", "V100-SXM2-32GB", 31.7, 900, 15.7, None, None, 125.0),
    _gpu("v100-16", "V100-SXM2-16GB", 15.7, 900, 15.7, None, None, 125.0),
    _gpu("t4-16", "T4", 14.6, 320, 8.1, None, None, 65.0),
)


def gpu_faults() -> list[str] | None:
    """Return a line on each GPU of this node that is not sound, by NVML; None if NVML does not answer.

    NVML reports errors that the memory could not correct, rows of memory that wait for a reset to be replaced, clocks
    that are lowered by heat or a lack of power, and missing lanes and links.
    """
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except Exception:  # of a kind that only the library has
        return None
    try:
        gpus = [nvml.nvmlDeviceGetHandleByIndex(number) for number in range(nvml.nvmlDeviceGetCount())]
        found = [", ".join(filter(None, _gpu_faults(nvml, gpu))) for gpu in gpus]
    except nvml.NVMLError:
        return None
    finally:
        nvml.nvmlShutdown()
    return [f"GPU {number} on {this_node()}: {faults}" for number, faults in enumerate(found) if faults]


def _gpu_faults(nvml: Any, gpu: Any) -> Iterator[str]:
    def ask(name: str, *more: Any) -> Any:
        try:
            return getattr(nvml, f"nvmlDeviceGet{name}")(gpu, *more)
        except nvml.NVMLError:  # not every GPU and driver knows everything
            return None

    if errors := ask("TotalEccErrors", nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC):
        yield f"{errors} memory errors that ECC could not correct"
    _, _, is_pending, has_failed = ask("RemappedRows") or (0, 0, 0, 0)
    yield "its memory needs a reset of the GPU to replace a row" if is_pending else ""
    yield "its memory has no row left to replace a bad one" if has_failed else ""
    slow = nvml.nvmlClocksThrottleReasonHwSlowdown | nvml.nvmlClocksThrottleReasonSwThermalSlowdown
    yield "heat or a lack of power lowers its clock" if (ask("CurrentClocksThrottleReasons") or 0) & slow else ""
    lanes, most = ask("CurrPcieLinkWidth"), ask("MaxPcieLinkWidth")
    yield f"{lanes} of {most} PCIe lanes" if lanes and most and lanes < most else ""
    links = [state for number in range(nvml.NVML_NVLINK_MAX_LINKS) if (state := ask("NvLinkState", number)) is not None]
    yield f"{sum(map(bool, links))} of {len(links)} NVLinks" if any(links) and not all(links) else ""


def may_have_gpu() -> bool:
    """Return whether a driver of NVIDIA or AMD, or that of WSL, is there. It does not import torch."""
    return any(Path("/dev", name).exists() for name in ("nvidiactl", "nvidia0", "kfd", "dxg"))


MOUNTS = Path("/proc/mounts")
NETWORK_FILE_SYSTEMS = (
    *("afs", "beegfs", "ceph", "cifs", "fhgfs", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "orangefs"),
    *("panfs", "pvfs2", "smb3", "smbfs", "sshfs", "wekafs"),
)


def number_in(environ: Mapping[str, str], name: str, default: str = "") -> int:
    """Return a whole number of the launcher. Raises UserError if it is no number."""
    text = environ.get(name) or default
    if not text.isdecimal():
        raise UserError(f"{name} = {text!r}: should be a whole number; unset it, or correct the launcher")
    return int(text)


def launch_environment(environ: Mapping[str, str]) -> tuple[int, int, int]:
    """Return (rank, world size, local rank) as torchrun or srun set them; (0, 1, 0) for a process on its own.

    Raises UserError if one of them is no number, if the rank is not below the world size, or if it is not set.
    """
    number = partial(number_in, environ)
    if "RANK" in environ and "WORLD_SIZE" in environ:
        rank, size = number("RANK"), number("WORLD_SIZE")
        if rank >= size:
            raise UserError(f"RANK = {rank}: should be less than WORLD_SIZE = {size}; correct the launcher")
        return rank, size, number("LOCAL_RANK", "0")
    # Only a step started by srun has this; the batch script and `salloc` shells do not.
    if (tasks := number("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return number("SLURM_PROCID"), tasks, number("SLURM_LOCALID")
    if (size := number("WORLD_SIZE", "1")) > 1:
        fix = f"use karat launch --ranks {size} COMMAND, torchrun or srun, which set it, or unset WORLD_SIZE"
        raise UserError(f"WORLD_SIZE = {size}, but RANK is not set; {fix}")
    return 0, 1, 0


def ask_squeue(job: str, what: str) -> str | None:
    """Return squeue's answer on a job, in a format such as `%T`; None if squeue is missing or does not know the job."""
    if shutil.which("squeue") is None:
        return None
    command = ["squeue", "--noheader", f"--jobs={job}", f"--format={what}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return next(iter(done.stdout.split()), None) if done.returncode == 0 else None


def use_local_caches(environ: MutableMapping[str, str] = os.environ, mounts: Path = MOUNTS) -> None:
    """Set TRITON_CACHE_DIR and TORCHINDUCTOR_CACHE_DIR to directories of this node if their defaults are elsewhere.

    What the user set stays. A default stays if it is on a local disk and can be written. Call it before Triton or
    Inductor is imported. All ranks of a node share the directories: both libraries rename complete files into place.
    """
    base = Path(environ.get("TRITON_HOME") or home())
    defaults = {"TRITON_CACHE_DIR": base / ".triton" / "cache", "TORCHINDUCTOR_CACHE_DIR": Path(tempfile.gettempdir())}
    poor = []
    for name, directory in defaults.items():
        # Not Path.exists, which raises where a folder above may not be searched.
        there = next(parent for parent in (directory, *directory.parents) if os.access(parent, os.F_OK))
        can_be_written = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
        if not environ.get(name) and not (can_be_written and is_local(directory, mounts)):
            poor.append(name)
    if poor and (local := local_directory(mounts)) is not None:
        for name in poor:
            environ[name] = str(local / name.partition("_")[0].lower())


def is_local(path: Path, mounts: Path = MOUNTS) -> bool:
    """True if a path, which need not exist, is not on a network file system, or if the system does not say."""
    try:
        lines = [line.split() for line in mounts.read_text().splitlines()]
    except OSError:
        return True
    real, best, kind = path.resolve(), Path(), ""
    for _, point, its_kind, *_ in lines:
        mounted = Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), point))
        # A later mount hides an earlier one at the same place.
        if real.is_relative_to(mounted) and len(mounted.parts) >= len(best.parts):
            best, kind = mounted, its_kind
    return kind.removeprefix("fuse.") not in NETWORK_FILE_SYSTEMS


def local_directory(mounts: Path = MOUNTS) -> Path | None:
    """Return a directory on this node that only this user can write, since it holds code to load; None without one."""
    for base in dict.fromkeys((tempfile.gettempdir(), "/tmp", "/dev/shm")):
        directory = Path(base) / f"karat-{os.getuid()}"
        if not is_local(directory, mounts):
            continue
        try:
            directory.mkdir(mode=0o700, exist_ok=True)
            found = directory.lstat()
        except OSError:
            continue
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
            return directory
    return None


class Background(Generic[T]):
    """Work in the background, in a thread that does not outlive the process."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._value: T
        self._error: BaseException | None = None
        self.seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="background", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        begun = time.monotonic()
        try:
            self._value = self._work()
        except BaseException as error:
            self._error = error
        self.seconds = time.monotonic() - begun

    def wait(self, seconds: float) -> bool:
        """Wait at most `seconds` for the work to end; return whether it has."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def result(self) -> T:
        """Return what the finished work returned; raise what it raised."""
        if self._error is not None:
            raise self._error
        return self._value


LAUNCHED = "KARAT_LAUNCHED"
"""`karat launch` sets it for its ranks, `karat sweep` for its runs."""


class Launcher:
    """The parent process, if it is a launcher. Any other parent may end: a shell, or `nohup`."""

    def __init__(self) -> None:
        self._pid = os.getppid() if {"TORCHELASTIC_RUN_ID", LAUNCHED} & os.environ.keys() else None

    @property
    def is_there(self) -> bool:
        """Whether such a launcher started this process."""
        return self._pid is not None

    @property
    def is_gone(self) -> bool:
        """Whether the launcher has ended, which leaves this process to another parent."""
        return self._pid is not None and os.getppid() != self._pid


# Made when `karat` starts: a launcher that is killed while torch is imported must be missed too.
LAUNCHER = Launcher()
