"""The detector's network, its optimizer's groups and its schedule."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from timm.layers import Attention
from torch.nn.functional import interpolate
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign

from karat_scale.attention import KaratOperator
from karat_scale.engine.distributed import ALONE
from karat_scale.foundation.errors import RecipeError
from karat_scale.models import create_model
from karat_scale.recipe import AttentionConfig
from karat_scale.training.tasks.detection.backbone import (
    LEVELS,
    Anchors,
    RoIAlign,
    SimpleFeaturePyramid,
    StepSchedule,
    Transform,
    ViTBackbone,
    build_detector,
    build_vit,
    detector_groups,
    join_windows,
    split_windows,
    take_backbone_weights,
)
from karat_scale.training.tasks.detection.coco import Jitter, jitter_image
from karat_scale.training.weights_file import initialise

KARAT = AttentionConfig(kind="karat", grid=2, rank=4)


def operators(vit) -> list[KaratOperator]:
    return [module for module in vit.modules() if isinstance(module, KaratOperator)]


def test_windows_are_squares_of_the_map() -> None:
    tokens = torch.arange(2 * 36).view(2, 36, 1)
    windows = split_windows(tokens, 3)
    assert windows.shape == (8, 9, 1)
    assert windows[1, :, 0].tolist() == [3, 4, 5, 9, 10, 11, 15, 16, 17]  # the upper right one
    assert torch.equal(join_windows(windows, 6, 3), tokens)


def test_what_no_detector_can_be_made_of_is_one_line(small) -> None:
    def blocks(count: int, kind: str) -> ViTBackbone:
        recipe = small(model={"image_size": 128}, detector={"global_blocks": count}, attention={"kind": kind})
        return ViTBackbone(build_vit(recipe), recipe)

    assert blocks(2, "softmax").global_blocks == {0, 1}  # softmax may see the whole image in every block
    wide = create_model(small(model={"embed_dim": 96}).window_model, KARAT)
    for make, message in (
        (lambda: blocks(5, "karat"), "detector.global_blocks = 5, but the model has 2 blocks, .* use 1 at most"),
        (lambda: blocks(2, "karat"), "no block would keep KArAt; use 1 at most"),
        (lambda: blocks(5, "softmax"), "the model has 2 blocks; use 2 at most"),
        (
            lambda: take_backbone_weights(build_vit(small()), wide.state_dict(), None),
            r"96.* in the weights and .*64.* in the model",
        ),
        *(
            (lambda name=name: build_vit(small(model={"name": name})), f"model.name = {name} is not a plain ViT")
            for name in ("convit_tiny", "swin_tiny_patch4_window7_224")
        ),
    ):
        with pytest.raises(RecipeError, match=message):
            make()


@pytest.mark.parametrize("global_blocks", [0, 1])
def test_n_is_that_of_a_window_whatever_the_image(small, global_blocks) -> None:
    torch.manual_seed(0)
    recipe = small(model={"image_size": 128}, detector={"global_blocks": global_blocks})
    backbone = ViTBackbone(build_vit(recipe), recipe).eval()
    assert {operator.num_tokens for operator in operators(backbone)} == {64}
    assert len(operators(backbone)) == 2 - global_blocks
    images = torch.randn(1, 3, 128, 128)
    changed = images.clone()
    changed[:, :, 64:, 64:] += 1.0
    before, after = (backbone.vit.patch_embed(x) for x in (images, changed))
    maps = [[level[..., 0, 0] for level in backbone(x).values()] for x in (images, changed)]
    assert not torch.equal(before, after)
    # Without a global block, a change in one window stays there, except for the pyramid's 3 x 3 convolutions.
    alone = all(torch.equal(a, b) for a, b in zip(*maps, strict=True))
    assert alone == (global_blocks == 0)


def test_one_window_is_the_plain_vit(small) -> None:
    recipe = small()
    vit = build_vit(recipe).eval()
    backbone = ViTBackbone(vit, recipe)
    images = torch.randn(2, 3, 64, 64)
    expected = backbone.pyramid(vit.forward_features(images).transpose(1, 2).reshape(2, 64, 8, 8))
    for name, level in backbone(images).items():
        torch.testing.assert_close(level, expected[name], msg=name)


def test_a_block_that_sees_all_keeps_the_weights_it_began_with(small) -> None:
    recipe = small(model={"image_size": 128}, detector={"global_blocks": 1})
    vit = build_vit(recipe)
    qkv = vit.blocks[1].attn.qkv.weight.clone()
    backbone = ViTBackbone(vit, recipe)
    assert type(backbone.vit.blocks[1].attn) is Attention
    assert torch.equal(backbone.vit.blocks[1].attn.qkv.weight, qkv)
    assert backbone.vit.pos_embed.shape == (1, 256, 64)


@pytest.mark.parametrize("attention", [AttentionConfig(), KARAT])
def test_a_classifiers_weights_lose_class_token_and_head(small, attention) -> None:
    torch.manual_seed(0)
    recipe = small()
    classifier = create_model(recipe.window_model, attention)  # 65 tokens
    vit = build_vit(recipe)
    start = operators(vit)[0].cos_coef.clone()
    notes = take_backbone_weights(vit, classifier.state_dict(), None)
    assert notes.startswith("without its class token")
    assert torch.equal(vit.pos_embed, classifier.pos_embed[:, 1:])
    assert torch.equal(vit.blocks[1].mlp.fc1.weight, classifier.blocks[1].mlp.fc1.weight)
    if attention.kind == "karat":
        assert torch.equal(operators(vit)[0].cos_coef, operators(classifier)[0].cos_coef[:, :, 1:])
        assert torch.equal(operators(vit)[0].proj, operators(classifier)[0].proj[:, 1:])
    else:
        assert torch.equal(operators(vit)[0].cos_coef, start)
        assert "operators keep their initial values" in notes


def test_init_from_a_file_gives_the_backbone_its_weights(small, tmp_path) -> None:
    classifier = create_model(small().window_model, AttentionConfig())
    pooled = {"attn_pool.latent": torch.zeros(1, 1, 64)}  # as SigLIP has it above its blocks
    torch.save({**classifier.state_dict(), **pooled}, tmp_path / "classifier.pth")
    vit = build_vit(small())
    recipe = small().model_copy(update={"init_from": str(tmp_path / "classifier.pth")})
    line = initialise(vit, recipe, ALONE, lambda model, weights, _: take_backbone_weights(model, weights, None))
    assert "without its class token; the attention operators keep their initial values" in line
    assert torch.equal(vit.blocks[0].attn.qkv.weight, classifier.blocks[0].attn.qkv.weight)


def test_the_levels_have_vitdets_strides() -> None:
    pyramid = SimpleFeaturePyramid(width=16, channels=8)
    maps = pyramid(torch.randn(2, 16, 14, 14))
    assert {name: 14 / level.shape[-1] for name, level in maps.items()} == {**LEVELS, "pool": 3.5}  # it rounds up
    assert [tuple(level.shape) for level in maps.values()] == [(2, 8, side, side) for side in (56, 28, 14, 7, 4)]
    assert torch.equal(maps["pool"], maps["3"][:, :, ::2, ::2])


def test_a_level_is_normalised_over_channels_and_local() -> None:
    torch.manual_seed(0)
    pyramid = SimpleFeaturePyramid(width=16, channels=8)
    x = torch.randn(1, 16, 14, 14)
    maps = pyramid(x)
    torch.testing.assert_close(maps["2"].mean(1), torch.zeros(1, 14, 14), atol=1e-5, rtol=0)
    x[:, :, 13, 13] += 1.0  # a change in one corner reaches the same corner of every map, and not the other
    for name, level in pyramid(x).items():
        assert torch.equal(level[..., 0, 0], maps[name][..., 0, 0])
        assert not torch.equal(level[..., -1, -1], maps[name][..., -1, -1])


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
    loss.backward()  # DistributedDataParallel waits for all gradients
    assert [name for name, parameter in detector.named_parameters() if parameter.grad is None] == []


def test_one_category_is_enough(small) -> None:
    recipe = small(model={"num_classes": 1})
    assert build_detector(build_vit(recipe), recipe).roi_heads.box_predictor.cls_score.out_features == 2


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


NAMES, STRIDES = ("0", "1", "2", "3"), (4.0, 8.0, 16.0, 32.0)


def maps_of(patch: int, side: int = 14) -> dict[str, torch.Tensor]:
    """Return maps of `side` x `side` patches; their channels are the y and x of each cell's upper left, in pixels."""
    found = {}
    for name, patches in zip(NAMES, (0.25, 0.5, 1.0, 2.0), strict=True):
        places = torch.arange(int(side / patches)) * patch * patches
        found[name] = torch.stack(torch.meshgrid(places, places, indexing="ij"))[None]
    return found


