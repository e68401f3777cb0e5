"""Overlays show the last block's attention; a model without a map says why."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from karat_scale.commands.analyze.maps import LastBlock, NoMapError
from karat_scale.commands.predict.command import find_images, logits_of, open_classifier
from karat_scale.models import create_model
from karat_scale.models.attention_matrices import watched
from tests.conftest import karat_here

SWIN = (
    "model.name=swin_mini_patch2_window4_32",
    "model.patch_size=null",
    "model.embed_dim=null",
    "model.depth=null",
    "model.num_heads=null",
)


def test_every_image_that_can_be_read_has_an_overlay(run: Path, image_folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    folder, out = str(image_folder / "val" / "class3"), tmp_path / "maps"
    listed = tmp_path / "p.jsonl"
    arguments = ("--batch", "4", "--attention", str(out), "--json", str(listed))
    assert karat_here("predict", str(run), str(broken), folder, *arguments) == 0
    lines = [json.loads(line) for line in listed.read_text().splitlines()]
    drawn = [line["attention"] for line in lines if "attention" in line]
    assert drawn == [str(out / f"{number + 2}-{number:03d}.png") for number in range(7)]
    assert sorted(path.name for path in out.iterdir()) == sorted(Path(name).name for name in drawn)
    pixels = [np.asarray(Image.open(name)) for name in drawn]
    assert all(image.std() > 10 for image in pixels)
    assert not np.array_equal(pixels[0], pixels[1])


def test_a_long_name_is_shortened(run: Path, image_folder: Path, tmp_path: Path) -> None:
    long = tmp_path / f"{'é' * 115}.png"
    long.write_bytes((image_folder / "val" / "class3" / "000.jpg").read_bytes())
    assert karat_here("predict", str(run), str(long), "--attention", str(tmp_path / "maps")) == 0
    (drawn,) = (tmp_path / "maps").iterdir()
    assert drawn.name == f"1-{'é' * 75}.png"


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
        maps.watching(model),
    ):
        model(torch.rand(2, 3, 16, 16))
    torch.testing.assert_close(maps.weights, seen[maps.block].mean(2))


def test_windows_have_no_map_of_the_image(small_recipe) -> None:
    recipe = small_recipe(*SWIN, "model.image_size=32")
    model = create_model(recipe.model, recipe.attention)
    with pytest.raises(NoMapError, match="attends within 4 windows, not over the image"):
        LastBlock.of(model, recipe.model)


def test_predictions_go_on_without_a_map(make_run, small_recipe, image_folder: Path, tmp_path: Path, capsys) -> None:
    run, *_ = make_run(small_recipe(*SWIN, "model.image_size=32"))
    image = str(image_folder / "val" / "class0" / "000.jpg")
    assert karat_here("predict", str(run), image, "--attention", str(tmp_path / "maps")) == 0
    said = capsys.readouterr()
    assert "note: no attention overlays: the last block of swin_mini" in said.err
    assert "1 image predicted" in said.out
    assert not (tmp_path / "maps").exists()
