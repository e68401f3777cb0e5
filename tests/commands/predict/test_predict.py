"""`karat predict` on a real run and on what was exported from it: its logits are those of `karat eval`."""

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
import yaml
from PIL import Image

from karat_scale.commands.analyze.maps import LastBlock
from karat_scale.commands.predict.command import find_images, logits_of, open_classifier, predict_files
from karat_scale.engine.engine import forward_for_evaluation
from karat_scale.engine.reporting.progress import Reporter, SilentDisplay
from karat_scale.foundation.files import shipped_directory
from karat_scale.models import create_model
from karat_scale.models.attention_matrices import watched
from karat_scale.recipe import Recipe
from karat_scale.recipe.files import locate
from karat_scale.training.run_directory import OpenRun
from karat_scale.training.tasks.classification.task import ClassificationTask
from tests.conftest import CLASSES, SMALL, VAL_PER_CLASS, karat, karat_done, karat_here, karat_refuses, karat_says
from tests.data.conftest import exif
from tests.data.prepare.making import prepared
from tests.small_engines import SWIN

IMAGES = CLASSES * VAL_PER_CLASS
NAMES = [f"class{label}" for label in range(CLASSES)]


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def evaluated_logits(run: Path, weights: str, batch: int, world) -> tuple[list[str], torch.Tensor]:
    """Return the files of the validation images and their logits, as `karat eval` computes them."""
    opened = OpenRun.at(run, Recipe, [f"train.eval_batch={batch}", "data.workers=0"], weights)
    recipe = opened.recipe
    task = ClassificationTask(recipe, world, Reporter(SilentDisplay(), None))
    seen = []
    try:
        forward = forward_for_evaluation(task.trained_model(opened), recipe.train, world.device)

        def noted(images: torch.Tensor) -> torch.Tensor:
            seen.append(forward(images).float().cpu())
            return seen[-1]

        task.evaluate(noted, lambda *_: None)
        files = [task.backend._val.file_of(number) for number in range(IMAGES)]
    finally:
        task.close()
    return files, torch.cat(seen)


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_the_logits_are_those_of_evaluation(run: Path, world, weights: str) -> None:
    files, expected = evaluated_logits(run, weights, 7, world)
    classifier = open_classifier(str(run), "best", weights)
    found = torch.cat([logits for _, logits in logits_of(classifier, files, 7)])
    assert torch.equal(found, expected)
    raw = open_classifier(str(run), "best", "ema" if weights == "raw" else "raw")
    assert not torch.equal(torch.cat([logits for _, logits in logits_of(raw, files, 7)]), expected)


@pytest.mark.parametrize("name", sorted(path.name for path in shipped_directory("examples/weights").iterdir()))
def test_the_models_that_come_with_the_package_are_as_recorded_and_know_a_cat(name: str, tmp_path: Path) -> None:
    photo, found = tmp_path / "photo.jpg", tmp_path / "found.json"
    Image.fromarray(skimage.data.chelsea()).save(photo)
    assert karat_here("predict", name, str(photo), "--json", str(found)) == 0
    assert "cat" in [guess["class"] for guess in lines_of(found)[0]["predictions"][:2]]
    facts = json.loads(locate(name)[0].with_name("config.json").read_text())["karat_scale"]
    trained = yaml.safe_load(facts["recipe"])["run"]["dir"]
    record = Path(__file__).parents[3] / f"docs/experiments/contrasts/{trained}.json"
    assert float(facts["top1"]) == json.loads(record.read_text())["top1"]


def test_a_camera_photo_is_seen_upright_as_in_shards(run: Path, image_folder: Path, tmp_path: Path) -> None:
    photo, in_shards = tmp_path / "photo.jpg", tmp_path / "in-shards.jpg"
    with Image.open(image_folder / "val" / "class0" / "000.jpg") as image:
        image.crop((0, 0, 20, 15)).save(photo, quality=95, exif=exif(6))
    in_shards.write_bytes(prepared(photo.read_bytes()))
    classifier = open_classifier(str(run), "best", "raw")
    ((batch, logits),) = logits_of(classifier, [str(photo), str(in_shards)], 2)
    assert torch.equal(batch.images[0], batch.images[1])
    assert torch.equal(logits[0], logits[1])
    sideways = tmp_path / "sideways.jpg"
    with Image.open(photo) as image:
        image.save(sideways, quality=95)
    ((as_stored, _),) = logits_of(classifier, [str(sideways)], 1)
    assert not torch.equal(as_stored.images[0], batch.images[0])


