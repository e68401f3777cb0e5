"""Fetch Fashion-MNIST's four IDX files.

    python data_prep/fetch_fashion_mnist.py --out DIR

First from torchvision's source, else from Debian's package dataset-fashion-mnist. Writes the files as they
come, and classes.txt with the names of the classes.
"""

import hashlib
import shutil
import subprocess
import tempfile
import urllib.request
from collections.abc import Callable
from pathlib import Path

from console import make_parser, progress, run
from sources.idx import CLASSES_FILE, read_idx
from torchvision.datasets import FashionMNIST

from karat_scale.errors import DataError
from karat_scale.files import write_atomically

PACKAGE = "dataset-fashion-mnist"
SIDE = 28
TIMEOUT_SECONDS = 10
# Enough for a slow mirror, short of a hang.
APT_TIMEOUT_SECONDS = 180
APT_OPTIONS = (
    "-oAcquire::http::Timeout=10",
    "-oAcquire::https::Timeout=10",
    "-oAcquire::Retries=1",
    "-oAPT::Sandbox::User=",
)


def is_right(path: Path) -> bool:
    """Whether a file is there, whole and of Fashion-MNIST's shape; gzip's own checksum guards the content."""
    if not path.is_file():
        return False
    try:
        shape = read_idx(path).shape
    except DataError:
        return False
    count = 60000 if path.name.startswith("train") else 10000
    return shape == ((count, SIDE, SIDE) if "images" in path.name else (count,))


def from_mirror(out: Path, mirrors: list[str], resources: list[tuple[str, str]]) -> None:
    """Download (name, MD5) resources from the first mirror that has them. Raises DataError."""
    failure = "no mirror is known"
    for mirror in mirrors:
        try:
            with progress(f"downloading from {mirror}", len(resources), "files") as advance:
                for name, md5 in resources:
                    data = _download(mirror + name)
                    if hashlib.md5(data, usedforsecurity=False).hexdigest() != md5:
                        raise DataError(f"{mirror}{name} came with a wrong MD5")
                    write_atomically(out / name, data)
                    advance(1)
            return
        except (OSError, DataError) as error:
            failure = f"{mirror}: {error}"
    raise DataError(failure)


def _download(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer:
        data: bytes = answer.read()
    return data


def from_debian(out: Path, names: list[str]) -> None:
    """Take the files out of Debian's package, which is not installed. Raises DataError."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise DataError("this system has no apt-get and dpkg-deb")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        _download_package(work)
        package = next(work.glob(f"{PACKAGE}_*.deb"))
        _command(["dpkg-deb", "-x", str(package), "files"], work)
        for name in names:
            found = next((work / "files").rglob(name), None)
            if found is None:
                raise DataError(f"{package.name} has no {name}")
            write_atomically(out / name, found.read_bytes())


def _download_package(work: Path) -> None:
    print(f"downloading {PACKAGE} with apt-get")
    download = ["apt-get", "download", PACKAGE, *APT_OPTIONS]
    try:
        _command(download, work)
        return
    except DataError:
        print("apt-get does not know where it is; updating a private package list")
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
        subprocess.run(words, cwd=cwd, check=True, capture_output=True, text=True, timeout=APT_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise DataError(f"{words[0]} {words[1]} took over {APT_TIMEOUT_SECONDS} s") from error
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or ["no message"]
        raise DataError(f"{words[0]} {words[1]}: {lines[-1]}") from error


def fetch(out: Path, ways: dict[str, Callable[[], None]], wanted: list[str]) -> str:
    """Try the ways in turn until every wanted file is right; returns the way that did. Raises DataError."""
    failures = []
    for name, way in ways.items():
        try:
            way()
        except DataError as error:
            failures.append(f"{name}: {error}")
            print(f"not from {name}: {error}")
            continue
        wrong = [file for file in wanted if not is_right(out / file)]
        if not wrong:
            return name
        failures.append(f"{name}: {wrong[0]} is not what it should be")
    raise DataError(
        f"Fashion-MNIST could not be fetched ({'; '.join(failures)}); "
        f"put {', '.join(wanted)} into {out} yourself and run this again"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser("Fetch Fashion-MNIST's IDX files from torchvision's source or from Debian.")
    parser.add_argument("--source", choices=("torchvision", "debian"), help="use only this one")
    options = parser.parse_args(arguments)
    out: Path = options.out
    names = [name for name, _ in FashionMNIST.resources]
    if all(is_right(out / name) for name in names) and (out / CLASSES_FILE).is_file():
        print(f"Fashion-MNIST is there and right in {out}")
        return
    ways: dict[str, Callable[[], None]] = {
        "torchvision": lambda: from_mirror(out, FashionMNIST.mirrors, FashionMNIST.resources),
        "debian": lambda: from_debian(out, names),
    }
    if options.source:
        ways = {options.source: ways[options.source]}
    if options.dry_run:
        print(f"would fetch {', '.join(names)} into {out}, trying {', then '.join(ways)}")
        return
    out.mkdir(parents=True, exist_ok=True)
    # The order of the classes is the labels'; without this file they would be called 0 to 9.
    write_atomically(out / CLASSES_FILE, "".join(f"{name}\n" for name in FashionMNIST.classes).encode())
    if not all(is_right(out / name) for name in names):
        print(f"Fashion-MNIST is in {out}, from {fetch(out, ways, names)}")


if __name__ == "__main__":
    run(main)
