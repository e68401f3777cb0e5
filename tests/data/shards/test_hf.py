"""Test of hf://: huggingface_hub reads a data set from a server that speaks the hub's API."""

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from tests.conftest import karat_environment, output_of
from tests.servers import Answering, serving

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed: pip install -e '.[remote]'")

NAME, REVISION = "jane/birds", "main"


class Hub(Answering):
    """Serves a directory by the part of the hub's API that lists and reads a data set."""

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


URL = f"hf://datasets/{NAME}@{REVISION}"
# This runs in a process of its own, because the library reads its endpoint when it is imported.
READ = """
import json, sys
from karat_scale.foundation.stores import ChangedFileError, Store, StoreError
from karat_scale.recipe import AugmentConfig, DataConfig
from karat_scale.data.backends import ImageSpec, open_backend
from karat_scale.data.plan import TrainPlan

def line(action):
    try:
        action()
    except StoreError as error:
        return f"{type(error).__name__}: {error}"

def images(path):
    config = DataConfig(path=path, workers=0, cache_gb=0.5, timeout=30, order="block", block_samples=8)
    backend = open_backend(ImageSpec(config, AugmentConfig(), 16, 4, 5))
    plan = TrainPlan(5, backend.num_train, 16, 16, 0, 1, "block", 8)
    return [batch.images.sum().item() for batch in backend.train_batches(plan.slices(0, 6))]

local, url = sys.argv[1:]
store = Store(url, timeout=10)
facts = store.facts("dataset.json")
print(json.dumps({
    "files": sorted(store.files()), "bytes": facts.bytes, "etag": facts.etag,
    "part": store.read("dataset.json", 2, 9, facts.etag).decode(),
    "changed": line(lambda: store.read("dataset.json", 0, 9, "another")),
    "missing": line(lambda: store.read("none.tar", 0, 9)),
    "same": images(local) == images(url),
}))
"""


@pytest.mark.slow
def test_shards_of_the_hub_train_like_those_on_disk(shards: Path, tmp_path: Path) -> None:
    with serving(Hub, directory=shards) as endpoint:
        own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "KARAT_DATA_CACHE": str(tmp_path / "cache")}
        said = output_of(sys.executable, "-c", READ, shards, URL, env={**karat_environment(), **own})
    found = json.loads(said)
    text = (shards / "dataset.json").read_text()
    assert found["files"] == sorted(path.name for path in shards.iterdir())
    assert (found["bytes"], found["part"]) == (len(text), text[2:9])
    assert found["etag"]
    assert found["changed"].startswith(f"ChangedFileError: {URL}/dataset.json has changed since it was indexed")
    assert found["missing"] == f"MissingFileError: {URL}/none.tar: it is missing"
    assert found["same"]
