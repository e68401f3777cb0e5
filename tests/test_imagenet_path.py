"""The path of ImageNet: official tars, prepare, verify, train with each backend and world, stop, resume, evaluate."""

import importlib.util
import json
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest

from karat_scale.engine.heartbeat import read_signs
from tests.conftest import events, karat_done, karat_environment, rank_environments, run_script, summary
from tests.data.prepare.images import jpeg, sample_file, write
from tests.data.tars import tar_bytes
from tests.training.runs import stopped_by, wait_in_run
from tests.warm import Started

STEPS = 8  # two epochs of four
SMALL_MODEL = (
    "model.image_size=32",
    "model.patch_size=8",
    "model.embed_dim=32",
    "model.depth=1",
    "model.num_heads=2",
    "attention.kind=karat",
    "attention.rank=4",
    "schedule.warmup_epochs=0.5",
    "train.epochs=2",
    "train.eval_batch=50",
    "data.workers=1",
    "deepspeed.config=zero0",
    "log.every_steps=1",
    "log.trackers=[]",
)
pytestmark = pytest.mark.slow  # test_readme has a shorter path that is not slow
LIBRARY = {"ffcv": "ffcv", "dali": "nvidia.dali"}


def generated_images() -> dict[str, list[bytes]]:
    """Return 40 classes of three photo-like images of different sizes, by wnid."""
    return {
        f"n{1000 + c:08d}": [jpeg(10 * c + i, 60 + 7 * (c % 9), 50 + 5 * (c % 7), quality=95) for i in range(3)]
        for c in range(40)
    }


def real_images() -> dict[str, list[bytes]]:
    """Return one real image of each of ImageNet's thousand classes, by wnid."""
    with tarfile.open(sample_file("imagenet_sample_1000.tar")) as tar:
        files = [(member.name.split("/")[-2], tar.extractfile(member)) for member in tar if member.isfile()]
        return {wnid: [file.read()] for wnid, file in files if file is not None}


def write_imagenet(root: Path, images: dict[str, list[bytes]]) -> None:
    """Write ImageNet's official tars with Kaggle's labels, and the same images in folders. Both splits are alike."""
    inner = {}
    for wnid, found in images.items():
        files = {f"{wnid}_{number}.JPEG": data for number, data in enumerate(found)}
        inner[f"{wnid}.tar"] = tar_bytes(files)
        for name, data in files.items():
            write(root / "folders" / "train" / wnid / name, data)
    flat = [(wnid, data) for wnid, found in images.items() for data in found]
    shuffled = [flat[i] for i in np.random.default_rng(0).permutation(len(flat))]
    val = {f"ILSVRC2012_val_{number:08d}": pair for number, pair in enumerate(shuffled, start=1)}
    for name, (wnid, data) in val.items():
        write(root / "folders" / "val" / wnid / f"{name}.JPEG", data)
    write(root / "official" / "ILSVRC2012_img_train.tar", tar_bytes(inner))
    tar = tar_bytes({f"{name}.JPEG": data for name, (_, data) in val.items()})
    write(root / "official" / "ILSVRC2012_img_val.tar", tar)
    rows = "".join(f"{name},{wnid} 1 2 3 4\n" for name, (wnid, _) in val.items())
    write(root / "official" / "LOC_val_solution.csv", f"ImageId,PredictionString\n{rows}".encode())


class Imagenet:
    """A prepared data set, and a reference run over it."""

    def __init__(self, root: Path, images: dict[str, list[bytes]]) -> None:
        self.root = root
        self.classes, self.samples = len(images), sum(map(len, images.values()))
        write_imagenet(root, images)
        shard_size = ("--shard-samples", str(self.samples // 3))
        run_script("data_prep/make_webdataset.py", *self.prepare("webdataset"), *shard_size)
        self.recipe = root / "recipe.yaml"
        self.recipe.write_text("model: {name: vit_mini_patch4_28}\n")
        self.reference = self.train("webdataset", "reference")

    def prepare(self, kind: str) -> tuple[str, ...]:
        return "--src", str(self.root / "official"), "--out", str(self.root / kind), "--workers", "2"

    def path(self, backend: str) -> Path:
        return self.root / {"folder": "folders", "ffcv": "ffcv"}.get(backend, "webdataset")

    def command(self, backend: str, run: str) -> list[str]:
        batch = self.samples // 4
        batch -= batch % 4
        data = [f"data.backend={backend}", f"data.path={self.path(backend)}", "data.decoder=pillow"]
        sizes = [f"model.num_classes={self.classes}", f"train.global_batch={batch}", f"run.dir={self.root / run}"]
        return ["train", str(self.recipe), *SMALL_MODEL, *data, *sizes]

    def train(self, backend: str, run: str, processes: int = 1) -> Path:
        karat_done(*self.command(backend, run), processes=processes)
        return self.root / run


@pytest.fixture(scope="module", params=["generated", "real"])
def imagenet(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Imagenet:
    images = generated_images() if request.param == "generated" else real_images()
    return Imagenet(tmp_path_factory.mktemp(request.param), images)


def stopped_in_the_middle(command: list[str], run: Path, processes: int) -> None:
    """Start a run and stop it by SIGTERM before its end."""
    environments = rank_environments(processes) if processes > 1 else [karat_environment()]
    process = Started("karat_scale", command, environments)
    wait_in_run(lambda: len(read_signs(run)) == processes, process)  # it takes a step before it stops
    stopped_by(process, signal.SIGTERM)
    assert summary(run)["exit"] == 75
    assert 0 < summary(run)["steps"] < STEPS


def digests(run: Path) -> dict[int, int]:
    return {event["step"]: event["data_digest"] for event in events(run, "train")}


def test_the_shards_are_verified(imagenet: Imagenet) -> None:
    run_script("data_prep/verify.py", "--src", str(imagenet.path("webdataset")))
    record = json.loads((imagenet.path("webdataset") / "dataset.json").read_text())
    assert [record["splits"][split]["samples"] for split in ("train", "val")] == [imagenet.samples] * 2
    assert len(set(record["classes"])) == imagenet.classes


@pytest.mark.multiprocess
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("backend", ["webdataset", "folder", "ffcv", "dali"])
def test_every_backend_and_world_trains_on_the_same_samples(imagenet: Imagenet, backend: str, processes: int) -> None:
    if backend in LIBRARY and importlib.util.find_spec(LIBRARY[backend].partition(".")[0]) is None:
        pytest.skip(f"pip install -e '.[{backend}]'")
    if backend == "ffcv" and not imagenet.path("ffcv").exists():
        run_script("data_prep/make_ffcv.py", *imagenet.prepare("ffcv"))
    run = imagenet.root / f"{backend}-{processes}"
    stopped_in_the_middle(imagenet.command(backend, run.name), run, processes)
    imagenet.train(backend, run.name, processes)

    reference = imagenet.reference
    assert digests(run) == digests(reference)
    assert sorted(digests(run)) == list(range(1, STEPS + 1))
    assert summary(run)["data_digest"] == summary(reference)["data_digest"]
    assert all(event["images"] == imagenet.samples for event in events(run, "eval"))
    losses, expected = (np.array([e["loss"] for e in events(r, "train")]) for r in (run, reference))
    # Folder and shards are decoded alike; other decoders differ by a grey level here and there.
    assert np.allclose(losses, expected, rtol=1e-5 if backend in ("webdataset", "folder") else 0.02)

    karat_done("eval", str(run), "--json", str(run / "eval.json"))
    assert json.loads((run / "eval.json").read_text())["images"] == imagenet.samples
