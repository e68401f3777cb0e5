import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from karat_scale.training.tasks.detection.coco import boxes_of, draw_jitter, jitter_image, jitter_masks
from karat_scale.training.tasks.detection.recipe import JitterConfig

SIDES = st.integers(5, 90)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**64 - 1), SIDES, SIDES, st.sampled_from([32, 64]))
def test_image_and_masks_go_together_and_fit(seed: int, width: int, height: int, image_size: int) -> None:
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 : height // 2 + 1, width // 3 :] = 1
    jitter = draw_jitter(seed, width, height, image_size, JitterConfig(scale=(0.5, 2.0)))
    assert jitter == draw_jitter(seed, width, height, image_size, JitterConfig(scale=(0.5, 2.0)))
    assert 1 <= min(jitter.size) <= max(jitter.size) <= image_size
    assert 0 <= jitter.box[0] < jitter.box[2] <= width + 1e-9
    image = jitter_image(Image.fromarray(255 * mask).convert("RGB"), jitter)
    (moved,) = jitter_masks(mask[None], jitter)
    assert image.shape == (3, *moved.shape) == (3, jitter.size[1], jitter.size[0])
    # Away from its edges, where bilinear and nearest differ, the object is where its mask is.
    decided = (image[0] < 5) | (image[0] > 250)
    assert np.array_equal(image[0][decided] > 127, moved[decided] == 1)


def test_the_scale_is_of_what_fits() -> None:
    whole = draw_jitter(0, 100, 50, 64, JitterConfig(scale=(1.0, 1.0), hflip=0.0))
    assert (whole.box, whole.size, whole.flip) == ((0.0, 0.0, 100.0, 50.0), (64, 32), False)
    small = draw_jitter(0, 100, 50, 64, JitterConfig(scale=(0.5, 0.5), hflip=1.0))
    assert (small.box, small.size, small.flip) == ((0.0, 0.0, 100.0, 50.0), (32, 16), True)
    crop = draw_jitter(0, 100, 50, 64, JitterConfig(scale=(2.0, 2.0)))
    assert crop.size == (64, 64)
    assert (round(crop.box[2] - crop.box[0], 6), round(crop.box[3] - crop.box[1], 6)) == (50.0, 50.0)


def test_boxes_just_fill_masks() -> None:
    masks = np.zeros((2, 6, 8), np.uint8)
    masks[0, 2:4, 1:6] = 1
    masks[1, 5, 7] = 1
    assert boxes_of(masks).tolist() == [[1, 2, 6, 4], [7, 5, 8, 6]]
    assert boxes_of(masks[:0]).shape == (0, 4)
