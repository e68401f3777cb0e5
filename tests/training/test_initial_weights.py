"""A new run begins with the weights of another run, of a file, or of timm, and names the run that they come from."""

import json
import logging
import re
import shutil
import time
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from karat_scale.checkpoint.tensor_storage import read_metadata
from karat_scale.commands.export.command import export_run
from karat_scale.engine.distributed import ALONE
from karat_scale.foundation.errors import RecipeError, UserError
from karat_scale.models import create_model
from karat_scale.recipe import Recipe
from karat_scale.recipe.loading import load_recipe
from karat_scale.training.run_directory import OpenRun, RunDirectory
from karat_scale.training.tasks.classification.distillation_teacher import read_distillation_teacher
from karat_scale.training.weights_file import (
    exported_sections,
    initialise,
    read_facts,
    read_weights,
    run_behind,
    write_model,
)
from paper.record import take_record
from tests.conftest import SMALL, events, karat, karat_done, karat_here, karat_refuses, summary
from tests.training.test_save_points import train_to_the_end

NAME = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"


def equal_weights(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(x, right[name]) for name, x in left.items())


@pytest.fixture
def run(small_recipe, world) -> Path:
    recipe = small_recipe("data.workers=0")
    train_to_the_end(recipe, world)
    RunDirectory(recipe.run.dir).begin(recipe)
    return Path(recipe.run.dir)


def test_a_run_its_checkpoint_and_its_export_are_the_same_weights(run, tmp_path, monkeypatch) -> None:
    weights, origin, normalised, _ = read_weights(str(run))
    assert normalised == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    name = (run / "checkpoints" / "best").read_text().strip()
    assert equal_weights(weights, read_weights(str(run / "checkpoints" / name)).tensors)
    assert read_weights(str(run / "checkpoints" / "best")).origin == origin
    for form, out in (("safetensors", "out.safetensors"), ("timm", "timm"), ("hub-folder", "hub")):
        export_run(str(run), form, "best", "ema", str(tmp_path / out))
        exported = read_weights(str(tmp_path / out))
        assert equal_weights(weights, exported.tensors)
        assert (exported.origin, exported.normalised) == (origin, normalised)
    torch.save({"model": weights}, tmp_path / "out.pth")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert equal_weights(weights, read_weights("~/out.pth").tensors)
    assert read_weights("~/out.pth").origin is None


def test_a_run_gives_the_weights_that_it_evaluates(small_recipe, world) -> None:
    recipe = small_recipe("data.workers=0", "train.epochs=1", "train.ema_decay=0.9")
    train_to_the_end(recipe, world)
    found = {}
    for kind in ("ema", "raw"):
        RunDirectory(recipe.run.dir).begin(recipe.changed(train__eval_weights=kind))
        found[kind] = read_weights(recipe.run.dir).tensors
        model = create_model(recipe.model, recipe.attention)
        OpenRun.at(recipe.run.dir, Recipe, weights=kind).load(model)
        assert equal_weights(found[kind], model.state_dict())
    assert not equal_weights(found["ema"], found["raw"])


def test_a_folder_of_a_universal_model_gives_every_block_its_operator(small_recipe, world, tmp_path) -> None:
    recipe = small_recipe("data.workers=0", "attention.mode=universal", "train.epochs=1")
    train_to_the_end(recipe, world)
    RunDirectory(recipe.run.dir).begin(recipe)
    export_run(recipe.run.dir, "hub-folder", "best", "ema", str(tmp_path / "hub"))
    for source in (recipe.run.dir, tmp_path / "hub", tmp_path / "hub" / "model.safetensors"):
        model = create_model(recipe.model, recipe.attention)
        given = recipe.model_copy(update={"init_from": str(source)})
        assert initialise(model, given, world) == f"begins with the weights of {source}"
        assert equal_weights(model.state_dict(), read_weights(recipe.run.dir).tensors)


def test_what_weights_do_not_tell_is_compared(run, world) -> None:
    recipe = RunDirectory(run).recipe().model_copy(update={"init_from": str(run)})

    def begin(model: dict[str, object], attention: dict[str, object]) -> str:
        other = recipe.model_copy(
            update={
                "model": recipe.model.model_copy(update=model),
                "attention": recipe.attention.model_copy(update=attention),
            }
        )
        return initialise(create_model(other.model, other.attention), other, world)

    with pytest.raises(RecipeError, match=r"with 2 heads per layer, the model has 4; use model.num_heads=2"):
        begin({"num_heads": 4}, {"kind": "softmax"})
    differ = re.escape("attention.grid (2 -> 3), attention.rank (4 -> 5); set the keys as it has them")
    with pytest.raises(RecipeError, match=f"^init_from = {run}: it is of another model: {differ}$"):
        begin({"num_classes": 7}, {"rank": 5, "grid": 3})
    line = begin({}, {"base": "silu", "simplex": True})
    assert line.endswith(
        f"{run}; attention.simplex = false in the weights, true here; attention.base = zero in the weights, silu here"
    )