@pytest.mark.parametrize("patch", [14, 16])
@pytest.mark.parametrize("first", [(60, 224), (224, 60), (224, 224)])
def test_regions_read_where_they_lie_whatever_image_came_first(patch, first) -> None:
    align = RoIAlign(NAMES, [patch * share for share in (0.25, 0.5, 1.0, 2.0)], output_size=7)
    boxes = torch.tensor([[20.0, 40.0, 60.0, 100.0], [10.0, 10.0, 150.0, 130.0]])
    for shape in (first, (224, 224)):
        found = align(maps_of(patch), [boxes], [shape])
        middles = torch.stack([(boxes[:, 1] + boxes[:, 3]) / 2, (boxes[:, 0] + boxes[:, 2]) / 2], 1)
        torch.testing.assert_close(found.mean((2, 3)), middles, atol=1e-3, rtol=0)


def test_regions_are_torchvisions_where_an_image_fills_the_input() -> None:
    torch.manual_seed(0)
    maps = {
        name: torch.randn(1, 3, int(224 / stride), int(224 / stride))
        for name, stride in zip(NAMES, STRIDES, strict=True)
    }
    corners = torch.rand(50, 2) * 100
    boxes = torch.cat([corners, corners + 4 + torch.rand(50, 2) * 120], 1)
    theirs = MultiScaleRoIAlign(list(NAMES), 7, 2)(maps, [boxes], [(224, 224)])
    torch.testing.assert_close(RoIAlign(NAMES, STRIDES, 7)(maps, [boxes], [(224, 224)]), theirs)


