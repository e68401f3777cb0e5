"""`karat` as a user types it: exit codes, one-line errors, and what it prints."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from karat_scale import __version__
from karat_scale.commands.cli import GROUPS, build_parser
from karat_scale.data.shards.shard_format import DatasetRecord, SplitRecord, write_dataset_record
from karat_scale.recipe.loading import load_recipe
from tests.conftest import (
    events,
    karat_command,
    karat_done,
    karat_environment,
    karat_here,
    karat_refuses,
    karat_says,
    output_of,
    run_to_end,
    summary,
)

Train = Callable[..., "subprocess.CompletedProcess[str]"]


def test_print_shows_the_resolved_recipe_and_nothing_else_and_trains_nothing(recipe_file: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.json"
    own.write_text('{"zero_optimization": {"stage": 1}}')
    # A process of its own: DeepSpeed must not write between the lines when it is imported.
    command = karat_command(["train", str(recipe_file), "optim.lr=0.25", f"deepspeed.config={own}", "--print"])
    recipe = yaml.safe_load(output_of(*command))
    assert (recipe["optim"]["lr"], recipe["deepspeed"]["config"]) == (0.25, str(own))
    assert not (tmp_path / "run").exists()


def test_version_and_help() -> None:
    shown = karat_says("--version") + karat_says("--help")
    assert all(part in shown for part in (__version__, "train", "eval", "bench"))


def test_help_is_a_word_too_and_is_shown_without_any(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ("", "train", "bench gpu"):
        shown = [karat_says(*line.split()) for line in (f"help {words}", f"{words} --help")]
        assert shown[0] == shown[1]
    assert karat_here() == 2
    assert capsys.readouterr() == ("", karat_says("--help"))
    assert "unknown value 'trian'; did you mean train?" in karat_refuses("help", "trian")


def test_help_lists_each_command_once_by_what_a_user_wants() -> None:
    parser = build_parser()
    (commands,) = [action for action in parser._actions if action.dest == "command"]
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(commands.choices)
    lines = parser.format_help().splitlines()
    starts = [line.split()[0] for line in lines if re.match(r"  [a-z]", line)]
    assert starts == grouped
    assert [line[:-1] for line in lines if line.endswith(":")] == [*GROUPS, "options"]
    assert all(own.description for own in commands.choices.values())


def test_all_mistakes_of_a_recipe_are_said_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert karat_here("train", "fashion_mnist_demo", "optim.lrr=1", "train.epochs=x") == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: optim.lrr: unknown key; did you mean optim.lr?",
        "error: train.epochs = 'x': should be a whole number, such as 12 (default: 100)",
    ]


def test_a_mistake_of_the_recipe_is_said_before_one_of_its_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    command = ("train", "fashion_mnist_demo", "data.backend=synthetic", f"run.dir={tmp_path / 'file' / 'run'}")
    assert "choose another run.dir" in karat_refuses(*command)
    assert "model.name = 'resnet18': it has no attention" in karat_refuses(*command, "model.name=resnet18")


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = "('torch', 'timm', 'deepspeed', 'pydantic', 'sklearn', 'matplotlib')"
    code = f"import sys, karat_scale, karat_scale.commands.cli; print([m for m in {heavy} if m in sys.modules])"
    assert output_of(sys.executable, "-c", code) == "[]\n"
    prepare = "from karat_scale.data.prepare import fetch, finished, make_ffcv, make_webdataset"
    assert output_of(sys.executable, "-c", f"import sys; {prepare}; print('torch' in sys.modules)") == "False\n"


def test_what_is_not_there_is_said_before_torch_is_imported(tmp_path: Path) -> None:
    """A command says that something is missing before it imports torch, because that import takes seconds."""
    (tmp_path / "photos" / "train").mkdir(parents=True)
    for image in ("flat/ant/1.jpg", "flat/bee/1.jpg", *(f"one/train/{name}/1.jpg" for name in ("ant", "bee", "cow"))):
        (tmp_path / image).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / image).touch()
    (tmp_path / "shards").mkdir()
    train = SplitRecord(samples=1, bytes=1, shards=[])
    write_dataset_record(tmp_path / "shards", DatasetRecord(classes=["ant", "bee", "cow"], splits={"train": train}))
    classes = (
        "for a folder of classes, run karat prepare webdataset --src flat --out SHARDS --val-fraction 0.1, or move "
    )
    folder = "train fashion_mnist_demo data.backend=folder data.path="
    (tmp_path / "kept" / "checkpoints" / "step-00000002").mkdir(parents=True)
    (tmp_path / "kept" / "recipe.yaml").touch()
    synthetic = "train fashion_mnist_demo data.backend=synthetic data.path="
    source = "neither a run's directory, a checkpoint in one, a file nor timm:NAME; name one"
    refusals = {
        f"{synthetic} init_from=nowhere": f"init_from = nowhere: {source}",
        f"{synthetic} distill.from=nowhere": f"distill.from = nowhere: {source}",
        f"{synthetic} resume.from=photos": "resume.from = photos: neither a run's directory nor a checkpoint in one",
        f"{synthetic} deepspeed.config=zero9": "deepspeed.config = 'zero9': no such file; use one of zero0, ",
        f"{synthetic} attention.kind=softmax attention.transfer_from=nowhere": "attention.transfer_from = nowhere: ",
        "eval kept photos": "unexpected argument 'photos'; karat eval takes one RUN, and overrides are key=value",
        "eval kept data.path=photos optim.lr=3": "optim.lr=3: only training reads optim.lr; remove it from the",
        "eval kept train.epochs=5": "train.epochs=5: only training reads train.epochs; remove it from the evaluation",
        "eval kept train.recompute.policy=all": "train.recompute.policy=all: only training reads train.recompute",
        "detect kept --eval init_from=x": "init_from=x: only training reads init_from; remove it from the evaluation",
        "eval kept --checkpoint foo": "--checkpoint foo: kept/checkpoints has no such checkpoint; name one of best, ",
        "convert kept/checkpoints/step-00000001 fashion_mnist_demo": "SOURCE kept/checkpoints/step-00000001: neither",
        "convert kept/🍎/ fashion_mnist_demo": "SOURCE kept/🍎/: neither",
        "analyze kept --data nowhere": f"--data nowhere is not a directory in {tmp_path}; name shards, betons or a fol",
        "export kept --push owls": "--push owls: should be USER/NAME",
        "detect kept --eval": "karat detect needs pycocotools",
        "fetch somewhere run": "'somewhere' is not a URL; use one that begins with s3:// or gs://",
        "eval nowhere": "nowhere: there is no such directory",
        "export nowhere": "nowhere: there is no such directory",
        "replay nowhere 3": "nowhere: there is no such directory",
        "verify nowhere": "nowhere: there is no such directory",
        "analyze nowhere": "nowhere: there is no such directory; name that of a run",
        "compare nowhere": "nowhere: there is no such directory; name that of a run",
        "predict nowhere a.jpg": "nowhere: neither a run's directory nor a folder of karat export; name one",
        "predict cifar10_karat a.jpg": "a.jpg: no such file; name images, folders or quoted globs",
        "status nowhere": "nowhere: there is no such directory",
        "track nowhere": "nowhere: there is no such directory",
        "detect nowhere": "recipe 'nowhere': neither a file nor a shipped recipe",
        "detect nowhere --eval": "nowhere: there is no such directory",
        "sweep nowhere optim.lr=1,2": "recipe 'nowhere': neither a file nor a shipped recipe",
        "plan fashion_mnist_demo nowhere": "recipe 'nowhere': neither a file nor a shipped recipe",
        "sweep fashion_mnist_demo optim.lr=-1,2": "optim.lr=-1: optim.lr = -1: should be above 0",
        "train data.path=x fashion_mnist_demo": "recipe 'data.path=x': an override; name the recipe before it",
        "doctor nowhere": "recipe 'nowhere': neither a file nor a shipped recipe",
        "launch --ranks 2 train nowhere": "recipe 'nowhere': neither a file nor a shipped recipe",
        "data nowhere": f"nowhere is not a directory in {tmp_path}; name shards, betons or a folder of train/<class>/",
        "train fashion_mnist_demo data.path=nowhere": f"data.path = nowhere is not a directory in {tmp_path}; set "
        "it to a directory made by karat prepare webdataset",
        "show fashion_mnist_demo data.path=photos": "data.path = photos has no dataset.json; make it with karat "
        "prepare webdataset, set data.backend=folder for a folder of images, or correct the path",
        f"{folder}flat": f"flat/train does not exist; the folders there: ant, bee; {classes}the classes into ",
        "train fashion_mnist_demo data.path=flat": f"data.path = flat has no dataset.json; {classes}the classes into ",
        f"{folder}one": "one/val does not exist; the folders there: train; make one by karat prepare webdataset --val",
        f"{folder}one model.num_classes=2": "one/train has 3 classes, but model.num_classes = 2; use other data, or ",
        f"{folder}photos": "photos/train has no class folders; put the images of each class into a folder of their own",
        "train fashion_mnist_demo data.path=shards": "shards has no samples of split 'val'; the splits there: train; ",
        "show fashion_mnist_demo data.path=shards data.val_split=train model.num_classes=2": "shards has 3 classes",
        "prepare webdataset flat out": "flat out: name paths by options: karat prepare webdataset --src flat --out out",
        "prepare verify shards": "shards: name paths by options: karat prepare verify --src shards",
        "train fashion_mnist_demo data.backend=folder data.path=nowhere": "data.path = nowhere is not a directory "
        f"in {tmp_path}; set it to a directory of train/<class>/<image> and val/<class>/<image>",
        "plan fashion_mnist_demo --gpu h1000": "--gpu h1000: not in the table",
        "prepare webdataset --src nowhere --out x": "--src nowhere: there is no such file or directory",
        "launch --ranks 2 train fashion_mnist_demo --bogus": "unknown option --bogus",
    }
    code = (
        "import sys\nfrom karat_scale.commands.cli import main\n"
        "sys.modules['pycocotools.coco'] = None\n"
        "for line in sys.argv[1:]:\n"
        "    try: code = main(line.split())\n"
        "    except SystemExit as error: code = error.code\n"
        "    assert (code, 'torch' in sys.modules) == (2, False), line\n"
        "assert (main('sweep fashion_mnist_demo run.seed=0,1 --print'.split()), 'torch' in sys.modules) == (0, False)\n"
    )
    done = run_to_end(sys.executable, "-c", code, *refusals, cwd=tmp_path)
    lines = done.stderr.splitlines()
    assert len(lines) == len(refusals), done.stderr
    for line, said in zip(lines, refusals.values(), strict=True):
        assert line.startswith(f"error: {said}"), done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_read_enough_is_no_error(unbuffered: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**karat_environment(), "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(
        karat_command(["recipes"]), env=environment, stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_a_closed_output_is_no_error() -> None:
    for closed, code, arguments in ((">&-", 0, ["recipes"]), (">&- 2>&-", 2, ["status", "nowhere"])):
        done = run_to_end("sh", "-c", f'"$@" {closed}', "sh", *karat_command(arguments))
        assert (done.returncode, done.stderr) == (code, "")


def test_what_cannot_be_trained_is_one_line(recipe_file: Path) -> None:
    for override, said in (
        ("model.name=vit_tinny_patch16_224", "vit_tiny_patch16_224"),
        ("data.path=/nowhere", "nowhere"),
        ("model.num_classes=3", "3"),
        ("train.global_batch=128", "train.global_batch"),
        ("deepspeed.config=zero9", "zero0, zero1"),
    ):
        line = karat_refuses("train", str(recipe_file), override)
        assert override.partition("=")[0] in line
        assert said in line


@pytest.mark.multiprocess
def test_a_batch_that_does_not_divide_over_the_ranks_is_refused_by_each(train_recipe: Train) -> None:
    done = train_recipe("train.global_batch=6", processes=2)
    assert done.returncode == 1
    assert "train.global_batch = 6" in done.stderr


def test_training_writes_the_run_directory_users_rely_on_and_eval_repeats_its_figure(train_recipe, tmp_path) -> None:
    done = train_recipe("log.trackers=tensorboard")
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "run"
    assert "finished, best top-1 " in done.stdout
    assert f"; next: karat analyze {run}\n" in done.stdout
    assert load_recipe(run / "recipe.yaml").model.embed_dim == 32
    kinds = [event["event"] for event in events(run)]
    assert (kinds.count("train"), kinds.count("eval"), kinds[-1]) == (16, 2, "end")
    last = events(run, "train")[-1]
    assert {"step", "epoch", "samples", "loss", "lr", "grad_norm", "images_per_second"} <= last.keys()
    assert last["tflops"] > 0
    assert "mfu" not in last  # nobody knows a CPU's peak
    figures = summary(run)
    assert (figures["exit"], figures["steps"], figures["samples"]) == (0, 16, 128)
    assert figures["best_top1"] == max(event["top1"] for event in events(run, "eval"))
    assert figures["last_top5"] == events(run, "eval")[-1]["top5"] == 100.0
    assert figures["images_per_second"] > 0
    assert figures["peak_memory_mb"] > 100
    assert (figures["train_images"], figures["seed"]) == (64, 0)
    assert figures["versions"]["torch"] == torch.__version__
    assert figures["processor"]
    assert list((run / "tensorboard").glob("events*"))
    checkpoints = run / "checkpoints"
    assert (checkpoints / "latest").read_text().strip() == "step-00000016"
    assert (checkpoints / (checkpoints / "best").read_text().strip() / "manifest.json").is_file()
    out, evaluated = tmp_path / "eval.json", events(run, "eval")[-1]
    karat_says("eval", str(run), "--checkpoint", "latest", "--json", str(out))
    found = yaml.safe_load(out.read_text())
    assert found["weights"] == evaluated["weights"] == "ema"
    assert (found["top1"], found["images"]) == (evaluated["top1"], 28)
    assert found["loss"] == pytest.approx(evaluated["loss"], rel=1e-6)
    assert "raw weights" in karat_says("eval", str(run), "--weights", "raw")


def test_threads_and_exit_handlers_have_their_turn_at_the_end() -> None:
    code = (
        "import atexit, threading, time; from karat_scale.commands.cli import entry_point;"
        "atexit.register(print, 'handler');"
        "threading.Thread(target=lambda: (time.sleep(0.2), print('thread'))).start(); entry_point()"
    )
    done = run_to_end(sys.executable, "-c", code, "export", "nowhere")
    assert (done.returncode, done.stdout) == (2, "thread\nhandler\n"), done.stderr


def test_ctrl_c_while_a_command_starts_is_one_line(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "class CtrlC:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch.nn': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, CtrlC())\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # as at a terminal, not in the background
        "from karat_scale.commands.cli import entry_point\n"
        "entry_point()\n"
    )
    options = ("fashion_mnist_demo", "data.backend=synthetic", f"run.dir={tmp_path / 'run'}")
    done = run_to_end(sys.executable, "-c", code, "train", *options)
    assert (done.returncode, done.stderr) == (130, "error: stopped; run the same command again\n")


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_eval_joins_the_shards_of_two_ranks(train_recipe: Train, tmp_path: Path, precision: str) -> None:
    train_recipe("deepspeed.config=zero1", f"train.precision={precision}", processes=2)
    out = tmp_path / "eval.json"
    for processes in (1, 2):
        karat_done("eval", str(tmp_path / "run"), "--checkpoint", "latest", "--json", str(out), processes=processes)
        figures, last = yaml.safe_load(out.read_text()), events(tmp_path / "run", "eval")[-1]
        assert (figures["top1"], figures["images"]) == (last["top1"], 28)
        assert figures["loss"] == pytest.approx(last["loss"], rel=1e-6 if precision == "fp32" else 1e-2)