def test_images_normalised_in_another_way_are_told(run, world) -> None:
    recipe = RunDirectory(run).recipe().changed(init_from=str(run), augment__mean=(0.5, 0.5, 0.5))
    line = initialise(create_model(recipe.model, recipe.attention), recipe, world)
    assert line.endswith(
        "the weights were trained with augment.mean = [0.485, 0.456, 0.406], not [0.5, 0.5, 0.5]; set the same"
    )


def test_a_folder_of_timm_says_how_its_images_are_normalised(small_recipe, world, tmp_path) -> None:
    """A teacher from such a folder saw images that were normalised as for the student."""
    recipe = small_recipe("data.workers=0", "attention.kind=softmax", "train.epochs=1")
    theirs = create_model(recipe.model, recipe.attention)
    (tmp_path / "theirs").mkdir()
    save_file(theirs.state_dict(), tmp_path / "theirs" / "model.safetensors", {"format": "pt"})
    config = {"architecture": recipe.model.name, "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    given = recipe.changed(init_from=str(tmp_path / "theirs"), distill__from_=str(tmp_path / "theirs"))
    line = initialise(create_model(recipe.model, recipe.attention), given, world)
    assert "the weights were trained with augment.mean = [0.5, 0.5, 0.5], not [0.485, 0.456, 0.406]" in line
    train_to_the_end(given, world)
    seen = read_facts(Path(given.run.dir) / "distill.safetensors").preprocessing
    assert seen is not None
    assert (seen.mean, seen.std) == ([0.5] * 3, [0.25] * 3)


class Harmful:
    def __reduce__(self):
        return print, ("this ran",)


def test_what_is_not_weights_is_one_line(world, tmp_path, capfd) -> None:
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "recipe.yaml").write_text("model: {depth: 2}")
    (tmp_path / "model.onnx").write_bytes(b"\x08\x08\x12\x07pytorch")
    (tmp_path / "empty.pth").touch()
    torch.save({"model": {"a": torch.ones(1)}, "epoch": Harmful()}, tmp_path / "harmful.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "list.pth").read_bytes()[:200])
    save_file({"a": torch.ones(1000)}, tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:1000])
    with zipfile.ZipFile(tmp_path / "other.pth", "w") as archive:
        archive.writestr("a/b.txt", "no weights")
    damaged = "not a file of weights that is safe to read: it is damaged, cut short or of another kind; copy it"
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "program.pt")
    for source, message in (
        (tmp_path / "nothing", "neither a run's directory"),
        (tmp_path / "text.safetensors", damaged),
        (tmp_path / "cut.safetensors", damaged),
        (tmp_path / "other.pth", damaged),
        (tmp_path / "recipe.yaml", "not a file of weights; expected .safetensors, or .pth"),
        (tmp_path / "model.onnx", "not a file of weights; expected .safetensors, or .pth"),
        (tmp_path / "empty.pth", "not a file of weights; expected .safetensors, or .pth"),
        (tmp_path / "harmful.pth", "not a file of weights that is safe to read: it holds more than tensors"),
        (tmp_path / "list.pth", "not a state dict .tensors by parameter name.; write one by "),
        (tmp_path / "cut.pth", damaged),
        (tmp_path / "program.pt", "a TorchScript program, .*; use the run, or --format safetensors of it"),
        ("timm:vit_tiny_patch16_225", "did you mean timm:vit_tiny_patch16_224"),
    ):
        recipe = load_recipe("cifar10_vit_tiny", ["data.path=images", f"init_from={source}"])
        capfd.readouterr()
        with pytest.raises(UserError, match=f"init_from = .*{message}") as caught:
            initialise(timm.create_model("test_vit"), recipe, world)
        assert "\n" not in str(caught.value)
        assert "weights_only" not in str(caught.value)
        assert capfd.readouterr() == ("", "")


