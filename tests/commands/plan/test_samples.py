"""How many images a plan counts, and what it leaves untouched meanwhile."""

from pathlib import Path

import pytest

from karat_scale.commands.plan.tracing import IMAGENET, count_samples
from karat_scale.recipe.loading import load_recipe


def test_the_count_is_that_of_the_record(recipe_file: Path) -> None:
    data = load_recipe(recipe_file).data
    assert count_samples(data) == (64, "of the recipe's data")


def test_no_decoder_is_made_and_no_shard_hashed(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_recipe(recipe_file, ["data.verify=hash", "data.decoder=native"]).data
    for place in ("karat_scale.data.decoders.make_decoder", "karat_scale.data.shards.shard_format.check_file"):
        monkeypatch.setattr(place, lambda *_, place=place: pytest.fail(f"{place} was called"))
    assert count_samples(data)[0] == 64


def test_synthetic_data_and_folders_are_counted_too(tmp_path: Path) -> None:
    synthetic = load_recipe("imagenet_vit_tiny", ["data.backend=synthetic", "data.synthetic_samples=48"]).data
    assert count_samples(synthetic)[0] == 48
    for name in ("train/cat/1.jpg", "train/cat/2.jpg", "train/dog/1.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    folder = load_recipe("imagenet_vit_tiny", ["data.backend=folder", f"data.path={tmp_path}"]).data
    assert count_samples(folder) == (3, "of the recipe's data")


def test_a_stream_says_how_many_images_count() -> None:
    stream = ["data.path=elsewhere", "data.order=stream", "data.stream=pipe:cat a.tar", "data.stream_samples=48"]
    assert count_samples(load_recipe("imagenet_vit_tiny", stream).data) == (48, "of the recipe's data")


def test_data_that_is_elsewhere_counts_as_imagenet(tmp_path: Path) -> None:
    data = load_recipe("imagenet_vit_tiny", [f"data.path={tmp_path / 'elsewhere'}"]).data
    assert count_samples(data)[0] == IMAGENET
