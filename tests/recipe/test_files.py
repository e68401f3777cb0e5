"""What a recipe file takes from others by `extends`."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from karat_scale.engine.optimizers import build_schedule
from karat_scale.foundation.errors import RecipeError
from karat_scale.recipe import Recipe, RunRecipe
from karat_scale.recipe.files import RECIPES, locate, part_names, shipped_recipes
from karat_scale.recipe.loading import dump_recipe, flatten, load_recipe
from karat_scale.training.tasks.detection.recipe import DetectionRecipe
from tests.conftest import ROOT, karat_here, karat_says


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_own_keys_go_before_and_of_two_in_a_list_the_later(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "data: {path: a}\noptim: {lr: 1.0, eps: 1.0, betas: [0.1, 0.2]}\ntrain: {epochs: 7}\n")
    write(tmp_path / "more/b.yaml", "extends: c.yaml\noptim: {lr: 2.0, eps: 2.0}\n")
    write(tmp_path / "more/c.yaml", "optim: {betas: [0.3, 0.4]}\nrun: {seed: 5}\n")
    own = write(tmp_path / "own.yaml", "extends: [a.yaml, more/b.yaml]\noptim: {lr: 3.0}\n")
    recipe = load_recipe(own, ["train.epochs=9"])
    assert (recipe.optim.lr, recipe.optim.eps, recipe.optim.betas) == (3.0, 2.0, (0.3, 0.4))
    assert (recipe.data.path, recipe.run.seed, recipe.train.epochs, recipe.run.name) == ("a", 5, 9, "own")


def test_a_recipe_is_whole_once_it_is_read(tmp_path: Path) -> None:
    own = write(tmp_path / "own.yaml", "extends: [imagenet_vit_small_g3b, parts/data/cifar10]\n")
    recipe = load_recipe(own, ["run.name=cifar10_vit_small_g3b", "run.dir=runs/cifar10_vit_small_g3b"])
    assert recipe == load_recipe("cifar10_vit_small_g3b")
    assert load_recipe(write(tmp_path / "whole.yaml", dump_recipe(recipe))) == recipe
    printed = karat_says("train", str(own), "--print")
    assert "extends" not in printed
    assert "num_classes: 10" in printed
    assert "name: vit_small_patch16_224" in printed


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        ("extends: imagenet_vit_tny\n", ["extends = 'imagenet_vit_tny'", "did you mean imagenet_vit_tiny?"]),
        ("extends: [parts/data/cifar1]\n", ["extends = 'parts/data/cifar1'", "did you mean parts/data/cifar10?"]),
        ("extends: oter.yaml\n", ["neither a shipped recipe nor a file beside this one; did you mean other.yaml?"]),
        ("extends: 3\n", ["extends = 3", "a recipe's name or a list of names"]),
        ("extends: [[x]]\n", ["extends = [['x']]", "a list of names"]),
        ("extends: other.yaml\n", ["extends goes in a circle: own -> other -> own"]),
        ("extends: own.yaml\n", ["extends goes in a circle: own -> own"]),
        ("extends: broken.yaml\n", ["broken.yaml", "not valid YAML"]),
        ("extends: imagenet_vit_tiny\nmodel: {nme: x}\n", ["model.nme", "did you mean model.name?"]),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, body: str, parts: list[str]) -> None:
    own = write(tmp_path / "own.yaml", body)
    write(tmp_path / "other.yaml", "extends: own.yaml\n")
    write(tmp_path / "broken.yaml", "data: [\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(own)
    assert "\n" not in str(caught.value)
    for part in ["own.yaml" if "broken" not in body else "", *parts]:
        assert part in str(caught.value)


def test_parts_are_no_recipes_and_are_all_used() -> None:
    texts = "".join(path.read_text() for path in RECIPES.rglob("*.yaml"))
    used = {file for shipped in shipped_recipes().values() for file in shipped.files}
    for part in sorted((RECIPES / "parts").rglob("*.yaml")):
        assert part.stem not in shipped_recipes()
        assert f"parts/{part.stem}" in texts or part in used


def test_every_model_can_be_fine_tuned_by_one_schedule_and_has_the_form_of_its_name() -> None:
    for name in (
        f"{data_set}_{model}" for data_set in ("svhn", "flowers102", "stl10") for model in part_names("model")
    ):
        recipe = load_recipe(name, ["data.path=x"])
        build_schedule(recipe, 2040 // recipe.train.global_batch)  # Flowers-102 has the fewest images
        assert (recipe.optim.lr, recipe.optim.lr_batch, recipe.augment.mixup) == (5e-5, 512, 0.8), name
        if "swin" not in name:
            assert load_recipe(f"{name}_g3b", ["data.path=x"]).attention.form == "modular", name


@pytest.mark.parametrize("data_set", ["svhn", "flowers102", "stl10"])
def test_fine_tuning_differs_from_training_where_its_parts_say(data_set: str) -> None:
    trained, tuned = load_recipe("imagenet_vit_base_g1u"), load_recipe(f"{data_set}_vit_base_g1u")
    before, after = flatten(trained), flatten(tuned)
    changed = {key for key in after if before[key] != after[key]} - {"run.name", "run.dir", "augment.hflip"}
    assert changed == {
        *("init_from", "data.path", "model.num_classes", "augment.randaugment", "optim.lr"),
        *("train.epochs", "train.global_batch", "train.ema_decay", "train.eval_every_epochs"),
    }
    assert tuned.init_from == trained.run.dir


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("imagenet_vit", "did you mean imagenet_vit_base?"),
        ("imagnet_vit_tiny_g3b", "did you mean imagenet_vit_tiny_g3b?"),
        ("resnet50", "recipes train vision transformers (ViT, DeiT, Swin, ConViT); `karat recipes` lists them"),
        *(
            (name, f"a model of timm, not a recipe; name a recipe before it, as in {fix}={name}")
            for name, fix in {
                "vit_small_patch16_224": "imagenet_vit_small model.name",
                "deit_tiny_patch16_224": "imagenet_vit_tiny model.name",
                "swin_tiny_patch4_window7_224": "imagenet_swin_tiny model.name",
                "timm:vit_tiny_patch16_224": "imagenet_vit_tiny init_from",
            }.items()
        ),
        ("vit_tiny", "`karat recipes vit_tiny` lists those with this in their name"),
        (
            "coco_mask_rcnn_vit_base",
            "only `karat detect` takes this recipe: karat detect coco_mask_rcnn_vit_base",
        ),
    ],
)
def test_a_name_that_is_no_recipe_is_one_short_line(source: str, part: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(source)
    text = str(caught.value)
    assert part in text
    assert len(text) < 250 + len(str(RECIPES))


def test_a_name_is_data_model_attention_and_change(tmp_path, monkeypatch):
    recipe = load_recipe("cifar100_swin_tiny_g3b_1024")  # no file has this name
    assert (recipe.model.name, recipe.model.num_classes) == ("swin_tiny_patch4_window7_224", 100)
    assert (recipe.attention.kind, recipe.attention.grid, recipe.train.global_batch) == ("karat", 3, 1024)
    assert recipe.run.dir == "runs/cifar100_swin_tiny_g3b_1024"
    assert load_recipe("svhn_convit_tiny_g3u").init_from == "runs/imagenet_convit_tiny_g3u"
    assert load_recipe("cifar10_vit_base_transfer").attention.transfer_from == "runs/cifar10_vit_base_g3b"
    assert "imagenet_swin_tiny_g3b_g1b" not in shipped_recipes()
    monkeypatch.chdir(tmp_path)
    assert load_recipe("cifar100_vit_base_g1b").model.num_classes == 100
    assert load_recipe(ROOT / "karat_scale/recipes/cifar10_vit_mini_32px.yaml").train.global_batch == 64


@pytest.mark.parametrize("schema", [Recipe, DetectionRecipe])
@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_every_name_is_a_valid_recipe(schema: type[RunRecipe], step: int) -> None:
    for name in list(shipped_recipes(schema.shipped))[::step]:
        recipe = load_recipe(name, (), schema)
        assert (recipe.run.name, recipe.run.dir) == (name, f"runs/{name}")
        assert recipe.deepspeed.config == "zero0"


def test_a_name_means_what_it_meant_when_each_had_a_file() -> None:
    """A recipe's name has its meaning of 0.2.0, where each recipe had a file.

    `meaning.json` has, for each name, a digest of the keys that differed from their defaults.
    """
    meaning = json.loads((Path(__file__).parent / "meaning.json").read_text())
    assert len(meaning) == 90
    found = {}
    for name in meaning:
        schema = DetectionRecipe if name.startswith("coco_") else Recipe
        keys = load_recipe(name, (), schema).model_dump(mode="json", by_alias=True, exclude_defaults=True)
        found[name] = hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()[:16]
    assert found == meaning


def test_a_checkpoint_that_is_not_there_is_told_with_those_that_are(tmp_path: Path) -> None:
    there = tmp_path / "checkpoints"
    (there / "step-00000008").mkdir(parents=True)
    for source in (there / "step-00000016", there):
        with pytest.raises(RecipeError, match=rf"; name one of step-00000008 in {there}$"):
            locate(str(source))
    with pytest.raises(RecipeError, match=r"timm:NAME; name one$"):
        locate(str(tmp_path / "step-00000008"))


def test_a_directory_is_told_from_a_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="a directory; name a YAML file in it"):
        load_recipe(tmp_path)
    write(tmp_path / "recipe.yaml", "data: {path: a}\n")
    with pytest.raises(RecipeError, match=f"a run's directory; name its {tmp_path / 'recipe.yaml'}"):
        load_recipe(tmp_path)
    with pytest.raises(RecipeError, match="no such file"):
        load_recipe(tmp_path / "other.yaml")


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "more than 10,000 values, aliases written out"),
        ("a: " + "[" * 1000, "nested too deeply"),
        ("#" * (2**20 + 1), "larger than 1.04858 MB"),
        ("a: \x00", "not a recipe in YAML: it holds bytes that are no text"),
    ],
    ids=["bomb", "deep", "large", "control character"],
)
def test_a_file_that_would_take_all_memory_or_time_is_one_line(text: str, said: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.yaml", text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert said in str(caught.value)


HELD_BY_NOTHING = ("2001-02-30", "2001-01-01T25:00:00Z", "!!int x", "!!bool x", "!!timestamp x", 5000 * "9")
OF_NO_TAG = ("!!int ''", "!!float ''", "!!set [a]", "!!map [a]", "{1.5: 2}")


def test_a_value_that_yaml_cannot_hold_is_one_line(tmp_path: Path) -> None:
    for values, said in (
        (HELD_BY_NOTHING, r"x\.yaml, line 2: not valid YAML: .* cannot be read as"),
        (OF_NO_TAG, r"x\.yaml.*(cannot be read as|should be a name|expected a)"),
    ):
        for value in values:
            with pytest.raises(RecipeError, match=said):
                load_recipe(write(tmp_path / "x.yaml", f"model:\n  depth: {value}\n"))
            with pytest.raises(RecipeError, match=rf"override .model\.depth=.*({said.split('.*')[-1]}|quote it)"):
                load_recipe("fashion_mnist_demo", [f"model.depth={value}"])
    for key in ("[1, 2]", "{a: 1}"):
        with pytest.raises(RecipeError, match=r"x\.yaml, line 2: not valid YAML: a key should be a name, not a list"):
            load_recipe(write(tmp_path / "x.yaml", f"model:\n  ? {key}\n  : 1\n"))
    with pytest.raises(RecipeError, match="is not valid YAML"):
        load_recipe("fashion_mnist_demo", ["model.depth=" + "[" * 1000])


VALUES = [
    *("2001-13-45", "9999-99-99 99:99:99", "2001-01-01 25:00:00", "!!timestamp x", "!!int x", "!!int ''", "0x", "0b"),
    *("!!float ''", "!!bool maybe", "!foo x", "!!binary '****'", "!!omap [a]", "!!pairs 3", "!!set [a]", "!!null x"),
    *("!!python/object/apply:os.system [id]", "!!python/name:os.system", "{a: 1, 2: 3}", "{2001-01-01: 3}", "{[a]: 3}"),
    *("!!str {a: b}", "*nothing", "&a [*a]", "[" * 500, "'\\uD800'", "\x01", "a" * 100_000),
]


@pytest.mark.parametrize("key", ["seed", "name"])
def test_a_value_that_is_none_is_one_line(key: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    for value in VALUES:
        path.write_text(f"data: {{path: x}}\nrun: {{{key}: {value}}}\n", errors="surrogatepass")
        said = []
        for source, overrides in ((path, ()), ("fashion_mnist_demo", (f"run.{key}={value}",))):
            try:
                load_recipe(source, overrides)
            except RecipeError as error:
                said.append(str(error))
        assert not [line for line in said if "\n" in line or len(line) > 1000], value[:24]


def test_what_is_no_recipe_file_is_one_short_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "x.yaml").symlink_to("/dev/zero")
    files = (tmp_path / "pipe.yaml", tmp_path / "x.yaml")
    for source in ("a" * 10_000, "a/" * 5000 + "b.yaml", "/proc/self/mem", "/dev/zero", "/", "a\0b", *files):
        with pytest.raises(RecipeError) as refused:
            load_recipe(source)
        assert "\n" not in str(refused.value)
        assert source not in files or source.name in str(refused.value)


def test_a_path_of_ten_thousand_characters_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for key in ("run.dir", "data.path", "init_from", "resume.from", "deepspeed.config"):
        assert karat_here("train", "fashion_mnist_demo", "run.device=cpu", f"{key}={'a' * 10_000}") == 2
        said = capsys.readouterr().err
        assert "error: " in said
        assert "Traceback" not in said
