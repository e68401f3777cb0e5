"""Whether a plan's GPUs would wait for data."""

import json
from pathlib import Path

import pytest

from karat_scale.commands.cli import main
from karat_scale.commands.plan.time import DataNeed
from tests.conftest import SMALL


def test_cores_that_do_not_keep_up_are_said_with_what_to_do() -> None:
    need = DataNeed(needed=42_000, per_core=300, cores=88)
    first, second, third = need.lines()
    assert need.is_bound
    assert first == "BOUND BY DATA: the GPUs take 42,000 images a second, a core of this machine makes 300,"
    assert second == "  and 88 cores make 26,400;"
    assert third == (
        "  use augment.run_on=device, more cores (--cores-per-gpu) or smaller images (make_webdataset.py --resize)"
    )
    assert "run_on" not in DataNeed(42_000, 300, 88, on_device=True).lines()[2]


def test_cores_that_keep_up_are_counted() -> None:
    need = DataNeed(needed=15_000, per_core=300, cores=88)
    assert not need.is_bound
    assert need.lines()[1] == "  so 50.0 of 88 cores are busy: training does not wait for data"


@pytest.mark.slow
def test_a_plan_times_the_recipes_own_data(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, figures = tmp_path / "small.yaml", tmp_path / "plan.json"
    recipe.write_text(f"data: {{path: {shards}}}\n")
    small = (*SMALL, "schedule.warmup_epochs=0")
    options = ("--gpu", "a100-80", "--cores-per-gpu", "3", "--json", str(figures))
    assert main(["plan", str(recipe), *small, *options]) == 0
    data = json.loads(figures.read_text())["data"]
    assert data["cores"] == 2
    assert data["per_core"] > 0
    printed = capsys.readouterr().out
    assert "a core of this machine makes" in printed
    assert main(["plan", str(recipe), *small, "data.path=/nowhere", *options]) == 0
    assert "data: not timed here; " in capsys.readouterr().out
    why = json.loads(figures.read_text())["data"]["why"]
    assert why == "data.path = /nowhere is not a directory"
