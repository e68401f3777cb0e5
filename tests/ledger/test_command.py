"""`karat ledger` takes in what a run's own files say, and nothing that they do not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from karat_scale.cli import main
from karat_scale.recipe.loading import dump_recipe, load_recipe
from tests.conftest import SMALL, karat, summary

QUICK = ("train.epochs=1", "schedule.warmup_epochs=0", "checkpoint.every_minutes=null", "run.seed=3")


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps over 64 images."""
    root = tmp_path_factory.mktemp("ledger")
    recipe = root / "owls.yaml"
    recipe.write_text(f"data: {{path: {shards}}}\n")
    done = karat("train", str(recipe), *SMALL, *QUICK, f"run.dir={root / 'run'}")
    assert done.returncode == 0, done.stderr
    return root / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """Of a finished run, what the ledger reads."""
    copy = tmp_path / "run"
    copy.mkdir()
    for name in ("recipe.yaml", "metrics.jsonl", "summary.json"):
        shutil.copy(trained / name, copy)
    return copy


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    (tmp_path / "docs" / "ledger").mkdir(parents=True)
    return tmp_path / "docs"


@pytest.fixture
def ledger(docs: Path) -> Callable[..., int]:
    return lambda *runs: main(["ledger", *map(str, runs), "--docs", str(docs)])


def change(run: Path, **fields: Any) -> None:
    """Set fields of a summary, or with None remove them."""
    changed = {**summary(run), **fields}
    (run / "summary.json").write_text(json.dumps({key: x for key, x in changed.items() if x is not None}))


def rows(docs: Path, cell: str) -> list[str]:
    return [line for line in (docs / "reproduction.md").read_text().splitlines() if f"| {cell} |" in line]


def test_another_recipes_run_is_told_from_the_papers(run: Path, docs: Path, ledger: Callable[..., int], capsys) -> None:
    assert ledger(run) == 0
    (file,) = (docs / "ledger").iterdir()
    assert file.name.startswith("owls-seed3-")
    kept = json.loads(file.read_text())
    assert kept["summary"] == summary(run)
    assert (kept["epoch_images"], kept["eval_images"], kept["eval_weights"]) == (64, 28, "ema")
    assert str(run.parent.parent) not in file.read_text()
    (row,) = rows(docs, "owls")
    top1, top5 = summary(run)["last_top1"], summary(run)["last_top5"]
    assert f"[{top1:.2f} / {top5:.2f}](ledger/{file.name})" in row
    assert f"| 3 | `{kept['recipe_sha256'][:12]}` |" in row
    assert "1 x 64 images" in row
    assert f"{summary(run)['processor']}, 1 threads" in row
    assert ledger(run) == 2
    assert "is in the ledger already, as" in capsys.readouterr().err
    before = (docs / "reproduction.md").read_text()
    assert ledger() == 0  # writes the page anew
    assert (docs / "reproduction.md").read_text() == before


def test_a_run_of_the_papers_recipe_is_its_row_and_called_short(
    run: Path, docs: Path, ledger: Callable[..., int]
) -> None:
    batch = ("train.global_batch=8", "data.path=/somewhere/cifar10", "train.epochs=1", "schedule.warmup_epochs=0")
    recipe = load_recipe("cifar10_vit_tiny_g3b", [*batch, "run.seed=3", f"run.dir={run}"])
    (run / "recipe.yaml").write_text(dump_recipe(recipe))
    assert ledger(run) == 0
    assert "not yet run" in rows(docs, "ViT-Tiny + G3B")[1]  # batches of 8 are not the paper's
    recipe = load_recipe("cifar10_vit_tiny_g3b", [*batch[1:], "run.seed=3", f"run.dir={run}"])
    (run / "recipe.yaml").write_text(dump_recipe(recipe))
    assert ledger(run) == 0
    row = rows(docs, "ViT-Tiny + G3B")[1]
    assert "| 76.69 / 98.57 | *short:* [" in row
    assert "train.epochs=1" in row
    assert "*short:*" in rows(docs, "ViT-Tiny + G3B, zero")[0]
    assert "not yet run" in rows(docs, "ViT-Tiny + G3B, gelu")[0]
    change(run, samples=100 * 49_984, train_images=50_000)
    metrics = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(metrics.replace('"samples": 64,', f'"samples": {100 * 49_984},'))
    recipe = load_recipe("cifar10_vit_tiny_g3b", ["data.path=/somewhere", "run.seed=4", f"run.dir={run}"])
    (run / "recipe.yaml").write_text(dump_recipe(recipe))
    assert ledger(run) == 0
    assert any("short" not in row and "| 4 |" in row for row in rows(docs, "ViT-Tiny + G3B"))


def test_a_run_from_before_the_summary_had_its_images_is_taken_in(
    run: Path, docs: Path, ledger: Callable[..., int]
) -> None:
    change(run, train_images=None, processor=None, versions=None, seed=None)
    assert ledger(run) == 0
    (row,) = rows(docs, "owls")
    assert "1 x 64 images" in row
    assert "CPU, 1 threads" in row


def test_what_cannot_be_taken_in_is_one_line(run: Path, docs: Path, ledger: Callable[..., int], capsys) -> None:
    good = {name: (run / name).read_text() for name in ("recipe.yaml", "metrics.jsonl", "summary.json")}

    def refused(message: str) -> None:
        assert ledger(run) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1
        assert not (docs / "reproduction.md").exists()
        for name, text in good.items():
            (run / name).write_text(text)

    change(run, exit=75, reason="stopped by SIGTERM")
    refused("has not finished (stopped by SIGTERM); finish it first")
    (run / "summary.json").unlink()
    refused("has no summary.json, so it has not finished")
    (run / "summary.json").write_text(good["summary.json"][:40])
    refused("summary.json: damaged, it is not JSON")
    change(run, last_top1=99.9)
    refused("summary.json has last_top1 = 99.9, and the last evaluation in metrics.jsonl top1 = ")
    (run / "metrics.jsonl").write_text(good["metrics.jsonl"] + '{"event": "tra')
    refused("metrics.jsonl, line ")
    (run / "metrics.jsonl").unlink()
    refused("metrics.jsonl is missing")
    (run / "metrics.jsonl").write_text("")
    refused("was never evaluated")
    (run / "recipe.yaml").unlink()
    refused("not a run directory")
    assert main(["ledger", "--docs", str(run)]) == 2
    assert "has no folder `ledger`" in capsys.readouterr().err


@pytest.mark.parametrize("field", ["summary", "recipe", "sha256"])
def test_a_record_that_someone_changed_is_refused(
    run: Path, docs: Path, ledger: Callable[..., int], capsys, field: str
) -> None:
    assert ledger(run) == 0
    (file,) = (docs / "ledger").iterdir()
    kept = json.loads(file.read_text())
    changes: dict[str, Any] = {
        "summary": {**kept["summary"], "last_top1": 99.9},
        "recipe": kept["recipe"].replace("epochs: 1", "epochs: 9"),
        "sha256": None,
    }
    file.write_text(json.dumps({**kept, field: changes[field]}))
    assert ledger() == 2
    assert f"{file}: was changed since karat ledger wrote it" in capsys.readouterr().err
    file.write_text("{}")
    assert ledger() == 2
    assert "not a record of karat ledger" in capsys.readouterr().err
