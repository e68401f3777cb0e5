"""Checkpoints and exported folders of released versions still work, as docs/compatibility.md promises.

0.2.0 made `of_0_2_0`. It has a run of 10 of 16 steps at ZeRO stage 1 on one rank, one at stage 3 on two ranks, and the
hub folder of the first. Both trained on synthetic data. LOSSES and DIGEST are those of a run of all 16 steps by 0.2.0,
and PROBABILITIES what it predicted for a red image.
"""

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import events, karat_done

OLD = Path(__file__).parent / "of_0_2_0"
LOSSES = [1.381619930, 1.388567448, 1.379886150, 1.388846874, 1.378744841, 1.401687741]
DIGEST = 601917263611
PROBABILITIES = {"class 0": 0.239824, "class 1": 0.251652, "class 2": 0.250564, "class 3": 0.257959}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero1", "zero3"])
def test_a_run_of_0_2_0_goes_on(stage: str, tmp_path: Path) -> None:
    run = shutil.copytree(OLD / stage, tmp_path / stage)
    assert "top-1 25.00 %" in karat_done("eval", str(run)).stdout
    karat_done("train", str(run / "recipe.yaml"), f"run.dir={run}", "train.max_steps=16")
    assert [event["step"] for event in events(run, "resume")] == [10]
    steps = [event for event in events(run, "train") if event["step"] > 10]
    assert [event["loss"] for event in steps] == pytest.approx(LOSSES, abs=1e-4)
    assert steps[-1]["data_digest"] == DIGEST


@pytest.mark.slow
def test_a_folder_that_0_2_0_exported_classifies_as_it_did(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (16, 16), (200, 30, 30)).save(tmp_path / "red.png")
    told = ("--top", "4", "--json", str(tmp_path / "told.json"))
    karat_done("predict", str(OLD / "exported"), str(tmp_path / "red.png"), *told)
    predicted = json.loads((tmp_path / "told.json").read_text())["predictions"]
    assert {one["class"]: one["probability"] for one in predicted} == pytest.approx(PROBABILITIES, abs=1e-5)
