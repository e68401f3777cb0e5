"""`karat recipes` and `karat explain`."""

import json
import re
from pathlib import Path

import pytest
import yaml

from karat_scale.commands.cli import main
from karat_scale.foundation.errors import RecipeError
from karat_scale.models.factory import outline
from karat_scale.recipe.catalog import catalog
from karat_scale.recipe.files import COMMANDS, shipped_recipes
from karat_scale.recipe.loading import load_recipe, schema_keys
from karat_scale.recipe.synonyms import SYNONYMS
from tests.conftest import ROOT

FOLDERS = {command: folder for folder, command in COMMANDS.items()}


def test_every_shipped_recipe_says_what_it_trains_and_what_it_gave():
    for entry in catalog():
        assert len(entry.trains) > 20, entry.name
        assert entry.result, entry.name
        assert entry.header.count("\n\n") >= len(shipped_recipes(FOLDERS[entry.command])[entry.name].files) - 1
    by_name = {entry.name: entry for entry in catalog()}
    assert by_name["fashion_mnist_demo"].result.startswith("84.96 % top-1")
    assert by_name["imagenet_vit_tiny"].result == "not yet run"
    assert "72.76 / 98.14 %" in by_name["cifar10_vit_tiny"].paper


def test_the_results_of_the_tables_belong_to_recipes() -> None:
    names = {entry.name for entry in catalog()}
    for result in ("paper.yaml", "ours.yaml"):
        text = (ROOT / "paper" / result).read_text()
        named = re.findall(r"recipe: (\w+)", text) or yaml.safe_load(text)
        assert named
        assert set(named) <= names


def test_the_list_fits_a_terminal_of_100_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 70
    assert max(map(len, lines)) <= 100


def test_the_list_says_what_names_are_made_of(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "fashion"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("\n1 recipe. ")
    assert "A name is DATA_MODEL." in said
    assert "g3b is Fourier-KArAt with grid 3" in said


def test_words_filter_the_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "list.json"
    assert main(["recipes", "ImageNet", "swin", "--json", str(file)]) == 0
    assert {one["name"] for one in json.loads(file.read_text())} == {"imagenet_swin_tiny", "imagenet_swin_tiny_g3b"}
    assert "imagenet_swin_tiny_g3b" in capsys.readouterr().out
    assert main(["recipes", "cifar100", "swin"]) == 0
    assert "cifar100_swin_tiny_g3b " in capsys.readouterr().out
    assert main(["recipes", "detect", "--json", str(file)]) == 0
    assert {one["command"] for one in json.loads(file.read_text())} == {"detect"}
    assert main(["recipes", "enlarged", "--json", str(file)]) == 0
    assert len(json.loads(file.read_text())) > 20
    for word, data in {"cifar10": {"cifar10"}, "cifar1": {"cifar10", "cifar100"}}.items():
        assert main(["recipes", word, "--json", str(file)]) == 0
        assert {one["name"].partition("_")[0] for one in json.loads(file.read_text())} == data


def test_what_cannot_be_trained_is_not_listed() -> None:
    left_out = set(shipped_recipes()) - {entry.name for entry in catalog()}
    assert len(left_out) == 48
    for name in ("imagenet_swin_tiny_g3u", "imagenet_swin_tiny_transfer", "imagenet_convit_tiny_transfer"):
        assert name in left_out
        with pytest.raises(RecipeError, match=r"cannot share functions|only between plain ViTs"):
            outline(load_recipe(name, ["data.path=images"]))


def test_a_name_shows_how_to_start_it_and_the_run_that_it_starts_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "svhn_vit_tiny_g3b"]) == 0
    first, then = capsys.readouterr().out.splitlines()[-2:]
    assert first.startswith("karat train imagenet_vit_tiny_g3b data.path=DIR")
    assert then.startswith("karat train svhn_vit_tiny_g3b data.path=DIR")
    assert main(["recipes", "imagenet_vit_small"]) == 0
    out = capsys.readouterr().out
    assert "karat train imagenet_vit_small data.path=DIR" in out
    assert "imagenet_vit_small_g3b" not in out


def test_a_base_that_was_not_run_is_listed_and_what_adds_words_to_one_is_counted(capsys) -> None:
    listed = {}
    for words in ("imagenet small", "bv", "bv g3b"):
        assert main(["recipes", *words.split()]) == 0
        listed[words] = capsys.readouterr().out
    assert "imagenet_vit_small_bv " in listed["imagenet small"]
    assert "imagenet_vit_small_converted_g3b " in listed["imagenet small"]
    assert listed["bv"].startswith("\n6 recipes. ")
    assert "Not listed: 66 recipes with an _ATTENTION" in listed["bv"]
    assert "imagenet_vit_small_bv_g3b " in listed["bv g3b"]


