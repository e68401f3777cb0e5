"""A server with the part of the Hugging Face hub's API by which a data set is listed and read, over a directory."""

import hashlib
import json
import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.servers import Answering, serving

NAME, REVISION = "jane/birds", "main"


class _Handler(Answering):
    directory: Path

    def _entry(self, path: Path) -> dict[str, Any]:
        name = str(path.relative_to(self.directory))
        if path.is_dir():
            return {"type": "directory", "oid": "0" * 40, "size": 0, "path": name}
        content = path.read_bytes()
        return {"type": "file", "oid": hashlib.sha1(content).hexdigest(), "size": len(content), "path": name}

    def get(self) -> None:
        url = urlsplit(self.path)
        path, api = unquote(url.path), f"/api/datasets/{NAME}"
        if path.startswith(f"{api}/tree/{REVISION}"):
            folder = self.directory / path.removeprefix(f"{api}/tree/{REVISION}").strip("/")
            deep = parse_qs(url.query).get("recursive") in (["true"], ["True"])
            if folder.is_dir():
                self._answer([self._entry(one) for one in sorted(folder.rglob("*") if deep else folder.iterdir())])
            else:
                self._answer(b"{}", 404, X_Error_Code="EntryNotFound")
        elif path in (api, f"{api}/revision/{REVISION}"):
            self._answer({"id": NAME, "sha": "1" * 40, "siblings": []})
        elif path.startswith(f"/datasets/{NAME}/resolve/{REVISION}/"):
            self._send(self.directory / path.partition(f"/resolve/{REVISION}/")[2])
        else:
            self._answer(b"{}", 404, X_Error_Code="RepoNotFound")

    def _send(self, file: Path) -> None:
        if not file.is_file():
            self._answer(b"{}", 404, X_Error_Code="EntryNotFound")
            return
        content = file.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked is None:
            self._answer(content)
            return
        part = content[int(asked[1]) : int(asked[2]) + 1]
        self._answer(part, 206, Content_Range=f"bytes {asked[1]}-{int(asked[1]) + len(part) - 1}/{len(content)}")

    def post(self) -> None:
        body = self._body().decode()
        paths = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
        found = [self.directory / name for name in ([paths] if isinstance(paths, str) else paths)]
        self._answer([self._entry(path) for path in found if path.exists()])


def serve(directory: Path) -> AbstractContextManager[str]:
    """Run the server on a port of this machine; it has its address as value."""
    return serving(_Handler, directory=directory)
