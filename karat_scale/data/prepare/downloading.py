"""Download a file, check its hash, and resume where an earlier run stopped."""

import http.client
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from torchvision.datasets.utils import calculate_md5

from karat_scale.foundation.console import progress
from karat_scale.foundation.errors import DataError
from karat_scale.foundation.files import commit_file

TIMEOUT_SECONDS = 20
_MB = 1_000_000
_RANGE_NOT_SATISFIABLE = 416


@dataclass(frozen=True)
class RemoteFile:
    """A file, its published MD5, and its addresses, in the order to try."""

    name: str
    md5: str
    urls: tuple[str, ...]


def download(remote: RemoteFile, out: Path) -> None:
    """Download a file into `out` from the first address that has the right content. Raises DataError.

    An incomplete file is `.<name>.part`; it gets its name only once the hash is right.
    """
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
        if have and error.code == _RANGE_NOT_SATISFIABLE:
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