def in_a_file_and_on_a_terminal(columns, capsys, monkeypatch, *arguments: str) -> tuple[str, str]:
    """Return what a command prints in a file and on a terminal; assert that the words are the same."""
    assert main([*arguments]) == 0
    plain = capsys.readouterr().out
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main([*arguments]) == 0
    wrapped = capsys.readouterr().out
    assert wrapped.split() == plain.split()
    return plain, wrapped


def test_what_a_recipe_trains_is_wrapped_on_a_terminal_and_our_result_begins_with_it(capsys, monkeypatch) -> None:
    assert main(["recipes", "fashion_mnist_demo"]) == 0
    assert "\nour result: 84.96 % top-1: 99.63 % top-5, after one pass" in capsys.readouterr().out
    plain, wrapped = in_a_file_and_on_a_terminal(60, capsys, monkeypatch, "recipes", "imagenet_vit_small_bv")
    assert max(map(len, plain.splitlines())) > 100
    assert max(map(len, wrapped.splitlines()[:-1])) <= 60
    assert "\n    16, and shifts and turns without interpolation; its\n    Contrast blends with" in wrapped


def test_keys_are_explained_and_what_does_not_exist_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in {
        "recipes imagenet_vit_tinny": "did you mean imagenet_vit_tiny or ",
        "recipes imagnet": "did you mean imagenet or imagenet_vit_base or imagenet_vit_tiny?",
        "recipes imagenet swinn": "did you mean swin_tiny?",
        "recipes zzz": "`karat recipes` lists all",
        "recipes vit large": "karat recipes vit large: no shipped recipe has these words",  # CIFAR's are enlarged
        "recipes imagenet_swin_tiny_g3u": "did you mean imagenet_swin_tiny_g3b",
        "explain foo_bar_x": "no such key",
        "explain detector.windw": "did you mean detector.window?",
        "explain optim.lrr": "did you mean optim.lr?",
        "explain lrr": "did you mean optim.lr?",
        "explain optim.foo": "no such key; `karat explain optim` lists its keys",
        "explain nonsense": "no such key; `karat explain` lists the sections",
    }.items():
        assert main(arguments.split()) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
    for keys, texts in {
        "optim.lr": ["optim.lr: number > 0", "default 0.0005", "only if resume.allow names the key"],
        "lr": ["lr is optim.lr here", "optim.lr: number"],
        "LR": ["LR is optim.lr here", "optim.lr: number"],
        "ZeRO": ["ZeRO is deepspeed.config here"],
        "warmup": ["warmup is schedule.warmup_epochs or schedule.warmup_steps here"],
        "detector.window": ["detector.window: integer"],
        "train.global_batch": ["train.global_batch: integer", "cannot resume with another value"],
        "train.epochs": ["A finished run resumes with a larger value"],
        "batch_size": ["batch_size is train.global_batch or train.micro_batch here", "train.micro_batch: integer"],
        "train.recompute": ["train.recompute.every", "being kept"],
        "--detection detector.window": ["detector.window: integer", "cannot resume"],
        "train": ["train.epochs", "\n  train.recompute ", "being kept"],
        "": ["\n  init_from ", "train.recompute", "Sections of a recipe"],
    }.items():
        assert main(["explain", *keys.split()]) == 0
        out = capsys.readouterr().out
        assert [text for text in texts if text not in out] == []
        assert "(top)" not in out
    assert main(["explain", "lrr", "lr", "nonsense"]) == 2
    said = capsys.readouterr()
    assert "optim.lr: number" in said.out
    assert [line.partition(": no")[0] for line in said.err.splitlines()] == [
        "error: karat explain lrr",
        "error: karat explain nonsense",
    ]


def test_the_help_of_train_names_what_lists_explains_and_completes(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    for command in ("`karat recipes", "`karat explain KEY`", "`karat completion SHELL`"):
        assert command in out


def test_synonyms_name_keys_that_exist_and_are_no_keys_themselves() -> None:
    keys = set(schema_keys())
    assert {key for meant in SYNONYMS.values() for key in meant} <= keys
    assert not {key.rpartition(".")[2] for key in keys} & SYNONYMS.keys()


def test_a_meaning_is_wrapped_at_words_on_a_terminal_and_one_line_elsewhere(capsys, monkeypatch) -> None:
    plain, wrapped = in_a_file_and_on_a_terminal(50, capsys, monkeypatch, "explain", "optim.lr_batch")
    assert max(map(len, plain.splitlines())) > 50 >= max(map(len, wrapped.splitlines()))
