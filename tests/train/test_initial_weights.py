"""A new run begins with the weights of another run, of a file, or of timm."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from karat_scale.errors import RecipeError, UserError
from karat_scale.export.command import export_run
from karat_scale.train.distributed import World
from karat_scale.train.initial_weights import initialise, read_weights
from karat_scale.train.run_directory import RunDirectory
from tests.conftest import events, karat, summary
from tests.train.test_save_points import train_to_the_end

NAME = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"


def equal_weights(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(x, right[name]) for name, x in left.items())


@pytest.fixture
def run(small_recipe, world: World) -> Path:
    recipe = small_recipe("data.workers=0")
    train_to_the_end(recipe, world)
    RunDirectory(recipe.run.dir).begin(recipe)
    return Path(recipe.run.dir)


def test_a_run_its_checkpoint_and_its_export_are_the_same_weights(run: Path, tmp_path: Path) -> None:
    weights = read_weights(str(run))
    name = (run / "checkpoints" / "best").read_text().strip()
    assert equal_weights(weights, read_weights(str(run / "checkpoints" / name)))
    export_run(str(run), "safetensors", "best", "ema", str(tmp_path / "out.safetensors"))
    assert equal_weights(weights, read_weights(str(tmp_path / "out.safetensors")))
    torch.save({"model": weights}, tmp_path / "out.pth")
    assert equal_weights(weights, read_weights(str(tmp_path / "out.pth")))


class Harmful:
    def __reduce__(self):
        return print, ("this ran",)


def test_what_is_not_weights_is_one_line(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.safetensors").write_text("hello")
    torch.save({"model": {"a": torch.ones(1)}, "epoch": Harmful()}, tmp_path / "harmful.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    for source, message in (
        (tmp_path / "nothing", "neither a run's directory"),
        (tmp_path / "text.safetensors", "not a file of weights that is safe to read"),
        (tmp_path / "harmful.pth", "not a file of weights that is safe to read"),
        (tmp_path / "list.pth", "not a file of weights|no state dict"),
        ("timm:vit_tiny_patch16_225", "did you mean timm:vit_tiny_patch16_224"),
    ):
        with pytest.raises(UserError, match=f"init_from = .*{message}") as caught:
            initialise(timm.create_model("test_vit"), str(source), world)
        assert "\n" not in str(caught.value)
    assert "this ran" not in capsys.readouterr().out


def test_timms_weights_come_from_its_cache_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RecipeError, match=r"cannot be fetched: .*HF_HOME names the cache"):
        read_weights(f"timm:{NAME}")
    model = timm.create_model(NAME)
    home = tmp_path / f"models--timm--{NAME}"
    snapshot = home / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0123")
    save_file(model.state_dict(), snapshot / "model.safetensors")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert equal_weights(read_weights(f"timm:{NAME}"), model.state_dict())


def test_a_run_trained_at_one_size_is_evaluated_and_tuned_at_another(recipe_file: Path, tmp_path: Path) -> None:
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    recipe = str(recipe_file)
    karat("train", recipe, f"run.dir={base}", "train.epochs=1")
    larger = karat("eval", str(base), "model.image_size=24", "--json", str(tmp_path / "eval.json"))
    assert larger.returncode == 0, larger.stderr
    assert json.loads((tmp_path / "eval.json").read_text())["images"] == 28
    command = ("train", recipe, f"run.dir={tuned}", f"init_from={base}", "model.image_size=24", "train.max_steps=3")
    done = karat(*command)
    assert done.returncode == 0, done.stderr
    assert f"begins with the weights of {base}; interpolated from 4 x 4 patches" in done.stdout
    assert summary(tuned)["steps"] == 3
    shutil.rmtree(base)  # a run that goes on needs it no more
    again = karat(*command[:-1], "train.max_steps=5")
    assert again.returncode == 0, again.stderr
    assert events(tuned, "resume")[0]["step"] == 3
