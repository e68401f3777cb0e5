import hashlib
import json
from pathlib import Path

import pytest

from karat_scale.files import Fingerprint
from karat_scale.train.checkpoint_store import MANIFEST, STATE, CheckpointStore, checkpoint_name


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints")


def save(store: CheckpointStore, step: int) -> str:
    directory = store.begin(step)
    weights = bytes(range(256)) * 10
    (directory / "weights.pt").write_bytes(weights)
    written = Fingerprint(len(weights), hashlib.sha256(weights).hexdigest())
    return store.commit(directory, {"step": step}, {"weights.pt": written})


def test_a_committed_checkpoint_is_complete_and_latest(store: CheckpointStore) -> None:
    name = save(store, 1200)
    assert name == checkpoint_name(1200) == "step-00001200"
    assert store.names() == [name]
    assert store.pointed("latest") == name
    assert store.damage(name) is None
    assert store.state(name) == {"step": 1200}
    files = json.loads((store.root / name / MANIFEST).read_text())["files"]
    assert set(files) == {"weights.pt", STATE}


def test_an_unfinished_save_is_no_checkpoint_and_goes_with_the_next(store: CheckpointStore) -> None:
    save(store, 1)
    torn = store.begin(2)
    (torn / "weights.pt").write_bytes(b"half")
    assert store.names() == ["step-00000001"]
    assert store.pointed("latest") == "step-00000001"
    save(store, 3)
    assert not torn.exists()


@pytest.mark.parametrize("victim", ["weights.pt", STATE])
@pytest.mark.parametrize("harm", ["truncate", "zero", "flip", "delete"])
def test_every_kind_of_damage_is_named(store: CheckpointStore, victim: str, harm: str) -> None:
    name = save(store, 1)
    path = store.root / name / victim
    data = bytearray(path.read_bytes())
    if harm == "truncate":
        path.write_bytes(data[:-1])
    elif harm == "zero":
        path.write_bytes(bytes(len(data)))
    elif harm == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()
    assert victim in (store.damage(name) or "")


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"files": 3}'])
def test_a_missing_or_broken_manifest_is_damage(store: CheckpointStore, content: str | None) -> None:
    name = save(store, 1)
    manifest = store.root / name / MANIFEST
    manifest.unlink() if content is None else manifest.write_text(content)
    assert MANIFEST in (store.damage(name) or "")


@pytest.mark.parametrize("content", [None, "", "step-00000099\n", "../elsewhere"])
def test_a_pointer_to_nothing_points_at_nothing(store: CheckpointStore, content: str | None) -> None:
    save(store, 1)
    latest = store.root / "latest"
    latest.unlink() if content is None else latest.write_text(content)
    assert store.pointed("latest") is None


def test_retention_keeps_the_newest_and_the_best(store: CheckpointStore) -> None:
    for step in range(1, 6):
        save(store, step)
        if step == 2:
            store.point("best", checkpoint_name(2))
    store.retain(keep_last=2)
    assert store.names() == [checkpoint_name(step) for step in (5, 4, 2)]


def test_saving_a_step_again_replaces_it(store: CheckpointStore) -> None:
    name = save(store, 1)
    (store.root / name / "weights.pt").write_bytes(b"damaged")
    save(store, 1)
    assert store.damage(name) is None
