import json
import math

import pytest

from benchmarks.data_peers import main


@pytest.mark.parametrize("augment", ["crop", pytest.param("paper", marks=pytest.mark.slow)])
def test_the_loaders_of_other_libraries_are_measured_beside_ours(tmp_path, augment):
    file = tmp_path / "figures.json"
    command = ["--images", "5", "--rounds", "1", "--workers", "0", "--augment", augment, "--backend", "webdataset"]
    assert main([*command, "--json", str(file)]) == 0
    figures = {row["contender"]: row for row in json.loads(file.read_text())["rows"]}
    assert all(math.isfinite(row["ratio"]) and row["images_per_core_second"] > 0 for row in figures.values())
    assert {"karat webdataset, torchvision", "Pillow ImageFolder, float32"} <= set(figures)
    assert ("torchvision decode and crop, uint8" in figures) == (augment == "crop")
