"""`karat show` and `karat data` on real data: what they draw is what training reads."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from karat_scale.commands.look.command import read_batch
from karat_scale.data.shards import shard_format
from karat_scale.engine.reporting.progress import Reporter, SilentDisplay
from karat_scale.recipe.loading import load_recipe
from karat_scale.training.tasks.classification.task import ClassificationTask
from tests.conftest import CLASSES, SIZE, SMALL, TRAIN_PER_CLASS, karat_done, karat_says
from tests.data.betons import need_ffcv
from tests.data.conftest import exif
from tests.data.prepare.images import jpeg, write
from tests.data.prepare.making import make_betons

MIXED = ("augment.mixup=0.8", "augment.mix_prob=1.0", "augment.label_smoothing=0.1")


@pytest.fixture
def recipe_file(shards: Path, tmp_path: Path) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(f"data: {{path: {shards}}}\nschedule: {{warmup_epochs: 0}}\n")
    return path


def test_the_batch_is_the_one_that_training_sees(recipe_file: Path, tmp_path: Path, world) -> None:
    recipe = load_recipe(recipe_file, [*SMALL, *MIXED, f"run.dir={tmp_path / 'run'}", "data.workers=0"])
    shown = read_batch(recipe, step=3, count=100)
    task = ClassificationTask(recipe, world, Reporter(SilentDisplay(), None))
    try:
        batches = list(task.backend.train_batches(task.plan().slices(2, 3)))
        images, targets = zip(*(task.as_trained(batch) for batch in batches), strict=True)
    finally:
        task.close()
    assert len(shown.images) == recipe.train.global_batch
    np.testing.assert_array_equal(shown.targets, torch.cat(targets).numpy())
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (recipe.augment.mean, recipe.augment.std))
    pixels = ((torch.cat(images) * std + mean) * 255).permute(0, 2, 3, 1).numpy()
    assert np.abs(shown.images.astype(np.float32) - pixels).max() <= 0.501
    assert all(place.split(" in ")[1].startswith("train-") for place in shown.places)


def test_a_mixed_target_names_both_classes_and_their_shares(recipe_file: Path) -> None:
    def labels(*overrides: str) -> list[str]:
        shown = read_batch(load_recipe(recipe_file, [*SMALL, *overrides]), step=1, count=8)
        return [shown.label(number) for number in range(8)]

    mixed = [re.fullmatch(r"(0\.\d\d) class\d \+ (0\.\d\d) class\d", label) for label in labels(*MIXED)]
    shares = [float(found[1]) + float(found[2]) for found in mixed if found]
    assert shares == pytest.approx([1] * len(shares), abs=0.02) != []
    assert set(labels("augment.mixup=0", "augment.cutmix=0")) <= {f"class{number}" for number in range(4)}


def test_the_picture_is_beside_the_run_and_not_in_the_working_directory(recipe_file, tmp_path, monkeypatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run = tmp_path / "runs" / "first"
    listed = karat_says("show", str(recipe_file), *SMALL, f"run.dir={run}", "--step", "2", "--images", "5")
    assert "step 2: 5 images" in listed
    assert "in train-" in listed
    assert listed.splitlines()[-1] == f"{run}-step-2.png"
    assert [path.name for path in run.parent.iterdir()] == ["first-step-2.png"]
    assert not list(Path.cwd().iterdir())
    with Image.open(f"{run}-step-2.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 5 * 100


def test_counts_and_sizes_are_those_of_the_data(shards: Path, image_folder: Path, tmp_path: Path) -> None:
    found = {}
    for name, path in {"shards": shards, "folder": image_folder}.items():
        out = tmp_path / name
        karat_says("data", str(path), "--out", f"{out}.html", "--json", f"{out}.json")
        found[name] = json.loads(Path(f"{out}.json").read_text())
        page = Path(f"{out}.html").read_text()
        assert page.count("data:image/jpeg;base64,") > 4
        assert "http" not in page.replace("http-equiv", "")
    per_class = {f"class{label}": TRAIN_PER_CLASS for label in range(CLASSES)}
    assert found["folder"]["train"]["per_class"] == found["shards"]["train"]["per_class"] == per_class
    train = found["shards"]["train"]
    assert train["images"] == train["sampled"] == CLASSES * TRAIN_PER_CLASS
    assert train["width"]["median"] == SIZE


def test_odd_images_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "data/train/<b>cat</b>"
    folder.mkdir(parents=True)
    (tmp_path / "data/train/empty").mkdir()
    (tmp_path / "data/val/dog").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(tmp_path / "data/val/dog/one.jpg")
    plain = Image.new("RGB", (64, 64))
    plain.save(folder / "fine.jpg")
    for name in ("turned.jpg", "turned2.jpg"):
        plain.save(folder / name, exif=exif(6))
    Image.new("RGB", (300, 40)).save(folder / "narrow.jpg")
    Image.new("CMYK", (64, 64)).save(folder / "cmyk.jpg")
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "caf\udce9.gif").write_bytes(b"GIF89a")  # as Latin-1 has it
    (folder / ".hidden").touch()
    out = tmp_path / "d.json"
    said = karat_says("data", str(tmp_path / "data"), "--json", str(out), "--out", str(tmp_path / "p.html"))
    train = json.loads(out.read_text())["train"]
    odd = {Path(one["image"]).name: one["what"] for one in train["odd"]}
    assert odd.keys() == {"turned.jpg", "turned2.jpg", "narrow.jpg", "cmyk.jpg", "broken.jpg"}
    assert odd["broken.jpg"].startswith("cannot be decoded")
    assert train["empty_classes"] == ["empty"]
    assert "without images: empty" in said
    assert f"1 file left out, {folder}/caf\\udce9.gif: no suffix of .jpg" in said
    assert "val: 1 image of 1 class, 1 each\n" in said
    first, *others = [line for line in said.splitlines() if line.startswith("  odd: ")]
    assert "broken.jpg: cannot be decoded" in first
    assert any("turned.jpg and 1 more: its EXIF orientation is 6" in line for line in others)
    assert "val has classes that train does not have: dog" in said
    assert "val lacks classes that train has: <b>cat<, empty" in said
    assert "<b>cat</b>" not in (tmp_path / "p.html").read_text()


def test_the_odd_images_that_are_not_listed_are_counted(tmp_path: Path) -> None:
    for number in range(14):  # three of the first kind, which is listed, and one of each of eleven others
        width = 10 + max(number - 2, 0)
        write(tmp_path / "d/train/ant" / f"{number:02}.jpg", jpeg(number, width=width, height=20))
    said = karat_says("data", str(tmp_path / "d"), "--out", str(tmp_path / "p.html"))
    listed = [line for line in said.splitlines() if line.startswith("  odd: ")]
    assert len(listed) == 10
    assert any(line.endswith(" and 2 more: it is small: 10 x 20") for line in listed)
    assert "  and 2 more; the page lists all\n" in said


def test_a_library_says_nothing_of_exif_data_that_are_cut_short(tmp_path: Path) -> None:
    cut = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01"
    plain = jpeg(0, width=64, height=64)
    segment = b"\xff\xe1" + (len(cut) + 2).to_bytes(2, "big") + cut
    write(tmp_path / "d/train/ant/0.jpg", plain[:2] + segment + plain[2:])
    done = karat_done("data", str(tmp_path / "d"), "--out", str(tmp_path / "p.html"))
    assert "UserWarning" not in done.stdout + done.stderr


def test_truncated_images_are_found_beyond_the_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(6):
        write(tmp_path / "d/train/ant" / f"{number}.jpg", jpeg(number, width=640, height=480))
    cut = tmp_path / "d/train/ant/3.jpg"
    for left in (0.5, 0.95):
        cut.write_bytes(cut.read_bytes()[: int(left * cut.stat().st_size)])

    def said(images: int) -> tuple[list[str], str]:
        arguments = ("--images", str(images), "--json", str(tmp_path / "d.json"), "--out", str(tmp_path / "p.html"))
        text = karat_says("data", str(tmp_path / "d"), *arguments)
        train = json.loads((tmp_path / "d.json").read_text())["train"]
        assert train["sampled"] == images
        return [one["image"] for one in train["odd"]], text

    odd, text = said(images=1)
    assert odd == ["ant/3.jpg"]
    assert "odd: ant/3.jpg: cannot be decoded: image file is truncated" in text
    assert "checked by decoding: all 6\n" in text
    monkeypatch.setattr("karat_scale.commands.look.command.DECODED_BELOW", 6)
    found = {images: said(images) for images in (1, 6)}
    assert [odd for odd, _ in found.values()] == [[], ["ant/3.jpg"]]
    assert "checked by decoding: these only; --images 6 checks all" in found[1][1]


@pytest.mark.slow
def test_the_odd_images_of_betons_are_named_by_one_reading_of_the_index(tmp_path: Path, monkeypatch) -> None:
    need_ffcv()
    for number in range(5):
        write(tmp_path / "src/train/ant" / f"{number}.jpg", jpeg(number))  # of 24 x 20 pixels, which is small
    make_betons(tmp_path / "src", tmp_path / "betons")
    read, real = [], shard_format.read_column
    monkeypatch.setattr(shard_format, "read_column", lambda *arguments: read.append(arguments[1]) or real(*arguments))
    out = tmp_path / "d.json"
    karat_says("data", str(tmp_path / "betons"), "--json", str(out), "--out", str(tmp_path / "p.html"))
    odd = json.loads(out.read_text())["train"]["odd"]
    assert {one["image"] for one in odd} == {f"ant/{number}" for number in range(5)}
    assert read.count("key") == 2  # when it is opened, and for the names
