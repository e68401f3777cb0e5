"""Training on a stream: exact resume, and the commands around it, which work or say why not."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from karat_scale.checkpoint.store import CheckpointStore
from karat_scale.commands.plan.command import dry_run
from karat_scale.foundation.errors import DataError
from karat_scale.recipe.loading import load_recipe
from tests.conftest import SMALL, events, karat, karat_done, karat_here, karat_refuses, summary, wait_until
from tests.data.tars import sample, write_stream, write_tar
from tests.small_engines import equal
from tests.training.runs import assert_a_kill_changes_nothing, losses, start, wait_for_step
from tests.training.test_save_points import train_to_the_end

QUICK = ("schedule.warmup_epochs=0", "train.micro_batch=2")
Command = Callable[..., list[str]]


@pytest.fixture(scope="module")
def recipe(shards, tmp_path_factory) -> Path:
    """Return a recipe with epochs of 64 images, from a stream of six tars with 58 images."""
    root = tmp_path_factory.mktemp("stream")
    tars = write_stream(root / "tars", (9, 11, 8, 12, 4, 14), classes=4)
    data = {"path": str(shards), "order": "stream", "stream": f"pipe:cat {tars}/{{0..5}}.tar", "stream_samples": 64}
    settings = {"data": {**data, "stream_buffer": 5}, "attention": {"kind": "karat"}}
    (root / "streamed.yaml").write_text(json.dumps(settings))
    return root / "streamed.yaml"


@pytest.fixture(scope="module")
def command(recipe) -> Command:
    def arguments(run: Path, *overrides: str) -> list[str]:
        return ["train", str(recipe), *SMALL, *QUICK, f"run.dir={run}", *overrides]

    return arguments


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_resumes_to_the_bits_of_an_uninterrupted_one(recipe, tmp_path, processes) -> None:
    own = (*SMALL, *QUICK, "data.workers=2")
    assert_a_kill_changes_nothing(recipe, tmp_path, *own, processes=processes)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert sorted(losses(whole)) == list(range(1, 17))
    lanes = CheckpointStore(cut / "checkpoints").state("step-00000016")["stream"]["lanes"]
    assert sorted(entry % (2 * processes) for entry, _ in lanes) == list(range(2 * processes))
    assert [event["images"] for event in events(whole, "eval")] == [28, 28]


@pytest.mark.slow
def test_ctrl_c_reaches_no_command_and_leaves_none(recipe, tmp_path) -> None:
    """Ctrl-C does not end the stream's commands, because the trainer needs their output until it has saved.

    The signal goes to the whole group of the trainer. No command is left when the trainer has ended.
    """
    tars = recipe.parent / "tars"
    stream = f"data.stream=pipe:cat {tars}/{{0..5}}.tar; sleep 0.1; true {tmp_path}"
    run = tmp_path / "run"
    process = start(recipe, run, *SMALL, *QUICK, "train.epochs=99", "data.workers=2", stream)
    wait_for_step(run, 12, process)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert summary(run)["exit"] == 75, output

    def commands() -> list[str]:
        texts = [" ".join(one.info["cmdline"] or ()) for one in psutil.process_iter(["cmdline"])]
        return [text for text in texts if str(tmp_path) in text]

    wait_until(lambda: not commands())
    assert karat_here("eval", str(run)) == 0  # opens none of its tars


@pytest.mark.slow
def test_other_workers_begin_at_the_next_cycle_and_say_so(command, tmp_path, capsys) -> None:
    run = tmp_path / "run"
    assert karat_here(*command(run, "data.workers=2", "train.max_steps=5")) == 0
    own = ("data.workers=1", "train.max_steps=9", "resume.allow=[train.max_steps]")
    assert karat_here(*command(run, *own)) == 0
    assert "in the checkpoint: a new pass over all tars begins" in " ".join(capsys.readouterr().out.split())
    state = CheckpointStore(run / "checkpoints").state("step-00000009")["stream"]
    assert (state["shards"], len(state["lanes"])) == (6, 1)
    assert state["lanes"][0][0] >= 6


@pytest.mark.slow
@pytest.mark.parametrize("what", ["growing images", "a student"])
def test_what_changes_with_the_step_goes_on_in_the_stream(command, tmp_path, what) -> None:
    whole, cut, plain = tmp_path / "whole", tmp_path / "cut", tmp_path / "plain"
    assert karat_here(*command(plain)) == 0
    own = {"growing images": "schedule.image_sizes=[[0, 8], [1, 16]]", "a student": f"distill.from={plain}"}[what]
    assert karat_here(*command(whole, own)) == 0
    for steps in ("11", "null"):
        assert karat_here(*command(cut, own, f"train.max_steps={steps}", "resume.allow=[train.max_steps]")) == 0
    digests = [summary(run)["data_digest"] for run in (whole, cut, plain)]
    assert digests[0] == digests[1] == digests[2] != 0
    assert losses(cut) == losses(whole)


def test_too_few_tars_and_a_failing_command_end_in_one_line(command, tmp_path) -> None:
    for message, arguments in {
        "data.stream has 6 tars, fewer than 7 = 1 rank x 7 data workers": ["data.workers=7"],
        "data.stream: pipe:exit 4 ended with exit code 4": ["data.stream=pipe:exit 4"],
        "the webdataset library opens no s3:": ["data.stream=s3://bucket/a.tar", "--print"],
    }.items():
        assert message in karat_refuses(*command(tmp_path / arguments[0][-1], *arguments))


def test_a_step_that_is_given_up_is_taken_again_with_the_same_samples(command, tmp_path, world) -> None:
    def train(name: str, stop: tuple[int, str] | None = None) -> dict[str, object]:
        _, path, *overrides = command(tmp_path / name, "data.workers=0", "train.max_steps=5")
        return train_to_the_end(load_recipe(path, overrides), world, stop)

    assert train("cut", (3, "in a step"))["step"] == 3
    assert equal(train("cut"), train("whole"))


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_command_that_fails_on_one_rank_ends_both(command, tmp_path) -> None:
    tar = tmp_path / "a.tar"
    write_tar(tar, [member for number in range(40) for member in sample(number, number % 4)])
    stream = f"data.stream=pipe:cat {tar}::pipe:cat {tar}; exit 5"
    done = karat(*command(tmp_path / "run", "data.workers=1", stream), processes=2)
    assert done.returncode in (1, 2), done.stdout + done.stderr
    assert "a.tar; exit 5 ended with exit code 5" in done.stderr
    assert done.stderr.count("error: data.stream: ") == done.stderr.count("error: another rank has ended (") == 1


def test_show_draws_the_first_batch(recipe, tmp_path, capsys) -> None:
    out = tmp_path / "batch.png"
    assert karat_here("show", str(recipe), *SMALL, *QUICK, "--out", str(out)) == 0
    assert out.is_file()
    assert "pipe:cat" in capsys.readouterr().out
    line = karat_refuses("show", str(recipe), *SMALL, *QUICK, "--step", "2")
    assert "a stream (data.order = stream) is read from its start; use --step 1" in line


def test_a_dry_run_reads_the_stream_and_counts_its_tars(recipe) -> None:
    lines = list(dry_run(load_recipe(recipe, [*SMALL, *QUICK]), 2))
    assert "data: 64 training and 28 validation images" in lines
    assert any("16 steps of 8 = 2 ranks x 2 x 2" in line for line in lines)
    with pytest.raises(DataError, match="6 tars, fewer than 8 = 4 ranks x 2 data workers"):
        list(dry_run(load_recipe(recipe, [*SMALL, *QUICK, "data.workers=2"]), 4))


@pytest.mark.slow
def test_replay_takes_a_step_again_if_its_commands_are_trusted(command, tmp_path, monkeypatch) -> None:
    run, figures = tmp_path / "run", tmp_path / "found.json"
    assert karat_here(*command(run, "data.workers=2", "checkpoint.every_steps=3", "train.max_steps=8")) == 0
    monkeypatch.delenv("KARAT_TRUST", raising=False)
    arguments = ("replay", str(run), "8", "--out", str(tmp_path / "x.png"), "--json", str(figures))
    assert "runs a command or sends a variable's value; if you trust it, add --trust" in karat_refuses(*arguments)
    monkeypatch.setenv("KARAT_TRUST", "1")
    assert karat_here(*arguments) == 0
    found = json.loads(figures.read_text())
    assert found["checkpoint"] == "step-00000006"
    assert found["loss"] == pytest.approx(losses(run)[8], rel=1e-5)


@pytest.mark.slow
def test_the_doctor_times_a_stream(recipe, tmp_path) -> None:
    file = tmp_path / "doctor.json"
    karat_done("doctor", str(recipe), *SMALL, *QUICK, f"run.dir={tmp_path / 'run'}", "--seconds=0.5", f"--json={file}")
    report = json.loads(file.read_text())
    assert report["storage"] is None
    assert report["data_images_per_second"] > 0
