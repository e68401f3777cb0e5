"""A small detection set in COCO's format: objects cut out of photographs, pasted on photographs, with exact masks.

The photographs come with scikit-image: a cat, a cup of coffee and an astronaut's head, on grass, gravel and bricks.
"""

import json
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

# The ids have gaps, as COCO's have.
CATEGORIES = {3: "cat", 7: "cup", 8: "face"}
LAYOUT = {
    "data.train_images": "train",
    "data.train_annotations": "train.json",
    "data.val_images": "val",
    "data.val_annotations": "val.json",
}


def cut_outs() -> dict[int, tuple[Image.Image, Image.Image]]:
    """Return each category's photograph and the mask of its object, both cropped to the object."""
    cat, cup, face = skimage.data.chelsea(), skimage.data.coffee(), skimage.data.astronaut()
    outline = [(35, 20), (75, 0), (330, 0), (355, 60), (365, 130), (340, 220), (300, 280), (230, 285), (120, 270)]
    outlines = {
        3: (cat, lambda draw: draw.polygon([*outline, (50, 190), (30, 100)], fill=255)),
        7: (cup, lambda draw: [draw.ellipse(box, fill=255) for box in ((77, 60, 478, 390), (173, 17, 403, 205))]),
        8: (face, lambda draw: draw.ellipse((152, 15, 302, 190), fill=255)),
    }
    found = {}
    for category, (pixels, outlined) in outlines.items():
        image = Image.fromarray(pixels)
        mask = Image.new("L", image.size)
        outlined(ImageDraw.Draw(mask))
        found[category] = (image.crop(mask.getbbox()), mask.crop(mask.getbbox()))
    return found


def make_set(root: Path, counts: dict[str, int], side: int = 96, seed: int = 0) -> Path:
    """Write `counts` images of `side` x 3/4 `side` pixels for each split, with one to three objects in each."""
    rng = np.random.default_rng(seed)
    objects = cut_outs()
    grounds = [skimage.data.grass(), skimage.data.gravel(), skimage.data.brick()]
    for split, count in counts.items():
        (root / split).mkdir(parents=True)
        images, annotations = [], []
        for number in range(count):
            image, masks = _compose(objects, grounds, (side, 3 * side // 4), rng)
            image.save(root / split / f"{number:06d}.jpg", quality=95)
            size = {"width": image.width, "height": image.height}
            images.append({"id": 10 * number + 1, "file_name": f"{number:06d}.jpg", **size})
            for category, mask in masks:
                annotations.append(_annotation(len(annotations) + 1, 10 * number + 1, category, mask))
        categories = [{"id": category, "name": name} for category, name in CATEGORIES.items()]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"{split}.json").write_text(json.dumps(content))
    return root


def _compose(objects, grounds, size, rng) -> tuple[Image.Image, list[tuple[int, np.ndarray]]]:
    ground = grounds[rng.integers(len(grounds))]
    left, top = (int(rng.integers(512 - 3 * part + 1)) for part in size)
    image = Image.fromarray(ground[top : top + 3 * size[1], left : left + 3 * size[0]]).convert("RGB").resize(size)
    masks: list[tuple[int, np.ndarray]] = []
    for category in rng.choice(list(objects), rng.integers(1, 4), replace=False):
        cut, outline = objects[category]
        scale = rng.uniform(0.35, 0.6) * size[1] / cut.height
        shape = max(round(cut.width * scale), 1), max(round(cut.height * scale), 1)
        place = tuple(int(rng.integers(whole - part + 1)) for whole, part in zip(size, shape, strict=True))
        pasted = Image.new("L", size)
        pasted.paste(outline.resize(shape).point(lambda value: 255 * (value > 127)), place)
        image.paste(cut.resize(shape), place, pasted.crop((*place, place[0] + shape[0], place[1] + shape[1])))
        covers = np.asarray(pasted) > 0
        masks = [(other, mask & ~covers) for other, mask in masks] + [(int(category), covers)]
    return image, [(category, mask) for category, mask in masks if mask.sum() > 20]


def _annotation(number: int, image: int, category: int, mask: np.ndarray) -> dict[str, object]:
    runs = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "segmentation": {"size": runs["size"], "counts": runs["counts"].decode()},
        "area": int(mask.sum()),
        "bbox": coco_mask.toBbox(runs).tolist(),
        "iscrowd": 0,
    }
