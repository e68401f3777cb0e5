"""`karat show` and `karat data` on real data: what they draw is what training reads."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from karat_scale.commands.cli import main
from karat_scale.commands.look.batch import ShownBatch, read_batch
from karat_scale.data.shards import shard_format
from karat_scale.data.shards.shards import ShardSplit
from karat_scale.engine.reporting.progress import Reporter, SilentDisplay
from karat_scale.recipe.loading import load_recipe
from karat_scale.training.tasks.classification.task import ClassificationTask
from tests.conftest import SMALL
from tests.data.betons import need_ffcv
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


def test_a_mixed_target_names_both_classes_and_their_shares(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file, [*SMALL, *MIXED, f"run.dir={tmp_path / 'run'}"])
    shown = read_batch(recipe, step=1, count=8)
    labels = [shown.label(number) for number in range(8)]
    mixed = [label for label in labels if " + " in label]
    assert mixed
    for label in mixed:
        shares = [float(part.split()[0]) for part in label.split(" + ")]
        assert sum(shares) == pytest.approx(1, abs=0.02)
    plain = read_batch(load_recipe(recipe_file, [*SMALL, "augment.mixup=0", "augment.cutmix=0"]), step=1, count=8)
    assert all(plain.label(number) in plain.classes for number in range(8))


def test_two_classes_are_both_named() -> None:
    def label(first: float, smoothing: float = 0.0) -> str:
        targets = np.array([[first, 1 - first]], np.float32) * (1 - smoothing) + smoothing / 2
        return ShownBatch(np.zeros((1, 2, 2, 3), np.uint8), targets, ["x"], ("cat", "dog"), [], smoothing / 2).label(0)

    assert label(0.7) == label(0.7, 0.1) == "0.70 cat + 0.30 dog"
    assert label(0.5) == "0.50 cat + 0.50 dog"
    assert label(1.0, 0.1) == "cat"


def test_the_picture_is_beside_the_run_and_not_in_the_working_directory(
    recipe_file: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run = tmp_path / "runs" / "first"
    assert main(["show", str(recipe_file), *SMALL, f"run.dir={run}", "--step", "2", "--images", "5"]) == 0
    listed = capsys.readouterr().out
    assert "step 2: 5 images" in listed
    assert "in train-" in listed
    assert listed.splitlines()[-1] == f"{run}-step-2.png"
    assert [path.name for path in run.parent.iterdir()] == ["first-step-2.png"]
    assert not list(Path.cwd().iterdir())
    with Image.open(f"{run}-step-2.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 5 * 100


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("show", "r.yaml", *SMALL, "--step", "999999"), "the recipe has steps 1 to"),
        (("show", "r.yaml", *SMALL, "--out", "/nowhere/x.png"), "cannot be written"),
        (("show", "r.yaml", *SMALL, "data.path=/nowhere"), "is not a directory"),
        (("data", "."), "is no data set"),
    ],
)
def test_what_cannot_be_shown_is_one_line(
    arguments: tuple[str, ...], said: str, recipe_file: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(recipe_file.parent)
    assert main([*arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_counts_and_sizes_are_those_of_the_data(shards: Path, image_folder: Path, tmp_path: Path) -> None:
    found = {}
    for name, path in {"shards": shards, "folder": image_folder}.items():
        out = tmp_path / name
        assert main(["data", str(path), "--out", f"{out}.html", "--json", f"{out}.json"]) == 0
        found[name] = json.loads(Path(f"{out}.json").read_text())
        page = Path(f"{out}.html").read_text()
        assert page.count("data:image/jpeg;base64,") > 4
        assert "http" not in page.replace("http-equiv", "")
    split = ShardSplit(shards, "train", 1000)
    train = found["shards"]["train"]
    assert train["images"] == len(split) == train["sampled"]
    assert list(train["per_class"].values()) == np.bincount(split.labels).tolist()
    widths = []
    for number in range(len(split)):
        with Image.open(io.BytesIO(split.read(number))) as image:
            widths.append(image.width)
    assert train["width"]["median"] == np.median(widths)
    assert found["folder"]["train"]["per_class"] == train["per_class"]


def test_odd_images_are_named(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "data/train/<b>cat</b>"
    folder.mkdir(parents=True)
    (tmp_path / "data/train/empty").mkdir()
    plain = Image.new("RGB", (64, 64))
    plain.save(folder / "fine.jpg")
    exif = Image.Exif()
    exif[274] = 6
    plain.save(folder / "turned.jpg", exif=exif)
    Image.new("RGB", (300, 40)).save(folder / "narrow.jpg")
    Image.new("CMYK", (64, 64)).save(folder / "cmyk.jpg")
    (folder / "broken.jpg").write_bytes(b"no image")
    out = tmp_path / "d.json"
    assert main(["data", str(tmp_path / "data"), "--json", str(out), "--out", str(tmp_path / "p.html")]) == 0
    train = json.loads(out.read_text())["train"]
    odd = {Path(one["image"]).name: one["what"] for one in train["odd"]}
    assert odd.keys() == {"turned.jpg", "narrow.jpg", "cmyk.jpg", "broken.jpg"}
    assert odd["broken.jpg"].startswith("cannot be read")
    assert train["empty_classes"] == ["empty"]
    assert "without images: empty" in capsys.readouterr().out
    assert "<b>cat</b>" not in (tmp_path / "p.html").read_text()


def test_the_odd_images_of_betons_are_named_by_one_reading_of_the_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_ffcv()
    for number in range(5):
        write(tmp_path / "src/train/ant" / f"{number}.jpg", jpeg(number))  # of 24 x 20 pixels, which is small
    make_betons(tmp_path / "src", tmp_path / "betons")
    read, real = [], shard_format.read_column
    monkeypatch.setattr(shard_format, "read_column", lambda *arguments: read.append(arguments[1]) or real(*arguments))
    out = tmp_path / "d.json"
    assert main(["data", str(tmp_path / "betons"), "--json", str(out), "--out", str(tmp_path / "p.html")]) == 0
    odd = json.loads(out.read_text())["train"]["odd"]
    assert {one["image"] for one in odd} == {f"ant/{number}" for number in range(5)}
    assert read.count("key") == 2  # when it is opened, and for the names
