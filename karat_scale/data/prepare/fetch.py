"""Download a data set's official files, for make_webdataset.py and make_ffcv.py.

    python data_prep/fetch.py cifar10 --out DIR

Addresses and hashes are torchvision's. Each file's hash is checked. A download that was stopped resumes, and complete
files are kept. Fashion-MNIST can also come from Debian's package dataset-fashion-mnist, and gets classes.txt with the
names of its classes.
"""

import http.client
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from karat_scale.data.prepare.making import alone_in, make_parser
from karat_scale.data.prepare.sources.small import CLASSES_FILE, read_idx
from karat_scale.foundation.console import progress
from karat_scale.foundation.errors import DataError
from karat_scale.foundation.files import commit_file, write_atomically

TIMEOUT_SECONDS = 20
_MB = 1_000_000


@dataclass(frozen=True)
class RemoteFile:
    """A file, its published MD5, and its addresses, in the order to try.

    shape: the shape of the array in an IDX file that Debian has packed again, so that its hash differs.
    """

    name: str
    md5: str
    urls: tuple[str, ...]
    shape: tuple[int, ...] | None = None

    def is_in(self, folder: Path) -> bool:
        """True if the file is there, as published or, with a shape, complete; gzip's checksum protects its content."""
        from torchvision.datasets.utils import check_integrity

        path = folder / self.name
        if self.shape is None or not path.is_file():
            return bool(check_integrity(path, self.md5))
        try:
            return read_idx(path).shape == self.shape
        except DataError:
            return False


def download(remote: RemoteFile, out: Path) -> None:
    """Download a file into `out` from the first address that has the right content. Raises DataError.

    An incomplete file is `.<name>.part`; it gets its name only once the hash is right.
    """
    from torchvision.datasets.utils import calculate_md5

    part = out / f".{remote.name}.part"
    failures = []
    for url in remote.urls:
        try:
            _append(url, part)
            found = calculate_md5(part)
            if found == remote.md5:
                commit_file(part, out / remote.name)
                return
            part.unlink()
            failures.append(f"{url} has the MD5 {found} instead of {remote.md5}")
        except (OSError, http.client.HTTPException, DataError) as error:
            failures.append(f"{url}: {error}")
    raise DataError(f"{remote.name} could not be downloaded ({'; '.join(failures)})")


def _append(url: str, part: Path) -> None:
    """Download the missing part of a file, or all of it if the server cannot start in the middle."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if have and error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # nothing is missing
        raise
    with answer:
        if answer.status != http.client.PARTIAL_CONTENT:
            have = 0
        left = int(answer.headers.get("Content-Length") or 0)
        size = have + left
        with part.open("ab" if have else "wb") as file, progress(part.name[1:-5], -(-size // _MB), "MB") as advance:
            advance(have // _MB)
            while block := answer.read(_MB):
                file.write(block)
                have += len(block)
                advance(1)
    if have < size:
        raise DataError(f"the connection ended after {have} of {size} bytes; run the same command again to resume")


# Enough for a slow mirror; a hang takes longer.
APT_TIMEOUT_SECONDS = 180
APT_OPTIONS = (
    "-oAcquire::http::Timeout=10",
    "-oAcquire::https::Timeout=10",
    "-oAcquire::Retries=1",
    "-oAPT::Sandbox::User=",
)


def take_files(package: str, names: list[str], out: Path) -> None:
    """Download a package and write the files of these names into `out`. Raises DataError."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise DataError("this system lacks apt-get or dpkg-deb")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        print(f"downloading {package} with apt-get")
        download = ["apt-get", "download", package, *APT_OPTIONS]
        try:
            _command(download, work)
        except DataError:
            print("apt-get does not know the package; updating a private package list")
            for name in ("lists/partial", "archives/partial"):
                (work / name).mkdir(parents=True)
            places = {"State::Lists": work / "lists", "Cache": work, "Cache::Archives": work / "archives"}
            private = [f"-oDir::{name}={place}" for name, place in places.items()]
            _command(["apt-get", "update", *APT_OPTIONS, *private], work)
            _command([*download, *private], work)
        file = next(work.glob(f"{package}_*.deb"))
        _command(["dpkg-deb", "-x", str(file), "files"], work)
        for name in names:
            found = next((work / "files").rglob(name), None)
            if found is None:
                raise DataError(f"{file.name} has no {name}")
            write_atomically(out / name, found.read_bytes())


