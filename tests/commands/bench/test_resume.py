import json
from pathlib import Path

import pytest

from karat_scale.commands.cli import main
from tests.conftest import SMALL, karat


@pytest.mark.slow
@pytest.mark.multiprocess
def test_bench_resume_times_two_starts_and_their_ends(tmp_path: Path) -> None:
    recipe, out = tmp_path / "small.yaml", tmp_path / "resume.json"
    recipe.write_text("data: {backend: synthetic}\nattention: {kind: karat}\n")
    small = [override for override in SMALL if not override.startswith("train.global_batch")]
    done = karat(
        "bench",
        "resume",
        str(recipe),
        *small,
        "train.epochs=100",
        "schedule.warmup_epochs=0",
        "--ranks=2",
        "--rounds=1",
        f"--json={out}",
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["fresh"]["to_resumed"] is None
    assert 0 < result["resumed"]["to_resumed"] < result["resumed"]["to_first_step"]
    for start in (result["fresh"], result["resumed"]):
        assert 0 < start["save"] < start["signal_to_saved"]
        assert start["saved_to_ended"] > 0
        assert start["processor"] > 0
    assert result["checkpoint_mb"] > 0
    assert "a resumed start takes" in done.stdout


def test_bench_resume_of_a_wrong_recipe_is_one_line(capsys) -> None:
    assert main(["bench", "resume", "imagenet_vit_base_g1b", "optim.lrr=1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "optim.lrr" in line
