import pytest

from karat_scale.foundation.errors import RecipeError
from karat_scale.recipe.loading import dump_recipe, flatten, load_recipe
from karat_scale.training.tasks.detection.recipe import DetectionRecipe

BASE = "coco_mask_rcnn_vit_base"
PAPER = "coco_paper_vit_base"


def test_the_shipped_recipes_differ_in_attention_alone() -> None:
    plain, karat = (flatten(load_recipe(name, [], DetectionRecipe)) for name in (BASE, f"{BASE}_g1b"))
    differs = {key for key in plain if plain[key] != karat[key] and not key.startswith("run.")}
    assert differs == {"attention.kind", "attention.grid"}
    # ViTDet's settings, also where a recipe says nothing.
    assert (karat["optim.eps"], karat["optim.clip_grad"], karat["train.epochs"]) == (1e-8, 0.0, 100)


@pytest.mark.parametrize(("kind", "mode"), [("", "blockwise"), ("_g1b", "blockwise"), ("_g1u", "universal")])
@pytest.mark.parametrize(("start", "init_from"), [("", "runs/imagenet_vit_base"), ("_random", "")])
def test_the_papers_recipes_are_its_table(kind, mode, start, init_from) -> None:
    recipe = load_recipe(f"{PAPER}{kind}{start}", [], DetectionRecipe)
    attention, detector, optim = recipe.attention, recipe.detector, recipe.optim
    assert recipe.init_from == init_from
    assert (attention.kind, attention.mode) == ("karat" if kind else "softmax", mode)
    if kind:
        chosen = (attention.grid, attention.rank, attention.form, attention.init)
        assert chosen == (1, 12, "modular", "variance_preserving")
    assert (recipe.model.image_size, recipe.model.drop_path, recipe.augment.scale) == (224, 0.0, (1.0, 1.0))
    assert detector.anchor_sizes == (32, 64, 128, 256, 512)
    assert (detector.candidates_in_training, detector.candidates) == (12_000, 6_000)
    assert (detector.proposals_in_training, detector.proposals) == (2_000, 1_000)
    assert (optim.lr, optim.lr_batch, optim.eps, optim.weight_decay, optim.layer_decay) == (1e-4, None, 1e-6, 0.1, 1.0)
    assert (recipe.train.global_batch, recipe.train.max_steps) == (32, 184_375)
    assert recipe.train.epochs * (117_266 // 32) >= 184_375
    assert (recipe.schedule.drops, recipe.schedule.epoch_decay) == ((), 0.988)


def test_a_mistake_is_one_line_with_its_fix() -> None:
    assert load_recipe(BASE, ["model.image_size=448"], DetectionRecipe).window_model.image_size == 224
    for name, override, message in (
        (BASE, "model.image_size=320", r"320 is not a multiple of the attention window, 224 px: .* use 224"),
        (BASE, "optim.name=muon", r"optim.name = 'muon': should be 'adamw'"),
        (BASE, "detector.anchor_sizes=[8, 16]", r"detector.anchor_sizes = \[8, 16\]: too few values"),
        (BASE, "augment.scale=[2, 1]", r"augment.scale.*is not in ascending order; swap the two"),
        (BASE, "augment.mixup=0.8", r"augment.mixup: unknown key"),
        (BASE, "data.path=", r"data.path = '': should not be empty"),
        (BASE, "detector.windows=14", r"did you mean detector.window\?"),
        (BASE, "model.patch_size=null", r"model.patch_size is unset"),
        (BASE, "model.pool=avg", r"model.pool = avg has no meaning in detection"),
        (BASE, "attention.transfer_from=runs/a", r"attention.transfer_from = runs/a has no meaning in detection"),
        (BASE, "train.micro_batch=7", r"train.global_batch = 64 is not a multiple of train.micro_batch = 7; set .*=4"),
        (BASE, "resume.from=runs/a", r"init_from = timm.* and resume.from = runs/a both set"),
        ("imagenet_vit_tiny", "run.seed=1", "only `karat train` takes this recipe: karat train imagenet_vit_tiny"),
    ):
        with pytest.raises(RecipeError, match=message) as caught:
            load_recipe(name, [override], DetectionRecipe)
        assert "\n" not in str(caught.value)


def test_a_recipe_of_karat_train_is_told_as_such(tmp_path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(load_recipe("imagenet_vit_tiny")))
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(file), [], DetectionRecipe)
    assert caught.value.mistakes == (f"{file}: a recipe of `karat train`: karat train {file}",)
