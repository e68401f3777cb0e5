import io
import json
import math
import tarfile

import numpy as np
import pytest
from PIL import Image

from karat_scale.commands.bench.data import torchs_decoder
from karat_scale.commands.cli import main
from karat_scale.commands.measure.loader import photo_like, prepare_images


@pytest.mark.parametrize(
    "augment", ["crop", *(pytest.param(name, marks=pytest.mark.slow) for name in ("paper", "device"))]
)
def test_every_contender_is_measured_or_named(tmp_path, augment):
    file = tmp_path / "figures.json"
    command = ["bench", "data", "--images", "5", "--rounds", "1", "--workers", "0", "--augment", augment]
    assert main([*command, "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    figures = {row["contender"]: row for row in result["rows"]}
    assert all(math.isfinite(row["ratio"]) and row["images_per_core_second"] > 0 for row in figures.values())
    assert figures[result["base"]]["ratio"] == 1
    named = set(figures) | set(result["not_measured"])
    ours = {
        "webdataset, native",
        "webdataset, torchvision",
        "webdataset, pillow",
        "folder",
        "ffcv",
        "dali",
        "synthetic",
    }
    assert {f"karat {name}" for name in ours} <= named
    assert {"reading bytes alone", f"whole decode, {torchs_decoder().library}"} <= set(figures)
    assert set(result["two_workers_over_one"]) == {"wall", "processor"}
    assert (result["device_over_crop"] is not None) == (augment == "device")


def test_images_of_ones_own(tmp_path):
    figures = tmp_path / "figures.json"
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        for number in range(4):
            # One of them is cut short, and no contender shall meet it.
            data = photo_like(number)[: -2000 if number == 3 else None]
            member = tarfile.TarInfo(f"photo-{number}.JPEG")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    (tmp_path / "scratch").mkdir()
    shards = prepare_images(tmp_path / "scratch", 3, None, None).shards
    for option in (["--tar", str(tmp_path / "photos.tar")], ["--path", str(shards)]):
        command = ["bench", "data", "--rounds", "1", "--workers", "0", "--backend", "folder", *option]
        assert main([*command, "--json", str(figures)]) == 0
        result = json.loads(figures.read_text())
        assert (result["source"], result["images"]) == (option[1], 3)
        assert "karat folder" in {row["contender"] for row in result["rows"]}


@pytest.mark.parametrize("option", [["--backend", "petastorm"], ["--tar", "nowhere.tar"]])
def test_what_cannot_be_measured_is_one_line(capsys, option):
    assert main(["bench", "data", *option]) == 2
    assert option[1] in capsys.readouterr().err


def test_made_images_are_alike_in_size_and_the_same_each_time(tmp_path):
    (tmp_path / "one.jpg").write_bytes(photo_like(1))
    assert photo_like(1) == (tmp_path / "one.jpg").read_bytes() != photo_like(2)
    with Image.open(tmp_path / "one.jpg") as image:
        assert image.size == (500, 375)
        assert np.asarray(image).std() > 20
    assert 60_000 < len(photo_like(1)) < 160_000
