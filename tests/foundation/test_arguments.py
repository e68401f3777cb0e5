"""Tests of what the project's command lines accept and refuse."""

import functools
import itertools
import os
from argparse import Namespace
from dataclasses import dataclass

import pytest

from karat_scale.commands.cli import build_parser, main
from karat_scale.foundation.arguments import OneLineParser, call

Capture = pytest.CaptureFixture[str]
COMMANDS = ("train", "eval", "detect", "plan", "submit", "doctor")
OPTION = {
    "train": ["--print"],
    "eval": ["--checkpoint", "latest"],
    "detect": ["--print"],
    "plan": ["--gpus", "4"],
    "submit": ["--nodes", "2"],
    "doctor": ["--seconds", "3"],
}


parser = functools.cache(build_parser)


def refusal(capsys: Capture, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(arguments)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("command", COMMANDS)
def test_overrides_stand_before_after_and_between_options(command) -> None:
    option = OPTION[command]
    for line in (["r", "a=1", *option, "b=2"], ["r", *option, "a=1", "b=2"], [*option, "r", "a=1", "b=2"]):
        read = parser().parse_args([command, *line])
        assert read.overrides == ["a=1", "b=2"]
    assert parser().parse_args([command, "r", *option]).overrides == []


def test_an_option_between_overrides_keeps_its_value_and_those_of_a_bench_stand_after_options() -> None:
    read = parser().parse_args(["bench", "resume", "r", "--rounds", "2", "a=1"])
    assert (read.recipe, read.rounds, read.overrides) == ("r", 2, ["a=1"])
    read = parser().parse_args(["plan", "r", "a=1", "--json=x.json", "b=2", "--curve", "c=3"])
    assert (read.json_file, read.with_curve, read.overrides) == ("x.json", True, ["a=1", "b=2", "c=3"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown value 'trian'; did you mean train?"),
        (["xyz"], "choose from prepare, "),
        (["stop"], "choose from prepare, "),
        (["eval", "r", "--wights", "x"], "unknown option --wights; did you mean --weights?"),
        (["eval", "r", "--run", "x"], "unknown option --run; a recipe's key is written key=value"),
        (["resume", "r"], "run the same karat train command again, and it resumes"),
        (["photos.yaml"], "unknown value 'photos.yaml'; did you mean karat train photos.yaml?"),
        (["bench", "stpe"], "unknown value 'stpe'; did you mean step?"),
        (["eval", "r", "--weights", "eam"], "--weights: unknown value 'eam'; did you mean ema?"),
        (["eval", "r", "--weights", "last"], "--weights: unknown value 'last'; choose from auto, raw, ema"),
        (["track", "r", "--to", "tb"], "unknown tracker 'tb'; choose from tensorboard, "),
        (["bench", "attention", "--device", "gpu"], "--device: unknown value 'gpu'; did you mean cuda?"),
        (["train"], "RECIPE is missing: a shipped recipe's name, which `karat recipes` lists, or a YAML file ("),
        (["fetch"], "URL is missing: the run's checkpoint.url (karat fetch"),
        (["prepare"], "script is missing: choose from webdataset, ffcv, "),
        (["completion"], "shell is missing: choose from bash, zsh, fish ("),
        (["bench"], "BENCH is missing: choose from step, "),
        (
            ["eval", "r", "--foo", "a=1"],
            "unknown option --foo; a recipe's key is written key=value, and `karat explain` lists the sections (karat",
        ),
        (["train", "r", "--lr", "1"], "unknown option --lr; write optim.lr=VALUE (karat train"),
        (["train", "r", "--batch-size=8"], "; write train.global_batch=VALUE or train.micro_batch=VALUE ("),
        (["train", "r", "--num_gpus", "2"], "unknown option --num_gpus; `karat launch --ranks N` sets the number"),
        (["train", "r", "--nodes", "2"], "unknown option --nodes; `karat submit --nodes=N` sets the number of nodes"),
        (["train", "r", "--print", "optim.lr", "=", "1"], "'optim.lr'; overrides are key=value, without blanks ("),
        (
            ["train", "r", "--dry-run"],
            "unknown option --dry-run; use karat plan RECIPE --dry-run, or the option",
        ),
        (["eval", "r", "--checkpoint", "latest", "extra"], "unexpected argument 'extra'; overrides are key=value"),
        (["analyze", "r", "--out", "o", "a=1"], "unexpected argument 'a=1' (karat analyze"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, capsys) -> None:
    assert message in refusal(capsys, *arguments)


MEASURES = ("plan r --memory", "plan r --step-time", "analyze r --range", "doctor --seconds")
COUNTS = (
    *("plan r --gpus", "plan r --gpus-per-node", "submit r --nodes", "submit r --cpus-per-task", "bench data --images"),
    *("analyze r --images", "analyze r --samples", "analyze r --batch", "bench step --rounds"),
    "bench attention --tokens",
)


def test_a_measure_is_finite_and_above_zero_and_a_count_is_one_or_more(capsys) -> None:
    for options, values, wanted in (
        (MEASURES, ("nan", "inf", "0", "-3", "much", "1e300"), "a number above 0 and up to 1,000,000,000"),
        (COUNTS, ("0", "-1", "1.5"), "an integer of at least 1"),
    ):
        for option, value in itertools.product(options, values):
            line = refusal(capsys, *option.split(), value)
            assert f"{option.split()[-1]}: {value!r} is not {wanted}" in line
    assert parser().parse_args(["submit", "r", "--gpus-per-node=0"]).gpus_per_node == 0
    assert parser().parse_args(["bench", "data", "--workers=0"]).workers == 0
    assert "at least 0" in refusal(capsys, "submit", "r", "--gpus-per-node=-4")
    assert "at least 2" in refusal(capsys, "analyze", "r", "--grid=1")


@pytest.mark.parametrize("command", [["plan", "r"], ["eval", "r"], ["detect", "r"], ["doctor"], ["bench", "step"]])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(command, tmp_path, capsys) -> None:
    nowhere = tmp_path / "nowhere" / "x.json"
    assert f"--json: '{nowhere}': its directory does not exist" in refusal(capsys, *command, "--json", str(nowhere))
    assert "is a directory" in refusal(capsys, *command, "--json", str(tmp_path))
    options = vars(parser().parse_args([*command, "--json", str(tmp_path / "x.json")]))
    assert str(tmp_path / "x.json") in options.values()


def test_a_directory_that_is_not_writable_is_refused_but_standard_output_is_not(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # as for a user who is not root
    assert "not writable" in refusal(capsys, "plan", "r", "--json", str(tmp_path / "x.json"))
    for file in ("/dev/stdout", "/dev/null"):
        assert file in vars(parser().parse_args(["plan", "r", "--json", file])).values()


def test_a_time_limit_is_any_that_sbatch_takes(capsys) -> None:
    for time in ("90", "90:00", "12:00:00", "1-12", "1-12:30", "1-12:30:00", "UNLIMITED"):
        assert parser().parse_args(["submit", "r", "--time", time]).time == time
    for time in ("abc", "1h", "1-", "-5", "1:2:3:4", "1.5", ""):
        assert f"--time: {time!r} is not a time limit of sbatch" in refusal(capsys, "submit", "r", f"--time={time}")


def test_a_virtual_environment_is_there_and_named_from_the_root(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "--venv: 'own' is not a virtual environment" in refusal(capsys, "submit", "r", "--venv=own")
    (tmp_path / "own" / "bin").mkdir(parents=True)
    (tmp_path / "own" / "bin" / "activate").touch()
    assert parser().parse_args(["submit", "r", "--venv=own"]).venv == str(tmp_path / "own")


def test_a_parser_without_overrides_takes_none(capsys) -> None:
    with pytest.raises(SystemExit):
        OneLineParser(prog="script").parse_args(["a=1"])
    assert capsys.readouterr().err == "error: unexpected argument 'a=1' (script --help lists the options)\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["detect", "r", "--json", "x.json"], "--json has no effect without --eval"),
        (["detect", "r", "--checkpoint", "latest"], "--checkpoint has no effect without --eval"),
        (["plan", "r", "--dry-run", "--json", "x.json"], "--dry-run makes no plan, so --json has nothing to write"),
        (["export", "{run}", "--private"], "--private has no effect without --push"),
        (["doctor", "--seconds", "3"], "--seconds is the length of a recipe's timed run; name a RECIPE"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_an_option_without_effect_is_refused(arguments, said, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r").write_text("data: {path: x}\nmodel: {patch_size: 16}\n")
    assert main([part.format(run=tmp_path) for part in arguments]) == 2
    assert said in capsys.readouterr().err


@dataclass(frozen=True)
class Size:
    images: int
    block: int = 3


def test_a_command_gets_the_options_that_its_parameters_name() -> None:
    def command(run_dir: str, size: Size, world: int = 1) -> tuple[str, Size, int]:
        return run_dir, size, world

    assert call(command, Namespace(run_dir="r", images=5, other=9)) == ("r", Size(5), 1)
    assert call(command, Namespace(run_dir="r", images=5, block=0, world=2)) == ("r", Size(5, 0), 2)


def test_options_are_not_abbreviated(capsys) -> None:
    line = refusal(capsys, "submit", "imagenet_vit_tiny", "--gpus", "8")
    assert "unknown option --gpus; use karat launch --ranks N COMMAND ..., or --gpus-per-node N of karat submit" in line
