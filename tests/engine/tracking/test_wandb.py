"""W&B's offline files, read back with its own messages. Nothing here talks to W&B's servers."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.tracking.conftest import WrittenRun

pytestmark = pytest.mark.slow
pytest.importorskip("wandb")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)


def records(run: Path) -> list[Any]:
    """All records of all sessions, in order."""
    from wandb.proto.wandb_internal_pb2 import Record

    files = sorted(run.glob("wandb/offline-run-*/*.wandb"))
    return [Record.FromString(data) for file in files for data in messages(file.read_bytes())]


def messages(content: bytes) -> Iterator[bytes]:
    """The messages of a file, whose format is that of LevelDB's logs: pieces in blocks of 32 KiB."""
    block, header = 32768, struct.Struct("<IHB")
    at, message = header.size, b""  # after the header of the file
    while at < len(content):
        if block - at % block < header.size:
            at += block - at % block
            continue
        _, size, kind = header.unpack_from(content, at)
        at += header.size + size
        message += content[at - size : at]
        if kind in (1, 4):  # whole, or the last piece
            yield message
            message = b""


def rows(run: Path, kind: str) -> list[dict[str, Any]]:
    """The history of one kind of event."""
    everything = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records(run)
        if record.WhichOneof("record_type") == "history"
    ]
    return [row for row in everything if f"{kind}/step" in row]


def test_two_starts_are_one_run_without_gap_or_repetition(written: WrittenRun) -> None:
    written.train(1, 2, 3, evaluate=(3,))
    written.histogram(3)
    assert written.send("wandb") == ([], [])
    written.event("resume", 2)
    written.train(3, 4)
    written.finish()
    assert written.send("wandb") == ([], [])

    train = rows(written.path, "train")
    assert [row["train/step"] for row in train] == [1, 2, 3, 4]
    assert [row["train/loss"] for row in train] == [1, 1 / 2, 1 / 3, 1 / 4]
    assert [row["eval/top1"] for row in rows(written.path, "eval")] == [3.0]
    (histogram,) = rows(written.path, "histograms")
    assert histogram["histograms/W/values"] == [1, 2]

    runs = [record.run for record in records(written.path) if record.WhichOneof("record_type") == "run"]
    assert {(run.run_id, run.display_name, run.project) for run in runs} == {
        (json.loads((written.path / "trackers" / "wandb.json").read_text())["id"], "written owls", "karat")
    }
    settings = {item.key or item.nested_key[0]: item.value_json for item in runs[0].config.update}
    assert (settings["run.seed"], "versions.torch" in settings) == ("0", True)
    metrics = [record.metric for record in records(written.path) if record.WhichOneof("record_type") == "metric"]
    steps = {metric.glob_name or metric.name: metric.step_metric for metric in metrics}
    assert {name: steps[name] for name in ("train/*", "content, *")} == {
        "train/*": "train/step",
        "content, *": "eval/step",
    }
    saved = {file.path for record in records(written.path) for file in record.files.files}
    assert {"recipe.yaml", "summary.json"} <= saved


def test_the_key_is_in_none_of_the_files_of_the_run(written: WrittenRun) -> None:
    written.train(1)
    written.send("wandb")
    files = [file for file in written.path.rglob("*") if file.is_file()]
    assert files
    assert [file for file in files if b"0123456789" * 4 in file.read_bytes()] == []