def put_into_cache(cache: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """Put timm's model of this name into the hub's cache, and cut off the network; return the model."""
    snapshot = cache / f"models--timm--{name}" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0123")
    model = timm.create_model(name)
    save_file(model.state_dict(), snapshot / "model.safetensors")
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return model


def test_timms_weights_come_from_its_cache_without_a_network(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RecipeError, match=r"cannot be fetched: neither .* has them; .*HF_HOME names the cache"):
        read_weights(f"timm:{NAME}")
    model = put_into_cache(tmp_path, NAME, monkeypatch)
    weights = read_weights(f"timm:{NAME}")
    assert equal_weights(weights.tensors, model.state_dict())
    assert weights.normalised == (model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
    recipe = load_recipe("imagenet_vit_tiny", [f"init_from=timm:{NAME}", "model.num_heads=6"])
    other = create_model(recipe.model, recipe.attention)
    with pytest.raises(RecipeError, match=r"have 3 heads per layer, the model has 6; use model\.num_heads=3"):
        initialise(other, recipe, ALONE)
    small = load_recipe("imagenet_vit_small", [f"init_from=timm:{NAME}"])
    with pytest.raises(RecipeError, match="width of 192 in the weights and 384 in the model"):
        initialise(create_model(small.model, small.attention), small, ALONE)


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    nobody = "http://127.0.0.1:9/{repo_id}/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", nobody)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    handler, logged = logging.Handler(), []
    handler.emit = logged.append
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "handlers", [handler])
    with pytest.raises(RecipeError, match=r"cannot be fetched: neither .* has them; ") as caught:
        read_weights(f"timm:{NAME}")
    assert "\n" not in str(caught.value)
    assert not logged


@pytest.mark.slow
def test_a_run_trained_at_one_size_is_evaluated_and_tuned_at_another(recipe_file, tmp_path) -> None:
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    recipe = str(recipe_file)
    karat("train", recipe, f"run.dir={base}", "train.epochs=1")
    karat_done("eval", str(base), "model.image_size=24", "--json", str(tmp_path / "eval.json"))
    assert json.loads((tmp_path / "eval.json").read_text())["images"] == 28
    command = ("train", recipe, f"run.dir={tuned}", f"init_from={base}", "model.image_size=24", "train.max_steps=3")
    done = karat_done(*command)
    assert f"begins with the weights of {base}; interpolated from 4 x 4 patches" in done.stdout
    assert summary(tuned)["steps"] == 3
    shutil.rmtree(base)  # a resumed run does not need it
    karat_done(*command[:-1], "train.max_steps=5")
    assert events(tuned, "resume")[0]["step"] == 3