def test_anchors_lie_on_the_cells_of_their_map() -> None:
    maps = [torch.zeros(1, 1, side, side, dtype=torch.bfloat16) for side in (56, 28, 14, 7, 4)]
    images = ImageList(torch.zeros(2, 3, 224, 224), [(224, 224), (100, 224)])
    sizes = (8, 16, 32, 64, 128)
    own = Anchors(sizes, (0.5, 1.0, 2.0), (*STRIDES, 64.0))(images, maps)
    theirs = AnchorGenerator(tuple((size,) for size in sizes), ((0.5, 1.0, 2.0),) * 5)(images, maps)
    assert own[0].dtype == torch.float32
    torch.testing.assert_close(own[0][:-48], theirs[0][:-48].float())  # all but those of the last map
    middles = (own[1][-48:, :2] + own[1][-48:, 2:]) / 2
    assert sorted(set(middles[:, 0].tolist())) == [0, 64, 128, 192]


def test_an_evaluation_shrinks_as_training_does() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    trained = jitter_image(Image.fromarray(pixels), Jitter((0, 0, 640, 480), (64, 48), False))
    transform = Transform(64, 64, [0.0, 0.0, 0.0], [1.0, 1.0, 1.0], size_divisible=64).eval()
    image = torch.from_numpy(pixels.transpose(2, 0, 1).copy()).float() / 255
    batch, _ = transform([image])
    assert batch.image_sizes == [(48, 64)]
    evaluated = 255 * batch.tensors[0, :, :48]
    assert (evaluated - torch.from_numpy(trained).float()).abs().max() <= 2  # Pillow rounds in between
    without = 255 * interpolate(image[None], (48, 64), mode="bilinear", align_corners=False)[0]
    assert without.std() > 3 * evaluated.std()


