import json
from pathlib import Path

import pytest

from karat_scale.commands.bench.model import seconds_to_first_step
from karat_scale.foundation.errors import UserError
from tests.conftest import karat


@pytest.mark.slow
def test_a_large_batch_has_a_first_step(tmp_path: Path) -> None:
    tiny = {"name": "vit_mini_patch4_28", "image_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 1}
    assert seconds_to_first_step(tiny, 130, tmp_path / "run") > 0
    with pytest.raises(UserError, match=r"karat train ended with exit code 2: error: .*num_heads"):
        seconds_to_first_step({**tiny, "num_heads": 3}, 2, tmp_path / "other")


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
