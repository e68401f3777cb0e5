"""Analyses of ViT-Base over up to 1,000 images need less than 4 GiB. These tests take hours on a few cores."""

import json
import sys
from pathlib import Path

import pytest

from tests.conftest import karat_done, output_of

RECIPE = """
data: {backend: synthetic, synthetic_samples: 16, workers: 0}
model: {name: vit_base_patch16_224, num_classes: 1000}
attention: {kind: karat, grid: 1, rank: 12}
augment: {mix_prob: 0.0}
schedule: {warmup_epochs: 0}
train: {epochs: 1, max_steps: 3, global_batch: 2, ema_decay: 0.0, eval_batch: 8}
checkpoint: {every_steps: 1, keep_last: 5, every_minutes: null}
log: {trackers: []}
"""
# Six products for each eigenvalue need as much memory as forty, because the basis is full by then.
MEASURE = """
import json, resource, sys
from karat_scale.commands.analyze import landscape as sharpness
from karat_scale.commands.cli import main
sharpness.PRODUCTS, sharpness.PROBES = 6, 2
code = main(sys.argv[1:])
print(json.dumps([code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20]))
"""


@pytest.fixture(scope="module")
def base_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train ViT-Base for three steps on 16 synthetic images, let its recipe name 1,000, and return the run."""
    root = tmp_path_factory.mktemp("base")
    (root / "base.yaml").write_text(RECIPE)
    karat_done("train", str(root / "base.yaml"), f"run.dir={root / 'run'}")
    recipe = root / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("synthetic_samples: 16", "synthetic_samples: 1000"))
    return root / "run"


@pytest.mark.night
@pytest.mark.timeout(12 * 3600)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("spectrum", ("--images", "1000")),
        ("functions", ("--images", "1000")),
        ("maps", ("--image", *map(str, range(1000)))),
        ("distributions", ()),
        ("accuracy", ()),
        ("landscape", ("--samples", "1000", "--grid", "2")),
        ("sharpness", ("--hessian-samples", "64")),
    ],
)
def test_vit_base_over_1000_images_in_4_gib(base_run: Path, tmp_path, name: str, options: tuple[str, ...]) -> None:
    arguments = ["analyze", str(base_run), "--out", str(tmp_path), "--only", name, *options]
    said = output_of(sys.executable, "-c", MEASURE, *arguments, timeout=None)
    code, gib = json.loads(said.splitlines()[-1])
    assert code == 0
    assert gib < 4
