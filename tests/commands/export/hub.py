"""A server in memory with the part of the Hugging Face hub's API that uploads and downloads of a model use."""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.servers import Answering, serving

TOKEN = "hf_owls"


class Hub:
    """What the server holds: files by "USER/NAME/path", requests for new repositories, and messages of commits."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.repositories: dict[str, dict[str, Any]] = {}
        self.commits: list[str] = []
        self.objects: dict[str, bytes] = {}
        self.url = ""


class _Handler(Answering):
    hub: Hub

    def _is_refused(self) -> bool:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer({"error": "Invalid user token."}, 401)
        else:
            return False
        return True

    def post(self) -> None:
        path, body = urlsplit(self.path).path, self._body()
        if self._is_refused():
            return
        hub = self.hub
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization', 'jane')}/{asked['name']}"
            hub.repositories[name] = asked
            self._answer({"url": f"{hub.url}/{name}", "name": name})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            actions = [{**one, "actions": {"upload": {"href": f"{hub.url}/objects/{one['oid']}"}}} for one in objects]
            self._answer({"transfer": "basic", "objects": actions})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = [
                {"path": one["path"], "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular"}
                for one in files
            ]
            self._answer({"files": [{**mode, "shouldIgnore": False, "oid": None} for mode in modes]})
        elif "/commit/" in path:
            self._commit("/".join(path.split("/")[3:5]), body)
        else:
            self._answer({"valid": True})

    def _commit(self, repository: str, body: bytes) -> None:
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.hub.commits.append(value["summary"])
            elif line["key"] == "file":
                self.hub.files[f"{repository}/{value['path']}"] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.hub.files[f"{repository}/{value['path']}"] = self.hub.objects[value["oid"]]
        self._answer({"commitUrl": f"{self.hub.url}/{repository}/commit/{'1' * 40}", "commitOid": "1" * 40})

    def put(self) -> None:
        body = self._body()
        assert hashlib.sha256(body).hexdigest() == self.path.rpartition("/")[2]
        self.hub.objects[self.path.rpartition("/")[2]] = body
        self._answer({})

    def get(self) -> None:
        if self._is_refused():
            return
        path = unquote(urlsplit(self.path).path)
        if "/resolve/" in path:
            repository, _, rest = path.lstrip("/").partition("/resolve/")
            content = self.hub.files.get(f"{repository}/{rest.partition('/')[2]}")
            if content is None:
                self._answer({}, 404, X_Error_Code="EntryNotFound")
                return
            self._answer(content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit="1" * 40)
        elif path.startswith("/api/models/"):
            self._answer({"id": "/".join(path.split("/")[3:5]), "sha": "1" * 40, "siblings": []})
        else:
            self._answer({"name": "jane", "type": "user"})


@contextmanager
def serve() -> Iterator[Hub]:
    """Run the server on a port of this machine."""
    hub = Hub()
    with serving(_Handler, hub=hub) as hub.url:
        yield hub