def _command(words: list[str], cwd: Path) -> None:
    try:
        subprocess.run(words, cwd=cwd, check=True, capture_output=True, text=True, timeout=APT_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise DataError(f"{words[0]} {words[1]} took over {APT_TIMEOUT_SECONDS} s") from error
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or ["no message"]
        raise DataError(f"{words[0]} {words[1]}: {lines[-1]}") from error


# torchvision has their files. Its import takes seconds, for which no mistake should wait.
DATA_SETS = ("cifar10", "cifar100", "svhn", "svhn_extra", "stl10", "flowers102", "fashion_mnist")
FASHION_MNIST, PACKAGE = "fashion_mnist", "dataset-fashion-mnist"
SIDE = 28

Way = Callable[[list[RemoteFile]], None]


def data_sets() -> dict[str, list[RemoteFile]]:
    """Return the files of each of DATA_SETS, by its name."""
    from torchvision.datasets import CIFAR10, CIFAR100, STL10, SVHN, FashionMNIST, Flowers102

    svhn = {split: RemoteFile(name, md5, (url,)) for split, (url, name, md5) in SVHN.split_list.items()}
    flowers = Flowers102._download_url_prefix
    shapes = {"train-images-idx3": (60000, SIDE, SIDE), "train-labels-idx1": (60000,)}
    shapes |= {"t10k-images-idx3": (10000, SIDE, SIDE), "t10k-labels-idx1": (10000,)}
    return {
        "cifar10": [RemoteFile(CIFAR10.filename, CIFAR10.tgz_md5, (CIFAR10.url,))],
        "cifar100": [RemoteFile(CIFAR100.filename, CIFAR100.tgz_md5, (CIFAR100.url,))],
        "svhn": [svhn["train"], svhn["test"]],
        "svhn_extra": [svhn["extra"]],
        "stl10": [RemoteFile(STL10.filename, STL10.tgz_md5, (STL10.url,))],
        "flowers102": [RemoteFile(name, md5, (flowers + name,)) for name, md5 in Flowers102._file_dict.values()],
        FASHION_MNIST: [
            RemoteFile(
                name, md5, tuple(mirror + name for mirror in FashionMNIST.mirrors), shapes[name.split("-ubyte")[0]]
            )
            for name, md5 in FashionMNIST.resources
        ],
    }


def from_web(wanted: list[RemoteFile], out: Path) -> None:
    """Download files into `out`. Raises DataError."""
    for remote in wanted:
        download(remote, out)


def missing_of(wanted: list[RemoteFile], out: Path) -> list[RemoteFile]:
    """Return the files that are not in `out`, or not as published."""
    return [remote for remote in wanted if not remote.is_in(out)]


def fetch(missing: list[RemoteFile], out: Path, ways: dict[str, Way]) -> str:
    """Try the sources in turn until every file is right; returns the one that succeeded. Raises DataError."""
    failures = []
    for name, way in ways.items():
        try:
            way(missing_of(missing, out))
        except DataError as error:
            failures.append(f"{name}: {error}")
            print(f"not from {name}: {error}")
            continue
        wrong = missing_of(missing, out)
        if not wrong:
            return name
        failures.append(f"{name}: {wrong[0].name} has the wrong content")
    names = ", ".join(remote.name for remote in missing)
    raise DataError(f"download failed ({'; '.join(failures)}); put {names} into {out} yourself and run this again")


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser("Download a data set's official files.")
    parser.add_argument("data_set", choices=DATA_SETS, help="the data set to download")
    parser.add_argument("--source", choices=("web", "debian"), help="use only this one; debian has fashion_mnist")
    options = parser.parse_args(arguments)
    out: Path = options.out
    fashion = options.data_set == FASHION_MNIST
    ways: dict[str, Way] = {"web": lambda wanted: from_web(wanted, out)}
    if fashion:
        ways["debian"] = lambda wanted: take_files(PACKAGE, [remote.name for remote in wanted], out)
    if options.source:
        if options.source not in ways:
            raise DataError(f"--source {options.source} has only {FASHION_MNIST}; remove it")
        ways = {options.source: ways[options.source]}
    wanted, complete = data_sets()[options.data_set], f"{options.data_set} is complete and correct in {out}"
    if options.dry_run:
        names = ", ".join(remote.name for remote in missing_of(wanted, out))
        print(f"would fetch {names} into {out}, trying {', then '.join(ways)}" if names else complete)
        return
    out.mkdir(parents=True, exist_ok=True)
    with alone_in(out):
        if fashion and not (out / CLASSES_FILE).is_file():
            from torchvision.datasets import FashionMNIST

            # The order of the classes is that of the labels; without this file their names would be 0 to 9.
            write_atomically(out / CLASSES_FILE, "".join(f"{name}\n" for name in FashionMNIST.classes).encode())
        missing = missing_of(wanted, out)
        print(f"{options.data_set} is in {out}, from {fetch(missing, out, ways)}" if missing else complete)
