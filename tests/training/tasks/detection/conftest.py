"""A small detection set made of photographs, and recipes that train on it in seconds."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

pytest.importorskip("pycocotools", reason="the extra `detection` is not installed")

from karat_scale.recipe.loading import validate_recipe
from karat_scale.training.tasks.detection.recipe import DetectionRecipe
from tests.conftest import made_once
from tests.small_engines import small_recipe, whole_zero3
from tests.training.tasks.detection.cut_outs import LAYOUT, make_set

__all__ = ["small_recipe", "whole_zero3"]
MINI = {"name": "vit_mini_patch4_28", "image_size": 64, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
SMALL = {
    "model": {**MINI, "num_classes": 3},
    "attention": {"kind": "karat", "grid": 2, "rank": 4},
    "detector": {
        "window": 8,
        "channels": 32,
        "box_features": 64,
        "anchor_sizes": [8, 12, 16, 24, 32],
        "anchors": 64,
        "rois": 32,
        "proposals": 50,
        "detections": 10,
    },
    "augment": {"scale": [0.8, 1.25]},
    "optim": {"lr": 1e-3, "lr_batch": None},
    "schedule": {"warmup_steps": 5},
    "train": {"epochs": 2, "global_batch": 4, "eval_every_epochs": 100},
    "log": {"every_steps": 1, "trackers": []},
}


@pytest.fixture(scope="session")
def coco_set(tmp_path_factory) -> Path:
    """Return a set of 48 training and 12 validation images."""
    return made_once(tmp_path_factory, "coco", lambda root: make_set(root, {"train": 48, "val": 12}))


@pytest.fixture
def small(coco_set, tmp_path) -> Callable[..., DetectionRecipe]:
    """Return a function that makes the small recipe with other keys in sections: `small(model={"image_size": 128})`."""

    def make(**sections: dict[str, object]) -> DetectionRecipe:
        data = {key.partition(".")[2]: value for key, value in LAYOUT.items()}
        tree: dict[str, dict[str, object]] = {
            **SMALL,
            "data": {"path": str(coco_set), "workers": 0, **data},
            "run": {"name": "small", "dir": str(tmp_path / "run")},
        }
        for section, changes in sections.items():
            tree[section] = {**tree.get(section, {}), **changes}
        return validate_recipe(tree, "small", DetectionRecipe)

    return make


@pytest.fixture
def small_file(coco_set, tmp_path) -> Path:
    """Return the small recipe as a file, for `karat detect`."""
    return write_small(tmp_path / "small.yaml", coco_set)


def write_small(path: Path, data_set: Path) -> Path:
    """Write the small recipe for a data set; return its path."""
    data = {key.partition(".")[2]: value for key, value in LAYOUT.items()}
    path.write_text(yaml.safe_dump({**SMALL, "data": {"path": str(data_set), "workers": 1, **data}}))
    return path
