"""Extract files from a Debian package without installing it."""

import shutil
import subprocess
import tempfile
from pathlib import Path

from karat_scale.foundation.errors import DataError
from karat_scale.foundation.files import write_atomically

# Enough for a slow mirror; a hang takes longer.
TIMEOUT_SECONDS = 180
APT_OPTIONS = (
    "-oAcquire::http::Timeout=10",
    "-oAcquire::https::Timeout=10",
    "-oAcquire::Retries=1",
    "-oAPT::Sandbox::User=",
)


def take_files(package: str, names: list[str], out: Path) -> None:
    """Download a package and write the files of these names into `out`. Raises DataError."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise DataError("this system has no apt-get and dpkg-deb")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        _download(package, work)
        file = next(work.glob(f"{package}_*.deb"))
        _command(["dpkg-deb", "-x", str(file), "files"], work)
        for name in names:
            found = next((work / "files").rglob(name), None)
            if found is None:
                raise DataError(f"{file.name} has no {name}")
            write_atomically(out / name, found.read_bytes())


def _download(package: str, work: Path) -> None:
    print(f"downloading {package} with apt-get")
    download = ["apt-get", "download", package, *APT_OPTIONS]
    try:
        _command(download, work)
        return
    except DataError:
        print("apt-get does not know the package; updating a private package list")
    for name in ("lists/partial", "archives/partial"):
        (work / name).mkdir(parents=True)
    private = [
        f"-oDir::State::Lists={work / 'lists'}",
        f"-oDir::Cache={work}",
        f"-oDir::Cache::Archives={work / 'archives'}",
    ]
    _command(["apt-get", "update", *APT_OPTIONS, *private], work)
    _command([*download, *private], work)


def _command(words: list[str], cwd: Path) -> None:
    try:
        subprocess.run(words, cwd=cwd, check=True, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise DataError(f"{words[0]} {words[1]} took over {TIMEOUT_SECONDS} s") from error
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or ["no message"]
        raise DataError(f"{words[0]} {words[1]}: {lines[-1]}") from error