def test_boxes_are_float32_at_bf16(detector) -> None:
    """Boxes stay float32 at bf16: torchvision adds an offset for each class, and bfloat16 would round the sums."""
    proposals = []
    detector.roi_heads.register_forward_pre_hook(lambda _, args: proposals.extend(args[1]))
    with torch.autocast("cpu", torch.bfloat16):
        losses = detector([torch.rand(3, 48, 64)], [TARGET])
        (found,) = detector.eval()([torch.rand(3, 600, 800)])
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert {box.dtype for box in proposals} == {torch.float32}
    assert {found[key].dtype for key in ("boxes", "scores", "masks")} == {torch.float32}
    assert (found["boxes"] % 1 != 0).any()


def test_mean_and_deviation_are_the_recipes(small) -> None:
    recipe = small(augment={"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]})
    detector = build_detector(build_vit(recipe), recipe)
    batch, _ = detector.transform([torch.full((3, 64, 64), 0.75)])
    torch.testing.assert_close(batch.tensors, torch.full((1, 3, 64, 64), 0.5))


def test_rates_fall_block_by_block_below_the_pyramid_as_in_vitdet(small) -> None:
    recipe = small(optim={"layer_decay": 0.5, "weight_decay": 0.1})
    model = build_detector(build_vit(recipe), recipe)
    groups = detector_groups(model, recipe.optim)
    of = {id(parameter): group for group in groups for parameter in group["params"]}
    assert len(of) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    vit = model.backbone.vit
    scale = {
        vit.patch_embed.proj.weight: 0.5**3,
        vit.pos_embed: 0.5**3,
        vit.blocks[0].mlp.fc1.weight: 0.5**2,
        vit.blocks[1].attn.operator.cos_coef: 0.5,
        model.backbone.pyramid.levels[0][1].weight: 1.0,
        model.roi_heads.mask_predictor.mask_fcn_logits.weight: 1.0,
    }
    for parameter, expected in scale.items():
        assert of[id(parameter)]["lr_scale"] == expected
    without = (vit.pos_embed, vit.blocks[0].norm1.weight, model.rpn.head.cls_logits.bias)
    assert all(of[id(parameter)]["weight_decay"] == 0.0 for parameter in without)
    assert of[id(model.rpn.head.cls_logits.weight)]["weight_decay"] == 0.1
    for part in (model.backbone.pyramid, model.rpn, model.roi_heads):
        part.requires_grad_(False)
    assert all(group["params"] for group in detector_groups(model, recipe.optim))


@pytest.mark.parametrize(
    ("optim", "schedule", "epochs", "steps", "rates"),
    [
        ({}, {"warmup_steps": 0, "drops": [], "epoch_decay": 0.5}, 3, (0, 5, 6, 17), [1e-3, 1e-3, 5e-4, 2.5e-4]),
        (
            *({"lr_batch": 16}, {"warmup_steps": 10, "warmup_factor": 0.1, "drops": [0.5, 0.75]}, 10),
            *((0, 5, 10, 29, 30, 44, 45, 59), [5e-5, 2.75e-4, 5e-4, 5e-4, 5e-5, 5e-5, 5e-6, 5e-6]),
        ),
    ],
    ids=["decay", "drops"],
)
def test_the_rate_decays_after_each_epoch_or_warms_up_and_drops(small, optim, schedule, epochs, steps, rates) -> None:
    recipe = small(optim={"lr": 1e-3, **optim}, schedule=schedule, train={"epochs": epochs, "global_batch": 8})
    found = StepSchedule(recipe, steps_per_epoch=6)
    assert [found.lr(step) for step in steps] == pytest.approx(rates)


def test_a_warm_up_as_long_as_training_is_refused(small) -> None:
    recipe = small(schedule={"warmup_steps": 12}, train={"epochs": 2, "global_batch": 8})
    with pytest.raises(RecipeError, match=r"schedule.warmup_steps = 12: training has 12 steps; use fewer"):
        StepSchedule(recipe, steps_per_epoch=6)
