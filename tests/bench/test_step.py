import json
from pathlib import Path

import pytest

from tests.conftest import karat


@pytest.mark.slow
def test_bench_step_prints_ratios_and_writes_json(tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    size = ("--model", "vit_mini_patch4_28", "--image-size", "32", "--batch", "4", "--steps", "1", "--rounds", "3")
    done = karat("bench", "step", *size, "--json", str(out))
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert [row["loop"] for row in result["rows"]] == [
        "bare PyTorch loop, softmax",
        "karat loop, softmax",
        "karat loop, KArAt G3B",
    ]
    assert result["rows"][0]["ratio_to_bare"] == 1.0
    assert all(row["images_per_second"] > 0 for row in result["rows"])
    assert result["seconds_to_first_step"] > 0
    assert "from command to first step" in done.stdout
