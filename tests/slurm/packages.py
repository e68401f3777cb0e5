"""The Debian packages that the tests here run on: a SLURM cluster, and a linter of shell scripts."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SLURM = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge"}
SHELLCHECK = {"shellcheck": "shellcheck"}
INSTALL_SECONDS = 240


def find(program: str) -> str | None:
    """Return where a program is; daemons are in folders that a user's PATH lacks."""
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def missing_reason(programs: dict[str, str]) -> str | None:
    """Install the packages of these programs if need be; return why they are missing, or None.

    `programs` maps each program to its Debian package.
    """
    missing = sorted({package for program, package in programs.items() if find(program) is None})
    if not missing:
        return None
    what = f"{', '.join(missing)} missing"
    if find("apt-get") is None:
        return f"{what}, and no apt-get to install it with"
    if os.geteuid() != 0:
        return f"{what}; as root: apt-get install {' '.join(missing)}"
    problem = _install(missing)
    return f"{what}; apt-get: {problem}" if problem else None


def _install(packages: list[str]) -> str | None:
    """Run apt-get; return its last error line, or None."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    # It has its own archive directory, because another apt-get's clean-up hook would empty the shared one.
    with tempfile.TemporaryDirectory() as archives:
        Path(archives, "partial").mkdir()
        options = ["-qq", "-y", "--no-install-recommends", "-o", f"Dir::Cache::Archives={archives}"]
        options += ["-o", "DPkg::Lock::Timeout=120"]
        # An update may fail, as with a mirror that is half in step; only the installation decides.
        for command in (["update", "-qq"], ["install", *options, *packages]):
            try:
                done = subprocess.run(
                    ["apt-get", *command],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    text=True,
                    timeout=INSTALL_SECONDS,
                )
            except subprocess.TimeoutExpired:
                return f"no end in {INSTALL_SECONDS} s"
    lines = (done.stderr or done.stdout).strip().splitlines()
    return (lines[-1] if lines else f"exit code {done.returncode}") if done.returncode else None
