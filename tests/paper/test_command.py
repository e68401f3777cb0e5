"""`python -m paper` takes in what a run's own files say, and nothing that they do not."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from timm.data import ImageNetInfo
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

from karat_scale.commands.cli import main
from karat_scale.data.batch import classes_digest
from karat_scale.data.prepare.sources.small import DIGITS
from karat_scale.foundation.errors import UserError
from karat_scale.foundation.files import sealed
from karat_scale.recipe.loading import load_recipe
from paper.__main__ import keep_ledger
from tests.conftest import TrainOnce, events, summary
from tests.paper.runs import DATA_SETS, change, copy_run, pretend, rows

QUICK = ("train.epochs=1", "schedule.warmup_epochs=0", "checkpoint.every_minutes=null", "run.seed=3")


@pytest.fixture(scope="session")
def trained(shards: Path, train_once: TrainOnce) -> Path:
    """Return a run of 8 steps over 64 images."""
    return train_once("ledger", f"path: {shards}", *QUICK)


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """Return a copy of what the ledger reads of a finished run."""
    return copy_run(trained, tmp_path / "run")


def test_another_recipes_run_is_told_from_the_papers(run: Path, docs: Path, ledger: Callable[..., int], capsys) -> None:
    assert ledger(run) == 0
    (file,) = (docs / "ledger").iterdir()
    assert file.name.startswith("owls-seed3-")
    kept = json.loads(file.read_text())
    assert kept["summary"] == summary(run)
    assert (kept["epoch_images"], kept["eval_images"], kept["eval_weights"]) == (64, 28, "ema")
    assert str(run.parent.parent) not in file.read_text()
    (row,) = rows(docs, "|owls")
    top1, top5 = summary(run)["last_top1"], summary(run)["last_top5"]
    assert f"[{top1:.2f}/{top5:.2f}](ledger/{file.name})" in row
    assert f"|3|`{kept['recipe_sha256'][:12]}`|" in row
    assert "1 x 64 images" in row
    assert ledger(run) == 2
    assert "is in the ledger already, as" in capsys.readouterr().err
    before = (docs / "reproduction.md").read_text()
    assert ledger() == 0  # writes the page again
    assert (docs / "reproduction.md").read_text() == before


def test_a_run_of_the_papers_recipe_is_its_row_and_its_budget_is_marked(run, docs, ledger) -> None:
    short = ("train.epochs=1", "schedule.warmup_epochs=0", "run.seed=3")
    pretend(run, "cifar10_vit_tiny_g3b", "cifar10", 20_000, *short, "train.global_batch=8")
    assert ledger(run) == 0
    assert not rows(docs, "CIFAR-10: ViT-Tiny+G3B")  # batches of 8 are not the paper's
    pretend(run, "cifar10_vit_tiny_g3b", "cifar10", 20_000, *short)
    assert ledger(run) == 0
    (row,) = rows(docs, "CIFAR-10: ViT-Tiny+G3B")
    assert "|76.69/98.57|*short:* [" in row
    assert "train.epochs=1" in row
    assert not rows(docs, "CIFAR-10: ViT-Tiny+G3B, gelu")
    for epochs, seed, mark in ((100, 4, ""), (101, 5, "*long:* ")):
        pretend(run, "cifar10_vit_tiny_g3b", "cifar10", 50_000, f"train.epochs={epochs}", f"run.seed={seed}")
        assert ledger(run) == 0
        (row,) = (row for row in rows(docs, "CIFAR-10: ViT-Tiny+G3B") if f"|{seed}|" in row)
        assert f"|76.69/98.57|{mark}[" in row


def test_runs_that_differ_in_their_seed_have_a_mean(run: Path, docs: Path, ledger: Callable[..., int]) -> None:
    lines = events(run)
    for seed, top1 in enumerate((70.0, 74.0)):
        for event in lines:
            event |= {"top1": top1, "top5": 98.0} if event["event"] == "eval" else {}
        (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in lines))
        pretend(run, "cifar10_vit_tiny", "cifar10", 50_000, f"run.seed={seed}", last_top1=top1, last_top5=98.0)
        assert ledger(run) == 0
    pretend(run, "cifar10_vit_tiny", "cifar10", 50_000, "run.seed=2", "train.epochs=50", last_top1=74.0, last_top5=98.0)
    assert ledger(run) == 0
    both, short = rows(docs, "CIFAR-10: ViT-Tiny")
    assert "|**72.00 ± 2.83/98.00 ± 0.00**: [70.00/98.00](" in both
    assert ", [74.00/98.00](" in both
    assert "|0, 1|" in both
    assert "`karat train cifar10_vit_tiny data.path=DIR`" in both
    assert "*short:*" in short


def test_a_list_of_texts_survives_the_shell_and_half_a_line_is_skipped(run, docs, ledger) -> None:
    pretend(run, "cifar10_vit_tiny", "cifar10", 50_000, "train.freeze='*.head.*'")
    (run / "metrics.jsonl").write_text('{"event": "tra\n' + (run / "metrics.jsonl").read_text())
    assert ledger(run) == 0
    (row,) = rows(docs, "|cifar10_vit_tiny")
    (command,) = re.findall(r"`(karat train [^`]*)`", row)
    overrides = shlex.split(command)[3:-1]
    assert load_recipe("cifar10_vit_tiny", overrides).train.freeze == load_recipe(run / "recipe.yaml").train.freeze


def test_a_seed_counts_once_and_the_mean_of_short_runs_is_marked(run, docs, ledger, capsys) -> None:
    for seed in (0, 1):
        pretend(run, "cifar10_vit_tiny", "cifar10", 50_000, f"run.seed={seed}", "train.epochs=50")
        assert ledger(run) == 0
    assert "|*short:* **" in rows(docs, "CIFAR-10: ViT-Tiny")[0]
    before = (docs / "reproduction.md").read_text()
    kept = sorted((docs / "ledger").iterdir())
    pretend(run, "cifar10_vit_tiny", "cifar10", 50_000, "run.seed=0", "train.epochs=50", "data.workers=8")
    assert ledger(run) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{docs / 'ledger'}: {kept[0].stem} and cifar10_vit_tiny-seed0-" in line
    assert "train the same with run.seed = 0, which their mean would count twice; leave one of them out" in line
    assert (sorted((docs / "ledger").iterdir()), (docs / "reproduction.md").read_text()) == (kept, before)


def test_a_run_on_other_data_is_no_row_of_the_papers(run: Path, docs: Path, ledger: Callable[..., int]) -> None:
    # SVHN has ten classes, too.
    for seed, (data, images) in enumerate((("svhn", 50_000), ("cifar10", 73_257))):
        pretend(run, "cifar10_vit_tiny", data, images, f"run.seed={seed}")
        assert ledger(run) == 0
        assert not rows(docs, "CIFAR-10: ViT-Tiny")
        assert len(rows(docs, "|cifar10_vit_tiny")) == seed + 1


@pytest.mark.slow
def test_a_row_wants_weights_of_the_run_that_it_names(run: Path, docs: Path, ledger: Callable[..., int]) -> None:
    tuned = ("svhn_vit_tiny", "svhn", 73_257, "init_from=elsewhere/imagenet_vit_tiny")
    transferred = ("cifar10_vit_tiny_transfer", "cifar10", 50_000, "attention.transfer_from=runs/mine")
    for (recipe, data, images, source), key, ancestor in (
        (tuned, "init_from", "imagenet_vit_tiny"),
        (transferred, "attention.transfer_from", "cifar10_vit_tiny_g3b"),
    ):
        for seed, lineage in enumerate(({}, {key: {"name": "mine"}}, {key: {"name": ancestor}})):
            pretend(run, recipe, data, images, source, f"run.seed={seed}", lineage=lineage)
            assert ledger(run) == 0
        page = (docs / "reproduction.md").read_text()
        repeats = {
            seed: ": ViT-Tiny" in line
            for line in page.splitlines()
            for seed in range(3)
            if f"{recipe}-seed{seed}-" in line
        }
        assert repeats == {0: False, 1: False, 2: True}


def test_the_data_sets_are_told_by_the_classes_that_data_prep_names() -> None:
    wnids = ImageNetInfo("imagenet-1k").label_names()
    cifar10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    coco = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    objects = [name for name in coco if name not in ("__background__", "N/A")]  # in place of ids that COCO leaves out
    for data, names in (("svhn", DIGITS), ("imagenet", wnids), ("cifar10", cifar10), ("coco", objects)):
        known = DATA_SETS[data]
        assert (known.classes, known.classes_sha256) == (len(names), classes_digest(names))


def test_an_edit_of_one_file_is_noticed(run: Path, docs: Path, ledger: Callable[..., int], capsys) -> None:
    said = summary(run)
    edits = [json.dumps({**said, field: 9}) for field in sorted(said.keys() - {"exit"})]
    recipe = (run / "recipe.yaml").read_text()
    edited = [recipe.replace(old, new, 1) for old, new in (("seed: 3", "seed: 4"), ("lr: 0.0005", "lr: 0.001"))]
    for file, contents in (("summary.json", edits), ("recipe.yaml", edited)):
        kept = (run / file).read_text()
        for content in contents:
            assert content != kept
            (run / file).write_text(content)
            assert ledger(run) == 2, content
            (error,) = capsys.readouterr().err.splitlines()
            assert "put back the files that the run wrote" in error or ": damaged: " in error
        (run / file).write_text(kept)
    assert ledger(run) == 0


def remove(name: str) -> Callable[[Path], None]:
    return lambda run: (run / name).unlink()


def write(name: str, content: Callable[[str], str]) -> Callable[[Path], None]:
    """Return a harm that replaces a file of the run by what `content` makes of it."""
    return lambda run: (run / name).write_text(content((run / name).read_text()))


def not_utf8(run: Path) -> None:
    (run / "metrics.jsonl").write_bytes(b"\xff" + (run / "metrics.jsonl").read_bytes())


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (
            lambda run: change(run, exit=75, reason="stopped by SIGTERM"),
            "has not finished (stopped by SIGTERM); finish",
        ),
        (remove("summary.json"), "has no summary.json, so it has not finished"),
        (write("summary.json", lambda text: text[:40]), "summary.json: damaged, it is not a JSON object"),
        (write("summary.json", lambda text: "[]"), "summary.json: damaged, it is not a JSON object"),
        (lambda run: change(run, device=None), "summary.json: damaged: device: is missing"),
        (lambda run: change(run, train_images=None), "summary.json: has no train_images; train the run again"),
        (lambda run: change(run, train_images=0), "summary.json: damaged: train_images = '0'"),
        (lambda run: change(run, last_top1=99.9), "has last_top1 = 99.9, but the last evaluation in metrics.jsonl "),
        (write("metrics.jsonl", lambda text: text + '{"step": 3}\n'), "metrics.jsonl, line "),
        (not_utf8, "metrics.jsonl: damaged, it is not UTF-8"),
        (write("metrics.jsonl", lambda text: text.replace('"top1"', '"top"')), ": damaged: top1: is missing"),
        (remove("metrics.jsonl"), "metrics.jsonl is missing"),
        (write("metrics.jsonl", lambda text: ""), "was never evaluated"),
        (remove("recipe.yaml"), "not a run directory"),
    ],
)
def test_what_cannot_be_taken_in_is_one_line(run, docs, ledger, capsys, harm, message) -> None:
    harm(run)
    assert ledger(run) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (docs / "reproduction.md").exists()


def test_a_folder_without_a_ledger_is_refused(run: Path) -> None:
    with pytest.raises(UserError, match="has no folder `ledger`"):
        keep_ledger([], str(run))


def test_a_record_that_someone_changed_is_refused(run, docs, ledger, capsys) -> None:
    assert ledger(run) == 0
    (file,) = (docs / "ledger").iterdir()
    kept = json.loads(file.read_text())
    for edit in (
        {"summary": {**kept["summary"], "last_top1": 99.9}},
        {"recipe": kept["recipe"].replace("epochs: 1", "epochs: 9")},
        sealed({**kept, "recipe": kept["recipe"].replace("epochs: 1", "epochs: 9")}),
        {"sha256": None},
    ):
        file.write_text(json.dumps({**kept, **edit}))
        assert ledger() == 2
        assert f"{file}: was changed since it was written" in capsys.readouterr().err
    file.write_text("{}")
    assert ledger() == 2
    assert "not a record of the ledger: summary: is missing; put it back or remove it" in capsys.readouterr().err


def test_results_on_other_test_sets_are_taken_without_paths(run, docs, ledger, trained, image_folder) -> None:
    assert main(["eval", str(trained), "--on", str(image_folder), "--name", "owls-v2"]) == 0
    shutil.copytree(trained / "evaluations", run / "evaluations")
    shutil.rmtree(trained / "evaluations")
    assert ledger(run) == 0
    (record,) = (docs / "ledger").glob("*.json")
    (kept,) = json.loads(record.read_text())["evaluations"]
    assert kept["images"] == 28
    assert str(image_folder) not in record.read_text()
    page = (docs / "reproduction.md").read_text()
    assert f"|owls-v2|{kept['top1']:.2f}/{kept['top5']:.2f}|28|4 of 4|" in page
