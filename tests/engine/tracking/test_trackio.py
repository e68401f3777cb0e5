"""trackio's database on this machine, read back with its own reader."""

import json
import sys

import pytest

from karat_scale.engine.tracking.follow import cursor_file
from tests.conftest import output_of

pytestmark = pytest.mark.slow
pytest.importorskip("trackio")

READ = """
import json, sys
from trackio.sqlite_storage import SQLiteStorage
logs = [SQLiteStorage.get_logs("karat", run) for run in SQLiteStorage.get_runs("karat")]
print(json.dumps(logs, default=str))
"""


@pytest.fixture(autouse=True)
def _database(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))


def runs() -> list[list[dict]]:
    return json.loads(output_of(sys.executable, "-c", READ).splitlines()[-1])


def test_two_starts_are_one_run_without_gap_or_repetition(written, tmp_path) -> None:
    assert written.send_two_starts("trackio") == []
    (logs,) = runs()
    assert [log["step"] for log in logs if "train/loss" in log] == [1, 2, 3, 4]
    assert [log["eval/top1"] for log in logs if "eval/top1" in log] == [3.0]
    assert [log["histograms/W"]["values"] for log in logs if "histograms/W" in log] == [[1, 2]]
    blobs = [file.read_bytes() for file in (tmp_path / "trackio").rglob("*") if file.is_file()]
    assert (written.path / "recipe.yaml").read_bytes() in blobs


def test_what_was_given_and_has_not_arrived_is_sent_again(written) -> None:
    """A kill may come after the cursor is written and before trackio's own thread has stored the figures."""
    written.train(1, 2)
    written.send("trackio")
    file = cursor_file(written.path, "trackio")
    cursor = json.loads(file.read_text())
    written.train(3, 4)
    cursor["steps"]["train"] = 4
    cursor["offsets"]["metrics.jsonl"] = (written.path / "metrics.jsonl").stat().st_size
    file.write_text(json.dumps(cursor))
    assert written.send("trackio") == ([], [])
    assert [log["step"] for log in runs()[0]] == [1, 2, 3, 4]