@pytest.mark.parametrize("form", ["hub-folder", "timm", "safetensors"])
def test_an_export_needs_no_run(run: Path, image_folder: Path, tmp_path: Path, form: str) -> None:
    out = tmp_path / ("owls.safetensors" if form == "safetensors" else "owls")
    karat_says("export", str(run), "--format", form, "--weights", "ema", "--out", str(out))
    files = find_images([str(image_folder / "val")]).files
    of_run, of_export = (open_classifier(str(source), "best", "auto") for source in (run, out))
    assert of_export.classes == tuple(NAMES)
    assert (of_export.checkpoint, of_export.weights) == (of_run.checkpoint, "ema")
    expected, found = (torch.cat([logits for _, logits in logits_of(one, files, 8)]) for one in (of_run, of_export))
    assert torch.equal(found, expected)


def test_a_name_may_look_like_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~$x.png").touch()
    assert find_images(["~$x.png", "~nobody/y.png"]).files == ["~$x.png"]


def test_a_folder_with_two_names_is_searched_once(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jpg").touch()
    (tmp_path / "b").symlink_to("a")
    assert find_images([str(tmp_path)]).files == [str(tmp_path / "a" / "x.jpg")]


def test_files_folders_and_globs_with_bad_ones_among_them(run: Path, image_folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    (mine / "below").mkdir(parents=True)
    pixels = (image_folder / "val" / "class1" / "000.jpg").read_bytes()
    for name in ("b.jpg", "below/a.jpeg", ".hidden.jpg", "notes.txt"):
        (mine / name).write_bytes(pixels)
    (mine / "broken.png").write_bytes(b"no image")
    (mine / "below" / "back").symlink_to(mine)
    os.mkfifo(tmp_path / "pipe.jpg")
    single, pattern = image_folder / "val" / "class0" / "000.jpg", str(image_folder / "val" / "class2" / "00[12].jpg")
    listed, table = tmp_path / "p.jsonl", tmp_path / "p.csv"
    names = [str(single), str(mine), str(mine / "b.jpg"), pattern, str(tmp_path / "pipe.jpg"), str(tmp_path / "gone*")]
    options = ("--top", "3", "--batch", "2", "--json", str(listed), "--csv", str(table))
    done = karat("predict", str(run), *names, *options)
    assert done.returncode == 1
    assert "5 images predicted, 3 failed" in done.stdout
    for bad in (f"{mine / 'broken.png'}: not an image", "pipe.jpg: not a regular file", "gone*: no such file"):
        assert bad in done.stderr
    assert "1 file in folders left out" in done.stderr
    assert "Traceback" not in done.stderr
    found = {line["image"]: line for line in lines_of(listed)}
    good = [str(single), str(mine / "b.jpg"), str(mine / "below" / "a.jpeg")]
    good += [str(image_folder / "val" / "class2" / f"00{number}.jpg") for number in (1, 2)]
    assert [name for name, line in found.items() if "error" not in line] == good
    for name in good:
        chances = [guess["probability"] for guess in found[name]["predictions"]]
        assert len(chances) == 3
        assert chances == sorted(chances, reverse=True)
        assert 0 < sum(chances) <= 1 + 1e-6
        assert all(guess["class"] == NAMES[guess["label"]] for guess in found[name]["predictions"])
        assert name in done.stdout
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 5 + 3
    first = found[good[0]]["predictions"][0]
    assert (rows[0]["image"], rows[0]["rank"], rows[0]["class"]) == (good[0], "1", first["class"])
    assert float(rows[0]["probability"]) == first["probability"]
    assert {row["image"] for row in rows if row["error"]} == {n for n, line in found.items() if "error" in line}


def test_a_full_disk_does_not_cost_the_predictions(run: Path, image_folder: Path, small_disk: Path, capsys) -> None:
    (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free))
    images, table = str(image_folder / "val" / "class0"), str(small_disk / "p.csv")
    assert karat_here("predict", str(run), images, "--csv", table) == 2
    told = capsys.readouterr()
    assert f"{VAL_PER_CLASS} images predicted, 0 failed" in told.out
    assert told.err.splitlines()[-1] == f"error: {table}: No space left on device"


def test_nothing_predicted_is_exit_code_2(run: Path, tmp_path: Path, capsys) -> None:
    empty, broken, pipe, huge = (tmp_path / name for name in ("empty", "broken.jpg", "b.jpg", "c.jpg"))
    empty.mkdir()
    broken.write_bytes(b"\xff\xd8\xff")
    os.mkfifo(pipe)
    with huge.open("wb") as file:
        file.truncate(10**12)
    assert karat_here("predict", str(run), *map(str, (empty, broken, pipe, huge))) == 2
    said = capsys.readouterr()
    assert "0 images predicted, 4 failed" in said.out
    errors = (f"{empty}: a folder without images", f"{pipe}: not a regular file", f"{huge}: larger than 536.871 MB")
    assert all(error in said.err for error in errors)


def test_an_output_that_is_not_finite_is_no_prediction(run: Path, image_folder: Path) -> None:
    classifier = open_classifier(str(run), "best", "raw")
    classifier.model.head.bias.data[2] = torch.nan
    files = find_images([str(image_folder / "val" / "class0")]).files
    predictions = list(predict_files(classifier, files, 5))
    assert [one.error for one in predictions] == ["the model's output is not finite"] * VAL_PER_CLASS


def test_what_is_no_model_is_one_line(run: Path, image_folder: Path, tmp_path: Path) -> None:
    image = str(image_folder / "val" / "class0" / "000.jpg")
    out, damaged = tmp_path / "owls", tmp_path / "damaged"
    karat_says("export", str(run), "--format", "timm", "--weights", "raw", "--out", str(out))
    shutil.copytree(out, damaged)
    (damaged / "model.safetensors").write_bytes(b"damaged")
    for source, options, said in (
        ("nowhere", (), "nowhere: neither a run's directory nor a folder of karat export"),
        (
            tmp_path,
            (),
            f"{tmp_path}: neither a run's directory nor a folder of karat export; name one in it, such as {damaged}",
        ),
        (out, ("--weights", "ema"), "holds raw only; leave out --weights, or name the run"),
        (out, ("--checkpoint", "latest"), "leave out --checkpoint"),
        (run, ("--checkpoint", "step-00000099"), "--checkpoint step-00000099: "),
        (run, ("--attention", image), "is a file; choose another directory"),
        (damaged, (), "not a whole file of karat export"),
        (image, (), "not a .safetensors file; name the run, or what karat export wrote as safetensors, timm or hub-"),
    ):
        assert said in karat_refuses("predict", str(source), image, *options)


def test_a_name_that_is_not_utf8_goes_through(run: Path, image_folder: Path, tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/\xff\x1b.jpg"
    with open(name, "wb") as file:  # noqa: PTH123
        file.write((image_folder / "val" / "class0" / "000.jpg").read_bytes())
    listed, table = tmp_path / "p.jsonl", tmp_path / "p.csv"
    done = karat_done("predict", str(run), str(tmp_path / "*.jpg"), "--json", str(listed), "--csv", str(table))
    assert os.fsencode(lines_of(listed)[0]["image"]) == name
    assert name in table.read_bytes()
    assert "\x1b" not in done.stdout


@pytest.mark.slow
def test_a_student_predicts_with_the_teacher_that_its_run_keeps(image_folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text("data: {backend: synthetic}\nschedule: {warmup_epochs: 0}\n")
    teacher, student, out = tmp_path / "teacher", tmp_path / "student", tmp_path / "student.safetensors"
    for path, kind in ((teacher, "attention.kind=karat"), (student, f"attention.transfer_from={teacher}")):
        karat_done("train", str(recipe), *SMALL, "train.max_steps=1", kind, f"run.dir={path}")
    image = str(image_folder / "val" / "class0" / "000.jpg")
    karat_says("predict", str(student), image, "--attention", str(tmp_path / "maps"))
    assert (tmp_path / "maps" / "1-000.png").is_file()
    karat_says("export", str(student), "--weights", "raw", "--out", str(out))
    assert "its attention needs its teacher" in karat_refuses("predict", str(out), image)


def test_every_image_that_can_be_read_has_an_overlay(run: Path, image_folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    folder, out, listed = str(image_folder / "val" / "class3"), tmp_path / "maps", tmp_path / "p.jsonl"
    long = tmp_path / f"{'é' * 115}.png"
    shutil.copy(image_folder / "val" / "class3" / "000.jpg", long)
    arguments = ("--batch", "4", "--attention", str(out), "--json", str(listed), "--top", "9")
    assert karat_here("predict", str(run), str(broken), folder, str(long), *arguments) == 1  # one is broken
    lines = lines_of(listed)
    *drawn, shortened = [line["attention"] for line in lines if "attention" in line]
    assert shortened == str(out / f"9-{'é' * 75}.png")
    for line in (line for line in lines if "error" not in line):  # more classes than the model has are all
        assert sorted(guess["class"] for guess in line["predictions"]) == NAMES
        assert sum(guess["probability"] for guess in line["predictions"]) == pytest.approx(1)
    assert drawn == [str(out / f"{number + 2}-{number:03d}.png") for number in range(7)]
    assert sorted(map(str, out.iterdir())) == sorted([*drawn, shortened])
    pixels = [np.asarray(Image.open(name)) for name in drawn]
    assert all(image.std() > 10 for image in pixels)
    assert not np.array_equal(pixels[0], pixels[1])


def test_the_map_is_the_class_tokens_row_of_the_last_block(run: Path, image_folder: Path) -> None:
    classifier = open_classifier(str(run), "best", "auto")
    files = find_images([str(image_folder / "val" / "class1")]).files
    maps = LastBlock.of(classifier.model, classifier.recipe.model)
    assert (maps.block, maps.prefix, maps.grid, maps.has_class_token) == (1, 1, (4, 4), True)
    seen = {}
    with watched(classifier.model, lambda number, raw, learned: seen.update({number: (raw, learned)})):
        ((_, with_maps),) = logits_of(classifier, files, 7, maps)
    assert torch.equal(maps.scores, seen[1][0][:, :, 0, 1:])
    assert torch.equal(maps.weights, seen[1][1][:, :, 0, 1:])
    ((_, without),) = logits_of(classifier, files, 7)
    assert torch.equal(with_maps, without)  # looking changes nothing


def test_without_a_class_token_the_mean_over_the_patches_is_shown(small_recipe) -> None:
    recipe = small_recipe(*SWIN, "model.image_size=16")  # its last stage is one window
    model = create_model(recipe.model, recipe.attention).eval()
    maps = LastBlock.of(model, recipe.model)
    assert (maps.prefix, maps.grid, maps.has_class_token) == (0, (4, 4), False)
    seen = {}
    with (
        torch.no_grad(),
        watched(model, lambda number, _, learned: seen.update({number: learned})),
        watched(model, maps.visit),
    ):
        model(torch.rand(2, 3, 16, 16))
    torch.testing.assert_close(maps.weights, seen[maps.block].mean(2))


def test_predictions_go_on_without_a_map(make_run, small_recipe, image_folder: Path, tmp_path: Path, capsys) -> None:
    run, *_ = make_run(small_recipe(*SWIN))
    image = str(image_folder / "val" / "class0" / "000.jpg")
    assert karat_here("predict", str(run), image, "--attention", str(tmp_path / "maps")) == 0
    said = capsys.readouterr()
    assert "note: no attention overlays: the last block of swin_mini" in said.err
    assert "1 image predicted" in said.out
    assert not (tmp_path / "maps").exists()
