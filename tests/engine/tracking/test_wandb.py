"""W&B's client against a server with the part of its API that a run's figures need."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.tracking.conftest import WrittenRun
from tests.engine.tracking.wandb_server import Account, serve

pytestmark = pytest.mark.slow
pytest.importorskip("wandb")
KEY = "0123456789" * 4


@pytest.fixture
def account(monkeypatch) -> Iterator[Account]:
    with serve() as running:
        monkeypatch.setenv("WANDB_BASE_URL", running.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_MODE", "online")
        yield running


def run_id(path: Path) -> str:
    return str(json.loads((path / "trackers" / "wandb.json").read_text())["id"])


def steps(account: Account, written: WrittenRun, kind: str = "train") -> list[int]:
    return [row[f"{kind}/step"] for row in account.history(run_id(written.path), kind)]


def test_two_starts_are_one_run_without_gap_or_repetition(written, account) -> None:
    said = written.send_two_starts("wandb")
    run = run_id(written.path)
    assert said == [f"wandb: the run is at {account.url}/owls/karat/runs/{run}"]
    assert steps(account, written) == [1, 2, 3, 4]
    assert [row["train/loss"] for row in account.history(run, "train")] == [1, 1 / 2, 1 / 3, 1 / 4]
    assert [row["eval/top1"] for row in account.history(run, "eval")] == [3.0]
    assert [row["histograms/W"]["values"] for row in account.history(run, "histograms")] == [[1, 2]]
    assert json.loads(account.summaries[run])["best_top1"] == 61.5
    settings = json.loads(account.configs[run])
    assert settings["run.seed"] == {"value": 0}
    assert "versions.torch" in settings
    metrics = settings["_wandb"]["value"]["m"]  # by the numbers in W&B's protocol: name, pattern and step
    axes = {metric["2"]: metrics[metric["5"] - 1]["1"] for metric in metrics if "2" in metric}
    assert axes == {
        **{f"{kind}/*": f"{kind}/step" for kind in ("train", "eval", "histograms")},
        "content, *": "eval/step",
    }
    assert {"recipe.yaml", "summary.json"} <= account.files
    files = [file for file in written.path.rglob("*") if file.is_file()]
    assert [file for file in files if KEY.encode() in file.read_bytes()] == []


def test_a_killed_run_has_not_finished(written, account) -> None:
    written.train(1)
    assert written.send("wandb")[0] == []
    assert account.ended == [1]
    written.finish()
    assert written.send("wandb")[0] == []
    assert account.ended == [1, 0]


def test_figures_that_never_arrived_are_sent_by_the_next_start(written, account) -> None:
    written.train(1, 2)
    assert written.send("wandb")[0] == []
    account.lost = True
    written.train(3)
    assert written.send("wandb", seconds=8)[0] == ["wandb"]
    assert steps(account, written) == [1, 2]
    account.lost = False
    written.train(4)
    assert written.send("wandb")[0] == []
    assert steps(account, written) == [1, 2, 3, 4]


def test_what_was_kept_offline_is_sent_where_there_is_a_network(written, account, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    written.train(1, 2)
    assert written.send("wandb") == ([], [])
    monkeypatch.setenv("WANDB_MODE", "online")
    assert written.send("wandb")[0] == []
    assert steps(account, written) == [1, 2]
