"""`karat bench attention`, `data`, `resume` and `step`: what they measure, and the file that they write."""

import io
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from karat_scale.attention import BASES
from karat_scale.commands.bench.data import torchs_decoder
from karat_scale.commands.bench.training import seconds_to_first_step
from karat_scale.commands.cli import build_parser
from karat_scale.commands.measure.attention import Case, attention_rows
from karat_scale.commands.measure.loading import AUGMENTS, photo_like, prepare_images
from karat_scale.commands.measure.step import held_batch
from karat_scale.commands.parsers import preparing
from karat_scale.data.backends import ImageSpec
from karat_scale.foundation.errors import UserError
from karat_scale.recipe import DataConfig
from tests.conftest import SMALL, karat_done, karat_refuses, karat_says
from tests.data.tars import write_tar

SLOW = pytest.mark.slow


def test_a_bench_takes_an_override_without_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(
        preparing, "load", lambda _: lambda options: given.append((options.recipe, options.overrides)) or 0
    )
    for arguments in (["deepspeed.config=zero3", "train.seed=1"], ["small.yaml", "a=b"], []):
        options = build_parser().parse_args(["bench", "resume", *arguments])
        assert options.run(options) == 0
    base = "imagenet_vit_base_g1b"
    assert given == [(base, ["deepspeed.config=zero3", "train.seed=1"]), ("small.yaml", ["a=b"]), (base, [])]


def test_what_cannot_be_measured_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    case = case_of(batch=1)
    with pytest.raises(UserError, match=r"no implementation can run this: triton: .*; name others by --only"):
        attention_rows(case, 1, ["triton"])
    rows = attention_rows(case, 1, ["triton", "reference"])
    assert [row["implementation"] for row in rows] == ["sdpa", "softmax", "reference"]
    assert "not measured: triton: " in capsys.readouterr().out
    assert "--batch 3 is odd, but mixup and cutmix mix pairs; use an even" in karat_refuses(
        "bench", "step", "--batch", "3"
    )


@SLOW
def test_attention_prints_ratios_and_writes_json(tmp_path: Path) -> None:
    out = tmp_path / "attention.json"
    done = karat_done("bench", "attention", "--batch", "2", "--rounds", "1", "--json", str(out))
    result = json.loads(out.read_text())
    assert {"model", "batch", "basis", "grid", "rank", "dtype", "device"} <= result.keys()
    rows = {row["implementation"]: row for row in result["rows"]}
    assert list(rows)[:4] == ["sdpa", "softmax", "reference", "streaming"]
    figures = {"forward_ms", "forward_backward_ms", "ratio_forward", "ratio_forward_backward", "ratio_memory"}
    assert all(row[figure] > 0 for row in rows.values() for figure in figures)
    assert rows["reference"]["peak_mb"] > rows["streaming"]["peak_mb"]
    assert "streaming" in done.stdout


def case_of(**changes: Any) -> Case:
    return Case(**{**asdict(Case("tiny", 1, 3, 12, "fp32", "cpu", tokens=20)), **changes})


