import math

import pytest
import torch

from karat_scale.training.tasks.detection.backbone import build_detector, build_vit

TARGET = {
    "boxes": torch.tensor([[4.0, 4.0, 40.0, 30.0]]),
    "labels": torch.tensor([2]),
    "masks": torch.zeros(1, 48, 64, dtype=torch.uint8).index_fill_(1, torch.arange(4, 30), 1),
}
NOTHING = {
    "boxes": torch.zeros(0, 4),
    "labels": torch.zeros(0, dtype=torch.int64),
    "masks": torch.zeros(0, 48, 64, dtype=torch.uint8),
}


@pytest.fixture
def detector(small):
    torch.manual_seed(0)
    recipe = small(detector={"min_score": 0.0})
    return build_detector(build_vit(recipe), recipe)


def test_the_first_stage_keeps_as_many_as_the_recipe_says(small) -> None:
    plain, asked = (
        build_detector(build_vit(recipe), recipe).rpn
        for recipe in (
            small(detector={"proposals": 50}),
            small(detector={"proposals": 5, "proposals_in_training": 6, "candidates": 7, "candidates_in_training": 8}),
        )
    )
    numbers = [
        (rpn.train().pre_nms_top_n(), rpn.post_nms_top_n(), rpn.eval().pre_nms_top_n(), rpn.post_nms_top_n())
        for rpn in (plain, asked)
    ]
    assert numbers == [(100, 50, 50, 50), (8, 6, 7, 5)]


@pytest.mark.parametrize("targets", [[TARGET, NOTHING], [NOTHING, NOTHING]])
def test_every_parameter_learns_also_where_nothing_is_seen(detector, targets) -> None:
    losses = detector([torch.rand(3, 48, 64), torch.rand(3, 48, 64)], targets)
    assert set(losses) == {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"}
    loss = sum(losses.values())
    assert math.isfinite(loss.item())
    loss.backward()  # DistributedDataParallel waits for all of them
    assert [name for name, parameter in detector.named_parameters() if parameter.grad is None] == []


def test_images_of_any_size_give_the_same_n_and_boxes_in_their_own_pixels(detector) -> None:
    seen = []
    detector.backbone.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    shapes = [(3, 150, 100), (3, 64, 64), (3, 20, 90)]
    with torch.no_grad():
        found = detector.eval()([torch.rand(shape) for shape in shapes])
    assert seen == [(3, 3, 64, 64)]
    for (_, height, width), one in zip(shapes, found, strict=True):
        assert len(one["boxes"])
        assert (one["boxes"] <= torch.tensor([width, height, width, height]) + 1e-3).all()
        assert one["boxes"][:, 2].max() > 0.6 * width
        assert one["masks"].shape[1:] == (1, height, width)
