"""What is said of weights that leave their run."""

from karat_scale.checkpoint.weights import describe_weights
from karat_scale.recipe.loading import load_recipe


def test_an_accuracy_at_another_image_size_is_not_that_of_the_weights() -> None:
    recipe = load_recipe("cifar10_vit_tiny", ["train.ema_decay=0"])
    saved = {"step": 3, "evaluated_step": 3, "last_top1": 62.5, "last_top5": 99.0, "has_ema": False}
    assert describe_weights(recipe, {**saved, "image_size": 224}, "step-00000003", "raw")["top1"] == "62.5"
    assert "top1" not in describe_weights(recipe, {**saved, "image_size": 128}, "step-00000003", "raw")
