"""hf://: a data set of the hub, read through huggingface_hub from a server that speaks the hub's API."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import karat_environment
from tests.data.shards.hub import NAME, REVISION, serve

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed: pip install -e '.[remote]'")

URL = f"hf://datasets/{NAME}@{REVISION}"
# In a process of its own: the library reads its endpoint when it is imported.
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
    with serve(shards) as endpoint:
        own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "KARAT_DATA_CACHE": str(tmp_path / "cache")}
        command = [sys.executable, "-c", READ, str(shards), URL]
        done = subprocess.run(command, env={**karat_environment(), **own}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    text = (shards / "dataset.json").read_text()
    assert found["files"] == sorted(path.name for path in shards.iterdir())
    assert (found["bytes"], found["part"]) == (len(text), text[2:9])
    assert found["etag"]
    assert found["changed"].startswith(f"ChangedFileError: {URL}/dataset.json has changed since it was indexed")
    assert found["missing"] == f"MissingFileError: {URL}/none.tar: it is missing"
    assert found["same"]