DEEP = "[" * 100_000
ALIASES = zip("abcdefgh", "bcdefghi", strict=True)
BOMB = "a: &a [x]\n" + "".join(f"{new}: &{new} [{', '.join(9 * [f'*{old}'])}]\n" for old, new in ALIASES)
OF_RECIPE = "run: {{name: {}}}\naugment: {{mean: {}, std: [1, 1, 1]}}"
RECIPES = [
    *("x", "null", "[]", "run: [", "run: 2026-02-30", "run: !!python/name:os.system x", "model: {}", DEEP, BOMB),
    *(OF_RECIPE.format(*lie) for lie in ((3, "[0, 0, 0]"), ("x", "x"), ("x", "[0, 0]"), ("x", "[.nan, 0, 0]"))),
]
SEEN = '{"input_size": [3, 1], "mean": [0, 0, 0], "std": [1, 1, 1]}'
LIES = [
    *(("recipe", text) for text in RECIPES),
    *((key, text) for key in ("model", "attention") for text in ("x", "[]", '"x"', "3", DEEP, "9" * 5000)),
    *(("classes", text) for text in ("3", '"x"', "[1]", '{"a": 1}', DEEP)),
    *(("preprocessing", text) for text in ("[]", "{}", SEEN, DEEP)),
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    (folder / "base.yaml").write_text("data: {backend: synthetic, synthetic_samples: 16}\nattention: {kind: karat}\n")
    quick = (*SMALL, "train.max_steps=1", "schedule.warmup_epochs=0", f"run.dir={folder / 'run'}")
    assert karat_here("train", str(folder / "base.yaml"), *quick) == 0
    out = folder / "good.safetensors"
    assert karat_here("export", str(folder / "run"), "--weights", "raw", "--out", str(out)) == 0
    return out


@pytest.mark.parametrize("number", range(3))
def test_a_lie_beside_weights_is_one_line_before_training(number, exported, tmp_path) -> None:
    """Wrong metadata of weights end in one line before training; three readers each get a third of the cases."""
    lie, image = tmp_path / "lie.safetensors", str(tmp_path / "*.jpg")
    quick = ("train", str(exported.with_name("base.yaml")), *SMALL, "train.max_steps=1", "schedule.warmup_epochs=0")
    for place, (key, text) in enumerate(LIES[number::3]):
        save_file(load_file(exported), lie, {**read_metadata(exported), key: text})
        run = tmp_path / str(place)  # this process still holds the one before
        for source in ("init_from", "distill.from")[number : number + 1]:
            line = karat_refuses(*quick, f"run.dir={run}", f"{source}={lie}")
            assert line.startswith(f"error: {source} = {lie}: {key}"), text[:40]
            assert not (run / "checkpoints" / "latest").exists()
        if number == 2:
            assert karat_refuses("predict", str(lie), image).startswith(f"error: {lie}: {key}"), text[:40]


def test_the_operator_of_one_block_is_not_that_of_all(exported, tmp_path) -> None:
    sizes, attention = exported_sections(exported)
    one = attention.changed(kind="softmax", blocks={"0": {"kind": "karat"}})
    source = tmp_path / "one.safetensors"
    facts = {"model": sizes.model_dump_json(), "attention": one.model_dump_json()}
    write_model(create_model(sizes, one), source, {"karat_scale": "", **facts})
    base, run = str(exported.with_name("base.yaml")), f"run.dir={tmp_path / 'run'}"
    line = karat_refuses("train", base, *SMALL, "schedule.warmup_epochs=0", run, f"init_from={source}")
    assert line.endswith('attention.blocks ({"0": {"kind": "karat"}} -> {}); set the keys as it has them')


def test_a_teacher_of_timm_has_a_name_of_timm(exported, tmp_path) -> None:
    about = {**read_metadata(exported), "timm": json.dumps({"name": f"local-dir:{tmp_path}", "num_classes": 4})}
    save_file(load_file(exported), tmp_path / "distill.safetensors", about)
    recipe = load_recipe(exported.with_name("base.yaml"), [*SMALL, "schedule.warmup_epochs=0"])
    with pytest.raises(UserError, match="timm has no local-dir:"):
        read_distillation_teacher(recipe, ("a", "b", "c", "d"), tmp_path)


QUICK = ("train.epochs=1", "train.max_steps=2", "schedule.warmup_epochs=0", "data.backend=synthetic")


def train(root: Path, name: str, *overrides: str) -> Path:
    recipe = root / "base.yaml"
    recipe.write_text("data: {synthetic_samples: 32}\nattention: {kind: karat}\n")
    run = root / name
    karat_done("train", str(recipe), *SMALL, *QUICK, f"run.name={name}", f"run.dir={run}", *overrides)
    return run


@pytest.mark.slow
def test_the_run_behind_the_weights_is_remembered(tmp_path) -> None:
    base = train(tmp_path, "base")
    assert summary(base)["lineage"] == {}
    known = {"name": "base", "recipe_sha256": take_record(str(base)).recipe_sha256}

    tuned = train(tmp_path, "tuned", f"init_from={base}")
    assert summary(tuned)["lineage"] == {"init_from": known}
    exported = tmp_path / "weights.safetensors"
    karat_done("export", str(base), "--out", str(exported), "--weights", "raw")
    for source in (exported, base / "checkpoints" / "best", base / "checkpoints" / "step-00000002"):
        assert run_behind(str(source)) == known
    base.rename(tmp_path / "elsewhere")
    train(tmp_path, "tuned", f"init_from={base}", "train.max_steps=3")
    assert summary(tuned)["steps"] == 3
    assert summary(tuned)["lineage"] == {"init_from": known}

    student = train(tmp_path, "student", "attention.kind=softmax", f"attention.transfer_from={tmp_path / 'elsewhere'}")
    (behind,) = summary(student)["lineage"].items()
    assert (behind[0], behind[1]["name"]) == ("attention.transfer_from", "base")


def test_weights_that_name_no_run_have_none(tmp_path) -> None:
    assert run_behind("") == run_behind("timm:vit_tiny_patch16_224") == {}
    (tmp_path / "weights.pth").touch()
    assert run_behind(str(tmp_path / "weights.pth")) == {}
    RunDirectory(tmp_path).begin(load_recipe("cifar10_vit_tiny", ["data.path=images"], Recipe))
    assert run_behind(str(tmp_path))["name"] == "cifar10_vit_tiny"
