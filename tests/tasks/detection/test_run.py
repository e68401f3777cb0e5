"""`karat detect` from outside, on objects cut out of photographs."""

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from karat_scale.checkpoint.store import CheckpointStore
from karat_scale.cli import main
from karat_scale.errors import RunDirectoryError
from karat_scale.recipe.loading import load_recipe
from karat_scale.run.run_directory import RunDirectory
from karat_scale.run.weights_source import read_weights
from karat_scale.tasks.detection.checkpoint import read_training
from karat_scale.tasks.detection.recipe import DetectionRecipe
from tests.conftest import ROOT, events, karat, karat_command, karat_environment, summary
from tests.tasks.detection.cut_outs import make_set


def newest(run: Path) -> tuple[dict, dict]:
    store = CheckpointStore(run / "checkpoints")
    name = store.find_intact("latest")
    return store.state(name), read_training(store.root / name, store.state(name))


def same(left: object, right: object) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_stopped_run_resumes_to_the_bits_of_an_uninterrupted_one(small_file: Path, tmp_path: Path, capsys) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    done = karat("detect", str(small_file), f"run.dir={whole}")
    assert done.returncode == 0, done.stderr
    losses = [event["loss"] for event in events(whole, "train")]
    assert len(losses) == 24
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])

    command = karat_command(["detect", str(small_file), f"run.dir={stopped}"])
    process = subprocess.Popen(command, env=karat_environment(), stdout=subprocess.PIPE, text=True)
    while not (stopped / "metrics.jsonl").is_file() or len(events(stopped, "train")) < 7:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75, process.stdout.read()
    at = newest(stopped)[0]["step"]
    assert 7 <= at < 24
    done = karat("detect", str(small_file), f"run.dir={stopped}")
    assert done.returncode == 0, done.stderr
    assert [event["step"] for event in events(stopped, "resume")] == [at]
    assert [event["loss"] for event in events(stopped, "train")] == losses
    assert same(newest(whole)[1], newest(stopped)[1])

    (scores,), ended = events(stopped, "eval"), summary(stopped)
    assert (ended["exit"], ended["restarts"], ended["last_mask_ap"]) == (0, 1, scores["mask_ap"])
    assert scores == {**events(whole, "eval")[0], "time": scores["time"]}
    out = tmp_path / "scores.json"
    assert main(["detect", "--eval", str(stopped), "train.eval_batch=3", "--json", str(out)]) == 0
    assert json.loads(out.read_text())["mask_ap"] == pytest.approx(scores["mask_ap"], abs=0.05)
    assert "12 images" in capsys.readouterr().out


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path, capsys) -> None:
    def refused(*arguments: str) -> str:
        assert main(["detect", *arguments]) == 2
        text = capsys.readouterr().err
        assert text.count("\n") == 1
        return text

    assert "did you mean coco_mask_rcnn_vit_base?" in refused("coco_mask_rcnn_vit_bse")
    assert "not a run directory" in refused("--eval", str(tmp_path / "nothing"))


def test_a_disk_too_full_for_the_last_checkpoint_is_one_line(small_file: Path, small_disk: Path) -> None:
    run = small_disk / "run"
    (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free - 100_000))
    done = karat("detect", str(small_file), f"run.dir={run}", "train.max_steps=1", "checkpoint.keep_best=false")
    assert done.returncode == 2
    (line,) = (line for line in done.stderr.splitlines() if "error" in line)
    assert line.startswith(f"error: run.dir = {run}: the last checkpoint could not be saved: No space left on device")
    assert summary(run)["exit"] == 2


def test_a_run_of_another_kind_is_called_so(
    small: Callable[..., DetectionRecipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    detector, classifier = tmp_path / "detector", tmp_path / "classifier"
    detector.mkdir()
    classifier.mkdir()
    RunDirectory(detector).begin(small(), ("a", "b", "c"))
    RunDirectory(classifier).begin(load_recipe("cifar10_vit_tiny", ["data.path=images"]))
    for command in (["export"], ["eval"], ["analyze"], ["ledger", "--docs", str(ROOT / "docs")]):
        assert main([command[0], str(detector), *command[1:]]) == 2
        error = f"{detector}: a run of karat detect, not of karat train; karat detect --eval reads it\n"
        assert capsys.readouterr().err.removeprefix("error: ") == error
    with pytest.raises(RunDirectoryError, match="a run of karat detect, not of karat train"):
        read_weights(str(detector))
    assert main(["detect", "--eval", str(classifier)]) == 2
    error = f"{classifier}: a run of karat train, not of karat detect; karat eval reads it\n"
    assert capsys.readouterr().err.removeprefix("error: ") == error


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_ranks_score_each_image_once_and_one_rank_resumes_from_them(small_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ("train.max_steps=3", "train.micro_batch=2", "train.precision=bf16")
    done = karat("detect", str(small_file), f"run.dir={run}", *options, processes=2)
    assert done.returncode == 0, done.stderr
    (scores,) = events(run, "eval")
    assert scores["images"] == 12
    assert {path.name for path in (run / "checkpoints/step-00000003").iterdir()} >= {
        "rank-00000.pt",
        "rank-00001.pt",
        "training.pt",
    }
    # Another world goes on from it.
    done = karat("detect", str(small_file), f"run.dir={run}", *options[1:], "train.max_steps=5")
    assert done.returncode == 0, done.stderr
    assert events(run, "resume")[0]["step"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["karat", "softmax"])
def test_it_learns_to_find_objects_in_images_it_has_not_seen(kind: str, small_file: Path, tmp_path: Path) -> None:
    data = make_set(tmp_path / "set", {"train": 64, "val": 24}, seed=1)
    run = tmp_path / "run"
    options = (f"attention.kind={kind}", f"data.path={data}", "train.global_batch=8", "train.epochs=40")
    done = karat("detect", str(small_file), f"run.dir={run}", *options)
    assert done.returncode == 0, done.stderr
    (scores,) = events(run, "eval")
    # One box drawn at random around one of three categories has an AP below 1.
    assert scores["box_ap50"] > 50
    assert scores["mask_ap50"] > 50
