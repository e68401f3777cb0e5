"""`karat detect` from outside, on objects cut out of photographs."""

import json
import signal
from pathlib import Path

import pytest

from karat_scale.commands.cli import main
from karat_scale.foundation.errors import RunDirectoryError
from karat_scale.recipe.loading import load_recipe
from karat_scale.training.run_directory import RunDirectory
from karat_scale.training.weights_file import read_weights
from tests.conftest import events, karat_done, karat_refuses, summary
from tests.training.runs import assert_same_run, kill_all, losses, start_held, stopped_by
from tests.training.tasks.detection.conftest import write_small
from tests.training.tasks.detection.cut_outs import LAYOUT, make_set


@pytest.fixture(scope="module")
def whole(coco_set, tmp_path_factory) -> Path:
    """Return a run that nothing stopped."""
    root = tmp_path_factory.mktemp("whole")
    karat_done("detect", str(write_small(root / "small.yaml", coco_set)), f"run.dir={root / 'run'}")
    return root / "run"


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_ends_in_the_same_bits(small_file, whole, tmp_path, capsys, number) -> None:
    loss = losses(whole)
    assert len(loss) == 24
    assert sum(loss[step] for step in range(19, 25)) < 0.8 * sum(loss[step] for step in range(1, 7))

    run = tmp_path / "stopped"
    process = start_held(small_file, run, "saved step-00000006 in", "checkpoint.every_steps=3", by="detect")
    if number == signal.SIGTERM:
        stopped_by(process, number)
    else:
        kill_all(process)
    karat_done("detect", str(small_file), f"run.dir={run}", "checkpoint.every_steps=3")
    (resume,) = events(run, "resume")
    assert 6 <= resume["step"] < 24
    assert_same_run(run, whole)

    (scores,), ended = events(run, "eval"), summary(run)
    assert (ended["exit"], ended["restarts"], ended["last_mask_ap"]) == (0, 1, scores["mask_ap"])
    assert scores == {**events(whole, "eval")[0], "time": scores["time"], "spent": scores["spent"]}
    out = tmp_path / "scores.json"
    assert main(["detect", "--eval", str(run), "train.eval_batch=3", "--json", str(out)]) == 0
    assert json.loads(out.read_text())["mask_ap"] == pytest.approx(scores["mask_ap"], abs=0.05)
    assert "12 images" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["coco_paper_vit_base_g1u_random", "coco_paper_vit_base"])
def test_a_recipe_of_the_paper_trains_at_a_small_size(recipe, coco_set, tmp_path) -> None:
    sizes = ("name=vit_mini_patch4_28", "image_size=64", "patch_size=8", "embed_dim=64", "depth=2", "num_heads=2")
    overrides = [
        *(f"model.{size}" for size in (*sizes, "num_classes=3")),
        *(f"{key}={value}" for key, value in LAYOUT.items()),
        *("detector.window=8", "detector.channels=32", "detector.box_features=64", "init_from=", "data.workers=0"),
        *("train.max_steps=3", "train.global_batch=4", "train.precision=fp32", "log.every_steps=1"),
    ]
    run = tmp_path / "run"
    done = karat_done("detect", recipe, f"data.path={coco_set}", f"run.dir={run}", *overrides)
    assert f"next: karat detect --eval {run}" in done.stdout
    lines = events(run, "train")
    assert [event["step"] for event in lines] == [1, 2, 3]
    assert lines[0]["lr"] == pytest.approx(1e-4 * 0.001)
    assert summary(run)["last_mask_ap"] is not None


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path) -> None:
    assert "did you mean coco_mask_rcnn_vit_base?" in karat_refuses("detect", "coco_mask_rcnn_vit_bse")
    assert "there is no such directory" in karat_refuses("detect", "--eval", str(tmp_path / "nothing"))


def test_a_start_without_its_annotations_leaves_a_summary(small_file, tmp_path) -> None:
    error = karat_refuses(
        "detect", str(small_file), f"run.dir={tmp_path / 'run'}", "data.train_annotations=nowhere.json"
    )
    assert "nowhere.json" in error
    assert summary(tmp_path / "run")["exit"] == 2


def test_a_run_of_another_kind_is_called_so(small, tmp_path) -> None:
    detector, classifier = tmp_path / "detector", tmp_path / "classifier"
    detector.mkdir()
    classifier.mkdir()
    RunDirectory(detector).begin(small(), ("a", "b", "c"))
    RunDirectory(classifier).begin(load_recipe("cifar10_vit_tiny", ["data.path=images"]))
    for command in ("export", "eval", "analyze"):
        error = f"error: {detector}: a run of karat detect, not of karat train; karat detect --eval reads it"
        assert karat_refuses(command, str(detector)) == error
    with pytest.raises(RunDirectoryError, match="a run of karat detect, not of karat train"):
        read_weights(str(detector))
    error = f"error: {classifier}: a run of karat train, not of karat detect; karat eval reads it"
    assert karat_refuses("detect", "--eval", str(classifier)) == error


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_ranks_score_each_image_once_and_one_rank_resumes_from_them(small_file, tmp_path) -> None:
    run = tmp_path / "run"
    options = ("train.max_steps=3", "train.micro_batch=2", "train.precision=bf16")
    karat_done("detect", str(small_file), f"run.dir={run}", *options, processes=2)
    (scores,) = events(run, "eval")
    assert scores["images"] == 12
    # A run at another world size and ZeRO stage resumes from it.
    karat_done("detect", str(small_file), f"run.dir={run}", *options[1:], "train.max_steps=5", "deepspeed.config=zero2")
    assert events(run, "resume")[0]["step"] == 3


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_rank_without_an_image_evaluates_with_the_others_at_stage_3(small_file, tmp_path, whole_zero3) -> None:
    """A rank without an image joins the forward pass, because at stage 3 each pass gathers weights from all ranks.

    Here 12 images make three batches of 4, so the second rank has none in the last pass.
    """
    run = tmp_path / "run"
    options = ("train.max_steps=1", "train.micro_batch=2", "train.eval_batch=4", "run.peer_timeout_minutes=2")
    karat_done("detect", str(small_file), f"run.dir={run}", *options, f"deepspeed.config={whole_zero3}", processes=2)
    (scores,) = events(run, "eval")
    assert scores["images"] == 12


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["karat", "softmax"])
def test_it_learns_to_find_objects_in_images_it_has_not_seen(kind, small_file, tmp_path) -> None:
    data = make_set(tmp_path / "set", {"train": 64, "val": 24}, seed=1)
    run = tmp_path / "run"
    options = (f"attention.kind={kind}", f"data.path={data}", "train.global_batch=8", "train.epochs=40")
    karat_done("detect", str(small_file), f"run.dir={run}", *options)
    (scores,) = events(run, "eval")
    # Random boxes with random categories have an AP below 1.
    assert scores["box_ap50"] > 50
    assert scores["mask_ap50"] > 50
