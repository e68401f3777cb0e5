"""The whole `karat analyze` on two real short runs on CIFAR-10, one of each kind, side by side."""

import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest

from karat_scale.commands.analyze.command import ANALYSES, TITLES
from tests.conftest import karat, run_script
from tests.data.prepare.images import sample_file

PER_CLASS = {"train": 64, "test": 16}
# As the CIFAR-10 recipes have it, but smaller and short.
TINY = (
    "model.embed_dim=32",
    "model.depth=2",
    "model.num_heads=2",
    "attention.grid=2",
    "attention.rank=6",
    "train.global_batch=32",
    "train.micro_batch=32",
    "train.eval_batch=32",
    "train.epochs=1",
    "data.workers=1",
    "checkpoint.snapshots=4",
    "log.trackers=[]",
)
OF_ALL = {f"training/{name}" for name in ("loss", "accuracy", "lr", "grad_norm", "images_per_second")}
FIGURES = {
    "accuracy": {"confusion"},
    "calibration": {"reliability"},
    "spectrum": {"last_block", "ranks"},
    "content": {"shares"},
    "maps": {"image_0", "image_7"},
    "functions": {"energy", "distance", "functions_block_0", "functions_block_1"},
    "distributions": {"model", "heads"},
    "landscape": {"optimizer_path", "path_surface", "random_surface"},
}
HAS_NAN = {"calibration", "spectrum"}  # of bins without an image; of singular values that are 0
ONLY_KARAT = {("functions", figure) for figure in FIGURES["functions"]} | {("distributions", "heads")}


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the first images of each class of CIFAR-10."""
    root = tmp_path_factory.mktemp("images")
    with tarfile.open(sample_file("cifar10_imagefolder.tar.gz")) as tar:
        wanted = []
        for member in tar:
            found = re.fullmatch(r"(train|test)/\w+/(\d+)\.\w+", member.name)
            if found and int(found[2]) < PER_CLASS[found[1]]:
                wanted.append(member)
        tar.extractall(root / "images", wanted, filter="data")
    run_script("data_prep/make_webdataset.py", "--src", str(root / "images"), "--out", str(root / "shards"))
    return root / "shards"


@pytest.mark.slow
def test_every_figure_number_and_section_of_two_runs(cifar10: Path, tmp_path: Path) -> None:
    runs = {kind: tmp_path / kind for kind in ("karat", "softmax")}
    for kind, recipe in (("karat", "cifar10_vit_mini_32px_g3b"), ("softmax", "cifar10_vit_mini_32px")):
        done = karat("train", recipe, *TINY, f"data.path={cifar10}", f"run.dir={runs[kind]}")
        assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    quick = ("--images", "4", "--grid", "3", "--samples", "8", "--image", "0", "7")
    done = karat("analyze", *map(str, runs.values()), *quick, "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert not [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "note: functions of softmax: attention.kind = softmax has no learned functions" in done.stderr

    expected = {
        f"{analysis}/{kind}/{figure}"
        for analysis, figures in FIGURES.items()
        for figure in figures
        for kind in runs
        if kind == "karat" or (analysis, figure) not in ONLY_KARAT
    }
    for ending in (".png", ".svg"):
        files = [path for path in out.rglob(f"*{ending}") if path.parent.name != "pictures"]
        assert {path.relative_to(out).with_suffix("").as_posix() for path in files} == expected | OF_ALL, ending
    for place in {name.rpartition("/")[0] for name in expected}:
        assert json.loads((out / place / "numbers.json").read_text())
        with np.load(out / place / "arrays.npz") as arrays:
            assert arrays.files
            finite = all(np.isfinite(arrays[name]).all() for name in arrays.files)
            assert finite or place.partition("/")[0] in HAS_NAN, place

    page = (out / "report.html").read_text()
    assert set(re.findall(r'data-figure="([^"]+)"', page)) == expected | OF_ALL
    shown = [analysis for analysis in ANALYSES if analysis != "robustness"]
    assert re.findall(r'<section id="(\w+)">', page) == [*shown, "absent"]
    assert all(f"<h2>{TITLES[analysis]}</h2>" in page for analysis in shown)
    for section in page.split("<section")[2:-1]:
        assert "<h3>karat</h3>" in section
        assert ("<h3>softmax</h3>" in section) == ('id="functions"' not in section)
    for kind in runs:
        path = json.loads((out / "landscape" / kind / "numbers.json").read_text())["path"]
        assert path["steps"] == [0, 5, 10, 15, 20]