@pytest.mark.parametrize(
    ("basis", "form"),
    [*((basis, form) for basis in BASES for form in ("modular", "full_rank")), ("fourier", "content")],
)
def test_contenders_compute_what_they_are_called(basis: str, form: str) -> None:
    case = case_of(basis=basis, form=form)
    found = {name: case.attend_by(name)(*case.inputs()) for name in ("sdpa", "softmax", "streaming", "reference")}
    torch.testing.assert_close(found["sdpa"], found["softmax"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["streaming"], found["reference"], rtol=1e-3, atol=1e-4)


@SLOW
@pytest.mark.parametrize(("changes", "lacks"), [({"basis": "dog"}, "cpu"), ({"form": "content"}, "triton")])
def test_only_what_has_the_operator_is_measured(changes: dict[str, str], lacks: str) -> None:
    names = [row["implementation"] for row in attention_rows(case_of(**changes), 1, ["streaming", lacks])]
    assert names == ["sdpa", "softmax", "streaming"]


@pytest.mark.parametrize("augment", ["crop", *(pytest.param(name, marks=SLOW) for name in ("paper", "device"))])
def test_every_way_to_load_data_is_measured_or_named(tmp_path: Path, augment: str) -> None:
    file = tmp_path / "figures.json"
    small = ("--images", "5", "--rounds", "1", "--workers", "0", "--augment", augment)
    karat_says("bench", "data", *small, "--json", str(file))
    result = json.loads(file.read_text())
    figures = {row["contender"]: row for row in result["rows"]}
    assert all(math.isfinite(row["ratio"]) and row["images_per_core_second"] > 0 for row in figures.values())
    assert figures[result["base"]]["ratio"] == 1
    webdataset = (f"webdataset, {decoder}" for decoder in ("native", "torchvision", "pillow"))
    ours = {f"karat {name}" for name in (*webdataset, "folder", "ffcv", "dali", "synthetic")}
    assert ours <= {*figures, *result["not_measured"]}
    assert {"reading bytes alone", f"whole decode, {torchs_decoder().library}"} <= set(figures)
    assert set(result["two_workers_over_one"]) == {"wall", "processor"}
    assert (result["device_over_crop"] is not None) == (augment == "device")


def test_images_of_ones_own(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    photos = [photo_like(number) for number in range(4)]
    photos[3] = photos[3][:-2000]  # cut short, so no contender may get it
    write_tar(tmp_path / "photos.tar", [(f"photo-{number}.JPEG", data) for number, data in enumerate(photos)])
    (tmp_path / "scratch").mkdir()
    shards = prepare_images(tmp_path / "scratch", 3, None, None).shards
    for option in (("--tar", str(tmp_path / "photos.tar")), ("--path", str(shards))):
        small = ("--rounds", "1", "--workers", "0", "--backend", "folder")
        karat_says("bench", "data", *small, *option, "--json", str(figures))
        result = json.loads(figures.read_text())
        assert (result["source"], result["images"]) == (option[1], 3)
        assert "karat folder" in {row["contender"] for row in result["rows"]}


def test_made_images_are_alike_in_size_and_the_same_each_time() -> None:
    made = photo_like(1)
    assert made == photo_like(1) != photo_like(2)
    with Image.open(io.BytesIO(made)) as image:
        assert image.size == (500, 375)
        assert np.asarray(image).std() > 20
    assert 60_000 < len(made) < 160_000


def test_a_loop_on_the_cpu_leaves_a_card_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    spec = ImageSpec(DataConfig(backend="synthetic"), AUGMENTS["crop"], 32, 10, 0)
    assert not held_batch(spec, 2).images.is_pinned()  # page-locked memory would occupy the card


@SLOW
@pytest.mark.multiprocess
def test_two_starts_and_their_ends_are_timed(tmp_path: Path) -> None:
    recipe, out = tmp_path / "small.yaml", tmp_path / "resume.json"
    recipe.write_text("data: {backend: synthetic}\nattention: {kind: karat}\nschedule: {warmup_epochs: 0}\n")
    small = [override for override in SMALL if not override.startswith("train.global_batch")]
    options = ("train.epochs=100", "--ranks=2", "--rounds=1", f"--json={out}")
    done = karat_done("bench", "resume", str(recipe), *small, *options)
    result = json.loads(out.read_text())
    assert result["fresh"]["to_resumed"] is None
    assert 0 < result["resumed"]["to_resumed"] < result["resumed"]["to_first_step"]
    for start in (result["fresh"], result["resumed"]):
        assert 0 < start["save"] < start["signal_to_saved"]
        assert min(start["saved_to_ended"], start["processor"]) > 0
    assert result["checkpoint_mb"] > 0
    assert "a resumed start takes" in done.stdout


@SLOW
def test_a_large_batch_has_a_first_step(tmp_path: Path) -> None:
    tiny = {"name": "vit_mini_patch4_28", "image_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 1}
    assert seconds_to_first_step(tiny, 130, tmp_path / "run") > 0
    with pytest.raises(UserError, match=r"a rank ended with code 2: error: .*num_heads"):
        seconds_to_first_step({**tiny, "num_heads": 3}, 2, tmp_path / "other")


@SLOW
def test_step_prints_ratios_and_writes_json(tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    size = ("--model", "vit_mini_patch4_28", "--image-size", "32", "--batch", "4", "--steps", "1", "--rounds", "3")
    done = karat_done("bench", "step", *size, "--json", str(out))
    result = json.loads(out.read_text())
    loops = [row["loop"] for row in result["rows"]]
    fourth = "karat loop, KArAt G3B with bounded scores"
    assert loops == ["bare PyTorch loop, softmax", "karat loop, softmax", "karat loop, KArAt G3B", fourth]
    assert result["rows"][0]["ratio_to_bare"] == 1.0
    assert all(row["images_per_second"] > 0 for row in result["rows"])
    assert result["seconds_to_first_step"] > 0
    assert "from command to first step" in done.stdout
