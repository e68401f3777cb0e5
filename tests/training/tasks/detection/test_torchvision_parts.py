import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign, nms

from karat_scale.training.tasks.detection.backbone import Anchors, RoIAlign, Transform, build_detector, build_vit
from karat_scale.training.tasks.detection.coco import Jitter, jitter_image

NAMES, STRIDES = ("0", "1", "2", "3"), (4.0, 8.0, 16.0, 32.0)


def maps_of(patch: int, side: int = 14) -> dict[str, torch.Tensor]:
    """Maps of 14 x 14 patches whose two channels are each cell's place in pixels, to torchvision its upper left."""
    found = {}
    for name, patches in zip(NAMES, (0.25, 0.5, 1.0, 2.0), strict=True):
        places = torch.arange(int(side / patches)) * patch * patches
        found[name] = torch.stack(torch.meshgrid(places, places, indexing="ij"))[None]
    return found


@pytest.mark.parametrize("patch", [14, 16])
@pytest.mark.parametrize("first", [(60, 224), (224, 60), (224, 224)])
def test_regions_read_where_they_lie_whatever_image_came_first(patch: int, first: tuple[int, int]) -> None:
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
    torch.testing.assert_close(own[0][:-48], theirs[0][:-48].float())  # but those of the last map
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


def test_boxes_are_float32_at_bf16(small) -> None:
    torch.manual_seed(0)
    recipe = small(detector={"min_score": 0.0})
    detector = build_detector(build_vit(recipe), recipe)
    proposals = []
    detector.roi_heads.register_forward_pre_hook(lambda _, args: proposals.extend(args[1]))
    target = {
        "boxes": torch.tensor([[4.0, 4.0, 40.0, 30.0]]),
        "labels": torch.tensor([2]),
        "masks": torch.ones(1, 48, 64, dtype=torch.uint8),
    }
    with torch.autocast("cpu", torch.bfloat16):
        losses = detector([torch.rand(3, 48, 64)], [target])
        (found,) = detector.eval()([torch.rand(3, 600, 800)])
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert {box.dtype for box in proposals} == {torch.float32}
    assert {found[key].dtype for key in ("boxes", "scores", "masks")} == {torch.float32}
    assert (found["boxes"] % 1 != 0).any()


def test_bf16_would_suppress_other_boxes() -> None:
    """What the float32 of the heads is for: torchvision separates classes by an offset that bfloat16 rounds away."""
    corners = torch.rand(200, 2, generator=torch.Generator().manual_seed(0)) * 200
    boxes = torch.cat([corners, corners + 20], 1) + 80 * 225.0
    scores = torch.linspace(1, 0, 200)
    assert len(nms(boxes, scores, 0.5)) != len(nms(boxes.bfloat16().float(), scores, 0.5))


def test_mean_and_deviation_are_the_recipes(small) -> None:
    recipe = small(augment={"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]})
    detector = build_detector(build_vit(recipe), recipe)
    batch, _ = detector.transform([torch.full((3, 64, 64), 0.75)])
    torch.testing.assert_close(batch.tensors, torch.full((1, 3, 64, 64), 0.5))
