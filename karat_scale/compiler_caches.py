"""Where Triton and TorchInductor keep what they compile: on a disk of the node.

Triton's default is in the home directory. On a cluster that is a network file system, where all ranks of a job look
for, write and rename hundreds of small files at the same moment.
"""

import os
import re
import stat
import tempfile
from collections.abc import MutableMapping
from pathlib import Path

from karat_scale.native_build import home

MOUNTS = Path("/proc/mounts")
NETWORK_FILE_SYSTEMS = (
    *("afs", "beegfs", "ceph", "cifs", "fhgfs", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "orangefs"),
    *("panfs", "pvfs2", "smb3", "smbfs", "sshfs", "wekafs"),
)


def use_local_caches(environ: MutableMapping[str, str] = os.environ, mounts: Path = MOUNTS) -> None:
    """Set TRITON_CACHE_DIR and TORCHINDUCTOR_CACHE_DIR to directories of this node where their defaults are none.

    What the user set stays. A default stays where it is on a local disk and can be written. Call it before Triton or
    Inductor is imported. All ranks of a node share the directories: both libraries rename complete files into place.
    """
    base = Path(environ.get("TRITON_HOME") or home())
    defaults = {
        "TRITON_CACHE_DIR": base / ".triton" / "cache",
        "TORCHINDUCTOR_CACHE_DIR": Path(tempfile.gettempdir()),
    }
    poor = [
        name
        for name, directory in defaults.items()
        if not environ.get(name) and not (is_local(directory, mounts) and _can_be_written(directory))
    ]
    local = local_directory(mounts) if poor else None
    if local is not None:
        for name in poor:
            environ[name] = str(local / name.partition("_")[0].lower())


def is_local(path: Path, mounts: Path = MOUNTS) -> bool:
    """True if a path, which need not exist, is not on a network file system or the system does not say."""
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


def _can_be_written(directory: Path) -> bool:
    there = next(parent for parent in (directory, *directory.parents) if parent.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def local_directory(mounts: Path = MOUNTS) -> Path | None:
    """A directory on this node that nobody else can write, for what is in it is loaded as code."""
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
