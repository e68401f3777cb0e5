"""Loads the library of a C++ source: the one that a wheel has beside it, or else one that is compiled at first use.

A source names what it is built with in a line of its own, such as "// Build with: portable -ljpeg". hatch_build.py
reads it too, and puts the libraries of all instruction sets into a wheel.

A library that is compiled here stays in a cache. Its name has a digest of all that it depends on, so nodes of different
kinds can share a home directory. It is built under a file lock into a temporary name and renamed, so ranks that start
together build it once.
"""

import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import tempfile
import threading
import warnings
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c")
COMPILERS = ("g++", "c++", "clang++")
# Debian's packages for our sources.
PACKAGES = "g++ libjpeg-dev"
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-ffp-contract=fast")
# For KARAT_SANITIZE, such as address,undefined: a finding ends the process and names its line.
SANITIZER_FLAGS = ("-O1", "-g", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all")
# What each instruction set needs beyond plain x86-64, in the order of preference, and what every aarch64 has.
INSTRUCTION_SETS = {
    "amx": (*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
    "avx512bf16": (*AVX512, "-mavx512bf16"),
    "avx512": AVX512,
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "neon": ("-march=armv8-a",),
}
# What every CPU runs, for sources that are written for it too.
PLAIN = "plain"
BUILD_SECONDS = 300
DIGEST_BYTES = 32
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_TRUSTED_OWNERS = (0, os.getuid()) if hasattr(os, "getuid") else ()


class LoadError(Exception):
    """The kernel cannot run on this machine. The message says why and how to fix it."""


def load(source: Path, what: str) -> ctypes.CDLL:
    """Return the compiled source, for the instruction set in KARAT_CPU_ISA or else the best that this CPU has.

    Args:
        source: a C++ file; the headers of ours that it includes (*.h) are in its folder.
        what: the name of what the source provides, for the warning when the build fails.

    What is compiled here is kept under KARAT_CACHE_DIR, by default ~/.cache/karat_scale. Raises LoadError. A failed
    attempt is not repeated in this process. The first failure for lack of a compiler, library or cache warns.
    """
    with _one_at_a_time:
        found = _load_or_reason(source, what, os.environ.get("KARAT_CPU_ISA", ""))
    if isinstance(found, str):
        raise LoadError(found)
    return found


_one_at_a_time = threading.Lock()


@functools.cache
def _load_or_reason(source: Path, what: str, requested: str) -> ctypes.CDLL | str:
    _, portable = build_arguments(source)
    available = (*_available_instruction_sets(), *((PLAIN,) if portable else ()))
    if not available:
        return "it needs Linux and an x86-64 CPU with AVX2 or AVX-512, or an aarch64 CPU"
    if requested and requested not in available:
        return f"KARAT_CPU_ISA = {requested!r}: this CPU offers {', '.join(available)}"
    for isa in (requested,) if requested else available:
        # An old compiler may know the second best only.
        try:
            return _load(source, isa)
        except (LoadError, OSError) as error:
            reason = f"its kernel cannot be built or loaded: {error}"
    warnings.warn(f"{what} is not available: {reason}", stacklevel=2)
    return reason


def build_arguments(source: Path) -> tuple[list[str], bool]:
    """Return the compiler and linker options besides FLAGS, and whether it needs no instruction set ("portable")."""
    line = re.search(r"^// Build with: (.*)$", source.read_text(), re.MULTILINE)
    words = line[1].split() if line else []
    return [word for word in words if word.startswith("-")], "portable" in words


def in_the_package(source: Path, isa: str) -> Path:
    """Return the path of the compiled source in a wheel."""
    return source.with_name(f"{source.stem}-{isa}.so")


def is_in_the_package() -> bool:
    """Return whether this installation is of a wheel with compiled libraries."""
    return any(Path(__file__).parents[1].rglob(f"*-{PLAIN}.so"))


def _available_instruction_sets() -> tuple[str, ...]:
    here = platform.system(), platform.machine()
    if here != ("Linux", "x86_64"):
        return ("neon",) if here == ("Linux", "aarch64") else ()
    # PyTorch's own detection; it obeys ATEN_CPU_CAPABILITY.
    import torch  # here, so that the doctor reports its absence and does not crash

    capability = torch.backends.cpu.get_cpu_capability()
    if capability != "AVX512":
        return ("avx2",) if capability == "AVX2" else ()
    pairs = ("avx512bf16",) if "avx512_bf16" in cpu_flags() else ()
    return (*(("amx",) if _may_use_amx() else ()), *pairs, "avx512", "avx2")


def cpuinfo(key: str) -> str:
    """Return Linux's entry on this machine's first processor whose key matches a pattern; empty on other systems."""
    try:
        found = re.search(rf"^(?:{key})\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else ""


def cpu_flags() -> set[str]:
    """Return the features of this machine's processor that Linux lists, such as "avx2"; none on other systems."""
    return set(cpuinfo("flags|Features").split())


def _may_use_amx() -> bool:
    """True if the CPU has bfloat16 tiles and Linux lets this process use them, after it was asked once."""
    if not {"amx_bf16", "amx_tile", "avx512_bf16"}.issubset(cpu_flags()):
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    code: int = ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data)
    return code == 0


def _load(source: Path, isa: str) -> ctypes.CDLL:
    """Return the library of the wheel, or else of the cache, where it is built if it is missing or damaged."""
    if isa == "neon":
        _share_openmp()
    sanitizers = os.environ.get("KARAT_SANITIZE")  # mostly none; the process must preload their runtime
    if in_the_package(source, isa).is_file() and not sanitizers:
        return ctypes.CDLL(str(in_the_package(source, isa)))
    compiler = find_compiler()
    checked = (f"-fsanitize={sanitizers}", *SANITIZER_FLAGS) if sanitizers else ()
    arguments, _ = build_arguments(source)
    flags = (*FLAGS, "-shared", *INSTRUCTION_SETS.get(isa, ()), *checked)
    version = _run([*compiler, "--version"])
    ours = (path.read_text() for path in (source, *sorted(source.parent.glob("*.h"))))
    import torch

    from karat_scale.foundation.files import locked  # not on every system, and this module is imported on all

    ingredients = (*ours, version, torch.__version__, *compiler[1:], *flags, *arguments)
    key = hashlib.sha256("\0".join(ingredients).encode()).hexdigest()[:20]
    directory = cache_directory()
    library = directory / f"{source.stem}-{isa}-{key}.so"
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    _keep_others_out(directory)
    if not _is_ours(library):
        with locked(directory / f"{library.name}.lock"):
            if not _is_ours(library):
                _build([*compiler, *flags, str(source), *arguments], library)
    return ctypes.CDLL(str(library))


def _share_openmp() -> None:
    """Let what is loaded next use the OpenMP library that torch has loaded. On aarch64 torch keeps it to itself."""
    for path in set(re.findall(r" (/.*/libgomp[^/\n]*)$", Path("/proc/self/maps").read_text(), re.MULTILINE)):
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)


def home() -> Path:
    """Return the user's home directory; if there is none, as in some containers, one among temporary files."""
    try:
        return Path.home()
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"karat-home-{os.getuid()}"


def cache_directory() -> Path:
    """Return the directory of compiled libraries: KARAT_CACHE_DIR, by default ~/.cache/karat_scale."""
    chosen = os.environ.get("KARAT_CACHE_DIR")
    return Path(chosen).expanduser() if chosen else home() / ".cache" / "karat_scale"


def find_compiler() -> list[str]:
    """Return the C++ compiler as a command: CXX, such as `ccache g++`, or one of `COMPILERS`. Raises LoadError."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else COMPILERS
    for candidate in candidates:
        if found := shutil.which(candidate):  # a path may have blanks
            return [found]
        with suppress(ValueError):  # of quotes without an end, or nothing
            program, *arguments = shlex.split(candidate)
            if found := shutil.which(program):
                return [found, *arguments]
    raise LoadError(f"no C++ compiler ({', '.join(candidates)}) is on PATH; install g++")


def _keep_others_out(directory: Path) -> None:
    """Make the cache writable for this user only: loading a library that others put there would run their code.

    Raises LoadError where the directory belongs to another user.
    """
    status = directory.stat()
    if status.st_uid not in _TRUSTED_OWNERS:
        raise LoadError(f"its cache {directory} belongs to another user; set KARAT_CACHE_DIR to a directory of yours")
    if status.st_uid == os.getuid() and status.st_mode & _OTHERS_WRITE:
        directory.chmod(stat.S_IMODE(status.st_mode) & ~_OTHERS_WRITE)


def _is_ours(library: Path) -> bool:
    """True where the library is this user's or root's, nobody else can write to it, and it is whole."""
    try:
        status = library.lstat()
    except FileNotFoundError:
        return False
    if not stat.S_ISREG(status.st_mode) or status.st_mode & _OTHERS_WRITE or status.st_uid not in _TRUSTED_OWNERS:
        return False
    content = library.read_bytes()  # ends in its own digest: loading an incomplete one would kill the process
    return len(content) > DIGEST_BYTES and hashlib.sha256(content[:-DIGEST_BYTES]).digest() == content[-DIGEST_BYTES:]


def _build(command: list[str], library: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="building-", dir=library.parent) as name:
        built = Path(name) / library.name
        _run([*command, "-o", str(built)])
        digest = hashlib.sha256(built.read_bytes()).digest()
        with built.open("ab") as file:
            file.write(digest)
            file.flush()
            os.fsync(file.fileno())
        built.chmod(0o700)
        built.replace(library)


def _run(command: list[str]) -> str:
    try:
        # In a session of its own: a signal that asks the trainer's process group to stop must not kill the compiler.
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="backslashreplace",  # a compiler speaks the user's language, in any encoding
            timeout=BUILD_SECONDS,
            check=True,
            start_new_session=True,
        )
    except subprocess.CalledProcessError as error:
        said = (error.stderr or error.stdout).strip().splitlines() or [f"code {error.returncode}"]
        # A header's errors come after lines that say who includes it.
        reason = next((line for line in said if "error" in line), said[0])
        from karat_scale.foundation.errors import on_one_line  # a compiler may print anything

        raise LoadError(f"{command[0]} failed with {on_one_line(reason)}") from error
    except subprocess.TimeoutExpired as error:
        raise LoadError(f"{command[0]} took more than {BUILD_SECONDS} s") from error
    return done.stdout


New = Callable[[], int | None]
Free = Callable[[int], None]


class PerThread:
    """An object for each thread: `handle()` makes it by `new` at the thread's first call, and `free` frees it."""

    def __init__(self, new: New, free: Free) -> None:
        self._new, self._free = new, free
        self._own = threading.local()

    def handle(self) -> int:
        """Return the object's address. Raises MemoryError."""
        if not hasattr(self._own, "held"):
            self._own.held = _Held(self._new, self._free)
        pointer: int = self._own.held.pointer
        return pointer


class _Held:
    def __init__(self, new: New, free: Free) -> None:
        pointer = new()
        if not pointer:
            raise MemoryError
        self.pointer = pointer
        # Not at the end of the process, when other threads may be inside a call.
        weakref.finalize(self, free, pointer).atexit = False
