import json
from pathlib import Path

import pytest

from tests.conftest import benchmark


@pytest.mark.slow
@pytest.mark.multiprocess
def test_bench_stages_compares_each_stage_with_ddp(tmp_path: Path) -> None:
    out = tmp_path / "stages.json"
    size = ("--model", "vit_mini_patch4_28", "--image-size", "16", "--batch", "2")
    done = benchmark("stages", *size, "--steps", "1", "--rounds", "2", "--json", str(out))
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["contender"] for row in rows] == ["DistributedDataParallel", "zero0", "zero1", "zero2", "zero3"]
    assert rows[0]["ratio_to_ddp"] == 1.0
    assert all(row["milliseconds_a_step"] > 0 for row in rows)
    assert "to DDP" in done.stdout


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_model_that_cannot_be_built_is_one_line() -> None:
    done = benchmark("stages", "--model", "vit_nothing", "--rounds", "1")
    assert done.returncode == 2
    assert "vit_nothing" in done.stderr
    assert "Traceback" not in done.stderr
