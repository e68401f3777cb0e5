"""`karat convert` from end to end: stage 1, what it keeps, kills in both stages, other sources, and the survey."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from karat_scale.data.plan import PADDING
from karat_scale.foundation.errors import UserError
from karat_scale.models import create_model
from karat_scale.recipe import AttentionConfig
from karat_scale.recipe.loading import load_recipe
from karat_scale.training.tasks.classification.conversion import (
    BATCH,
    FILE,
    MEASURED,
    begin_conversion,
    read_report,
    read_survey,
    spread_ids,
    take_original,
)
from tests.conftest import (
    SMALL,
    events,
    karat_done,
    karat_here,
    karat_refuses,
    karat_says,
    make_image_folder,
    summary,
)
from tests.small_engines import equal
from tests.training.runs import assert_a_kill_changes_nothing, kill_all, last_tensors, start_held, stopped_by
from tests.training.test_initial_weights import put_into_cache

QUICK = ("convert.images=24", "convert.steps=8", "convert.rounds=1")
KARAT = ("attention.kind=karat", *QUICK)
Command = Callable[..., list[str]]


@pytest.fixture(scope="module")
def original(command, recipe) -> Path:
    """Return a softmax run of 24 steps."""
    run = recipe.parent / "original"
    assert karat_here(*command(run, "train.epochs=3")) == 0
    return run


@pytest.fixture(scope="module")
def convert(command, original) -> Command:
    """Return a function that gives the arguments of `karat` to convert a source, by default the original."""

    def arguments(run: Path, *overrides: str, source: Path | str = original) -> list[str]:
        _, recipe, *own = command(run, *overrides)
        return ["convert", str(source), recipe, *own]

    return arguments


@pytest.fixture(scope="module")
def converted(convert, recipe) -> Path:
    run = recipe.parent / "converted"
    assert karat_here(*convert(run, *KARAT)) == 0
    return run


def test_the_new_attention_gives_what_the_original_gave_and_then_trains(original, converted) -> None:
    report = read_report(converted)
    assert report == {key: value for key, value in events(converted, "convert")[0].items() if key in report}
    assert report["from"] == str(original)
    assert report["images"] == 24
    for number, block in enumerate(report["blocks"]):
        assert block["block"] == number
        assert all(len(block[stage]) == 2 for stage in ("at_once", "least_squares", "matched"))
        assert sum(block["matched"]) < 0.5 * sum(block["at_once"])
    evaluation = json.loads((original / "checkpoints/step-00000024/state.json").read_text())
    assert report["top1"]["original"] == pytest.approx(evaluation["last_top1"])
    assert [event["step"] for event in events(converted, "train")][-1] == 8
    assert {"label_loss", "teacher_loss"} <= set(events(converted, "train")[0])
    assert set(summary(converted)["lineage"]) == {"init_from", "distill.from"}
    recipe = load_recipe(converted / "recipe.yaml")
    assert (recipe.init_from, recipe.distill.from_) == (str(original), str(original))


def test_a_start_after_stage_1_takes_what_is_there_and_another_recipe_does_not(convert, converted, tmp_path) -> None:
    """A start reuses the file of stage 1 if it is whole and of the same recipe; otherwise it runs stage 1 again."""
    run = tmp_path / "run"
    run.mkdir()
    (run / FILE).write_bytes((converted / FILE).read_bytes())
    says = karat_says(*convert(run, *KARAT, "data.prefetch=2", "data.timeout=99"))  # keys that change nothing
    assert "matching the attention" not in says
    assert equal(last_tensors(run), last_tensors(converted))
    for name, overrides, content in (("other", ("run.seed=1",), run / FILE), ("torn", (), None)):
        again = tmp_path / name
        again.mkdir()
        (again / FILE).write_bytes(content.read_bytes() if content else (run / FILE).read_bytes()[:500])
        assert "matching the attention" in karat_says(*convert(again, *KARAT, *overrides, "train.max_steps=1"))
    assert not equal(load_file(tmp_path / "other" / FILE), load_file(run / FILE))
    assert equal(load_file(tmp_path / "torn" / FILE), load_file(run / FILE))


def test_the_survey_says_what_each_block_costs_and_how_many_pay(convert, original, tmp_path) -> None:
    run = tmp_path / "run"
    says = karat_says(*convert(run, *KARAT, "convert.steps=2"), "--survey")
    found = read_survey(run)
    assert [block["block"] for block in found["blocks"]] == [0, 1]
    assert all(0 <= block["top1_alone"] <= 100 and len(block["matched"]) == 2 for block in found["blocks"])
    assert [len(point["blocks"]) for point in found["curve"]] == [0, 1, 2]
    assert found["curve"][0]["top1"] == read_report(run)["top1"]["original"]
    assert found["curve"][2]["top1"] == read_report(run)["top1"]["matched"]
    first = found["curve"][1]["blocks"][0]
    assert found["blocks"][first]["top1_alone"] == max(block["top1_alone"] for block in found["blocks"])
    assert all(point["images_per_second"] > 0 and point["mb_per_image"] > 0 for point in found["curve"])
    for loss, count in found["most_blocks_for_a_loss"].items():
        assert found["curve"][0]["top1"] - found["curve"][count]["top1"] <= float(loss)
    assert says.count("for a loss of at most") == 4
    assert not (run / "recipe.yaml").exists()
    assert karat_here("analyze", str(run), "--only", "conversion") == 0
    surveyed = (run / "analysis/report.html").read_text()
    assert "blocks converted one after the other" in surveyed.lower()
    assert "What to convert" in surveyed
    # A run of the same recipe reuses the survey's matching.
    own = convert(run, *KARAT, "convert.steps=2", "train.max_steps=1")
    assert "matching the attention" not in karat_says(*own)
    assert "has checkpoints" in karat_refuses(*own, "--survey")
    assert karat_here("analyze", str(run), "--only", "conversion") == 0
    report = (run / "analysis/report.html").read_text()
    assert "Converted attention" in report
    assert "blocks converted" in report


def test_only_blocks_that_differ_are_converted(convert, converted, tmp_path) -> None:
    """Converting a converted run changes only blocks whose attention differs: here block 1 becomes static."""
    static = "attention.blocks={1: {kind: static}}"
    assert karat_here(*convert(tmp_path / "run", *KARAT, static, "train.max_steps=1", source=converted)) == 0
    report = read_report(tmp_path / "run")
    assert [block["block"] for block in report["blocks"]] == [1]
    assert sum(report["blocks"][0]["matched"]) < sum(report["blocks"][0]["at_once"])
    line = karat_refuses(*convert(tmp_path / "same", *KARAT, source=converted))
    assert "it has this attention already, so there is nothing to convert" in line


def test_keys_that_do_not_change_the_attention_keep_a_block(recipe) -> None:
    old = load_recipe(recipe, [*SMALL, "schedule.warmup_epochs=0", "attention.kind=karat"])
    source = create_model(old.model, old.attention)
    of_other_bases = {"degree": 4}, {"orders": (3, 3)}, {"range": 2.0}, {"modes": 8}
    for change in ({}, {"implementation": "streaming"}, {"init": "softmax_like"}, *of_other_bases):
        new = old.changed(attention=old.attention.changed(blocks={"1": {"kind": "static"}}, **change))
        model = create_model(new.model, new.attention)
        conversion = begin_conversion(model, new, source.state_dict(), old.attention)
        take_original(model, new, source.state_dict(), old.attention)
        assert conversion.blocks == [1], change
        assert torch.equal(model.blocks[0].attn.operator.cos_coef, source.blocks[0].attn.operator.cos_coef), change


def test_learned_attention_cannot_become_softmax(convert, converted, tmp_path) -> None:
    """Learned attention is not converted to softmax, which has no parameters to match it with."""
    own = ("attention.kind=static", "attention.blocks={0: {kind: softmax}}", "convert.images=8")
    line = karat_refuses(*convert(tmp_path, *own, source=converted))
    assert "its block 0 has attention.kind = karat, which cannot be converted to softmax" in line


def test_learned_attention_without_its_recipe_is_refused(recipe) -> None:
    """Weights of learned attention without their recipe are refused; otherwise they would count as softmax."""
    of = load_recipe(recipe, [*SMALL, "schedule.warmup_epochs=0", "attention.kind=karat"])
    weights = create_model(of.model, of.attention).state_dict()
    new = of.changed(attention__kind="static")
    with pytest.raises(UserError, match="its attention is learned, but it does not say by which recipe"):
        begin_conversion(create_model(new.model, new.attention), new, weights, AttentionConfig())


def test_an_original_of_kernels_that_are_not_here_is_computed_by_others(recipe) -> None:
    of = load_recipe(recipe, [*SMALL, "schedule.warmup_epochs=0", "attention.kind=karat"])
    weights = create_model(of.model, of.attention).state_dict()
    new = of.changed(attention__kind="static")
    model = create_model(new.model, new.attention).eval()
    conversion = begin_conversion(model, new, weights, of.attention.changed(implementation="triton"))
    conversion.use(())
    assert model(torch.randn(2, 3, 16, 16)).isfinite().all()


def test_a_survey_from_learned_attention_on_few_images_and_what_becomes_of_it(convert, converted, tmp_path) -> None:
    """A survey works on fewer images than its timing takes, and a run that matches again drops the earlier survey."""
    make_image_folder(tmp_path / "few", {"train": 3, "val": 2})
    run = tmp_path / "run"
    few = ("data.backend=folder", f"data.path={tmp_path / 'few'}", "schedule.image_sizes=[[0, 8], [1, 16]]")
    static = convert(run, "attention.kind=static", *few, "train.epochs=2", *QUICK, "convert.steps=1", source=converted)
    says = karat_says(*static, "--survey")
    assert read_report(run)["images"] == 12
    assert "for a loss of at most" in says
    assert "kind: softmax" not in says  # blocks that are not converted keep karat
    assert "matching the attention" not in karat_says(*static, "train.max_steps=1")
    shutil.rmtree(run / "checkpoints")
    (run / FILE).unlink()
    assert read_survey(run) is not None
    other = [text.replace("kind=static", "kind=query_only") for text in static]
    assert "matching the attention" in karat_says(*other, "train.max_steps=1")
    assert read_survey(run) is None


def test_the_run_that_a_survey_proposes_keeps_it(convert, tmp_path) -> None:
    run = tmp_path / "run"
    karat_says(*convert(run, *KARAT, "convert.steps=2"), "--survey")
    found = read_survey(run)
    karat_says(*convert(run, *KARAT, "convert.steps=2", "train.max_steps=1", "attention.blocks={1: {kind: softmax}}"))
    assert read_survey(run) == found
    assert karat_here("analyze", str(run), "--only", "conversion") == 0
    assert "from the least loss to the greatest" in (run / "analysis/report.html").read_text()


def test_a_block_keeps_the_best_that_was_found(convert, recipe, tmp_path) -> None:
    """A block keeps the best attention that was found, at once or by least squares, when a later step is worse.

    Here least squares see one image only, and the rate of gradient descent is too high.
    """
    torch.manual_seed(0)
    model = create_model(load_recipe(recipe, [*SMALL, "schedule.warmup_epochs=0"]).model, AttentionConfig())
    for block in model.blocks:
        block.attn.qkv.weight.data[:64] *= 6  # query and key, so that attention differs between images
    save_file(model.state_dict(), tmp_path / "plain.safetensors")
    own = ("attention.init=softmax_like", "convert.images=1", "convert.rate=10", "train.max_steps=1")
    assert karat_here(*convert(tmp_path / "run", *KARAT, *own, source=tmp_path / "plain.safetensors")) == 0
    assert karat_here("plan", str(tmp_path / "run/recipe.yaml")) == 0  # the weights do not name their model
    blocks = read_report(tmp_path / "run")["blocks"]
    assert [block["matched"] for block in blocks] == [
        min(block["at_once"], block["least_squares"], key=sum) for block in blocks
    ]
    assert any(sum(block["least_squares"]) > sum(block["at_once"]) for block in blocks)


@pytest.mark.slow
@pytest.mark.parametrize("images", [1, 64, 100, 256, 50_000])
def test_errors_are_measured_on_images_from_all_over_the_split(images) -> None:
    batches = spread_ids(images)
    ids = batches[batches != PADDING]
    assert batches.shape[1] == BATCH
    assert len(set(ids.tolist())) == len(ids) == min(images, MEASURED)
    assert (ids.min(), ids.max()) == (0, images - 1)


def test_an_exported_folder_is_a_source(convert, original, tmp_path) -> None:
    short = (*KARAT, "convert.steps=1", "train.max_steps=1")
    folder = ("--format", "timm", "--weights", "ema", "--out", str(tmp_path / "x"))
    assert karat_here("export", str(original), *folder) == 0
    assert karat_here(*convert(tmp_path / "exported", *short, source=tmp_path / "x")) == 0
    best = (original / "checkpoints/best").read_text().strip()
    state = json.loads((original / "checkpoints" / best / "state.json").read_text())
    assert read_report(tmp_path / "exported")["top1"]["original"] == pytest.approx(state["last_top1"])
    assert "did you mean timm:vit_tiny" in karat_refuses(
        *convert(tmp_path / "no", *KARAT, source="timm:vit_tiny_patch16_225")
    )


@pytest.mark.slow
def test_a_timm_model_is_a_source(recipe, tmp_path, monkeypatch) -> None:
    put_into_cache(tmp_path / "hub", "test_vit3.r160_in1k", monkeypatch)
    sizes = ("model.name=test_vit3", "model.image_size=160", "model.num_classes=1000", "data.workers=0")
    small = ("train.global_batch=8", "train.max_steps=1", "train.epochs=1", "schedule.warmup_epochs=0")
    arguments = ("convert", "timm:test_vit3.r160_in1k", str(recipe), *sizes, *small, *KARAT, "convert.images=8")
    assert karat_here(*arguments, "log.trackers=[]", f"run.dir={tmp_path / 'run'}", "train.eval_batch=32") == 0
    assert read_report(tmp_path / "run")["from"] == "timm:test_vit3.r160_in1k"


def test_the_model_card_says_what_was_converted_from_what(original, converted, tmp_path) -> None:
    arguments = ("--format", "hub-folder", "--weights", "raw", "--out", str(tmp_path / "card"))
    assert karat_here("export", str(converted), *arguments) == 0
    card = (tmp_path / "card/README.md").read_text()
    assert "| Converted from | `original`, its attention was matched on at most 24 images" in card


def test_mistakes_are_one_line(convert, command, tmp_path) -> None:
    refused = {
        "attention.kind = softmax learns nothing, so a model cannot be converted to it": convert(tmp_path),
        "timm has no such model": convert(tmp_path, *KARAT, "model.name=vit_tinny"),
        "SOURCE nowhere: neither a run's directory": convert(tmp_path, *KARAT, source="nowhere"),
        "use model.depth=2": convert(tmp_path, *KARAT, "model.depth=3"),
        "convert.images = 8 needs the trained model; name it by init_from": [
            *command(tmp_path, "attention.kind=karat", "convert.images=8")
        ],
        "convert.images = 0 matches nothing": convert(tmp_path, *KARAT, "convert.images=0"),
        "leave distill.from out": [*convert(tmp_path, *KARAT, "model.num_classes=10", "distill.from="), "--survey"],
        "convert.steps = 3 has no effect without convert.images": [*command(tmp_path, "convert.steps=3")],
    }
    for words, arguments in refused.items():
        assert words in karat_refuses(*arguments)


@pytest.mark.parametrize(("own", "images"), [((), 1000), (("convert.images=8",), 8)])
def test_other_keys_of_the_conversion_may_be_given_without_the_images(own, images, tmp_path) -> None:
    recipe = tmp_path / "own.yaml"
    recipe.write_text("extends: cifar10_vit_nano_32px\nattention: {kind: karat}\nconvert: {steps: 20}\n")
    source = ("convert", "timm:vit_tiny_patch16_224", str(recipe), "convert.rounds=3", *own, "--print")
    found = yaml.safe_load(karat_says(*source))["convert"]
    assert (found["images"], found["rounds"], found["steps"]) == (images, 3, 20)
    recipe.write_text(recipe.read_text().replace("{steps: 20}", "{images: 40, steps: 20}"))
    assert yaml.safe_load(karat_says(*source))["convert"]["images"] == (8 if own else 40)


@pytest.mark.parametrize("place", ["basis", "kind", "blocks"])
def test_a_file_that_names_a_class_needs_trust(place, convert, converted, tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "foreign_class.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Foreign: pass\n")
    file = tmp_path / "theirs.safetensors"
    assert karat_here("export", str(converted), "--weights", "raw", "--format", "safetensors", "--out", str(file)) == 0
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    changed = {"basis": "foreign_class:Foreign"} if place == "basis" else {"kind": "foreign_class:Foreign"}
    attention = {"blocks": {"0": changed}} if place == "blocks" else {"kind": "karat", **changed}
    save_file(load_file(file), file, {**metadata, "attention": json.dumps(attention)})
    for teacher in ("distill.from=", f"distill.from={converted}"):
        line = karat_refuses(*convert(tmp_path / "run", "attention.kind=static", teacher, source=file))
        assert "runs the code of the module foreign_class; if you trust it, add --trust" in line
    assert not (tmp_path / "ran").exists()


def test_print_shows_the_whole_recipe(convert, original, tmp_path) -> None:
    says = karat_says(*convert(tmp_path, "attention.kind=static", "distill.from=elsewhere"), "--print")
    assert f"init_from: {original}" in says
    assert "from: elsewhere" in says
    assert "images: 1000" in says
    section = karat_says(*convert(tmp_path, "attention.kind=static", "distill={from: elsewhere}"), "--print")
    assert "from: elsewhere" in section
    line = karat_refuses(*convert(tmp_path, "attention.kind=static", "init_from=other"), "--print")
    assert "init_from: SOURCE sets it; remove the override" in line


def test_a_conversion_is_taken_again_where_its_source_is_gone(convert, original, tmp_path) -> None:
    """`karat replay` works without the run's source, because the run keeps a copy of its teacher."""
    source = shutil.copytree(original, tmp_path / "source")
    assert karat_here(*convert(tmp_path / "run", *KARAT, "checkpoint.every_steps=2", source=source)) == 0
    shutil.rmtree(source)
    arguments = ("--out", str(tmp_path / "x.png"), "--json", str(tmp_path / "x.json"))
    assert karat_here("replay", str(tmp_path / "run"), "7", *arguments) == 0
    norm = next(event["grad_norm"] for event in events(tmp_path / "run", "train") if event["step"] == 7)
    assert json.loads((tmp_path / "x.json").read_text())["grad_norm"] == norm


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_kill_or_a_signal_in_stage_1_changes_nothing(recipe_file, original, tmp_path) -> None:
    own = (f"init_from={original}", f"distill.from={original}", *KARAT, "convert.steps=200", "train.max_steps=3")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    karat_done("train", str(recipe_file), f"run.dir={whole}", *own)
    kill_all(start_held(recipe_file, cut, "step 40 of 200", *own))
    assert not (cut / FILE).exists()
    stopped = start_held(recipe_file, cut, "step 40 of 200", *own)
    assert "run the same command to resume" in stopped_by(stopped, signal.SIGTERM)
    assert not (cut / "checkpoints" / "latest").exists()
    karat_done("train", str(recipe_file), f"run.dir={cut}", *own)
    assert equal(last_tensors(cut), last_tensors(whole))
    assert read_report(cut) == read_report(whole)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_kill_in_stage_2_changes_nothing(recipe_file, original, tmp_path) -> None:
    own = (f"init_from={original}", f"distill.from={original}", *KARAT, "deepspeed.config=zero3")
    assert_a_kill_changes_nothing(recipe_file, tmp_path, *own)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_ranks_match_the_blocks_as_one_does(recipe_file, original, tmp_path) -> None:
    own = (str(recipe_file), *KARAT, "train.max_steps=2", "deepspeed.config=zero1")
    for ranks in (1, 2):
        karat_done("convert", str(original), *own, f"run.dir={tmp_path / str(ranks)}", processes=ranks)
    assert equal(load_file(tmp_path / "1" / FILE), load_file(tmp_path / "2" / FILE))
    karat_done("convert", str(original), *own, f"run.dir={tmp_path / 'survey'}", "--survey", processes=2)
    assert read_survey(tmp_path / "survey")["most_blocks_for_a_loss"]
