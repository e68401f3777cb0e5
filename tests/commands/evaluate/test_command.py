"""`karat eval --on`, `--labels` and `--corrupt` on real runs and images."""

import itertools
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from karat_scale.commands.evaluate.predictions import (
    SEVERITIES,
    Evaluation,
    is_complete,
    keep_evaluation,
    read_evaluations,
)
from karat_scale.commands.evaluate.test_set import SPLITS
from karat_scale.commands.status.status import read_standing
from karat_scale.data.shards.shard_format import read_dataset_record, write_dataset_record
from karat_scale.foundation.errors import RunDirectoryError
from karat_scale.foundation.tables import CORRUPTIONS
from tests.conftest import CLASSES, ROOT, VAL_PER_CLASS, karat_done, karat_here, karat_refuses, karat_says
from tests.data.conftest import exif
from tests.servers import nginx

__all__ = ["nginx"]
IMAGES = CLASSES * VAL_PER_CLASS
CONTRAST = ("--corrupt", "contrast")


def scores(text: str) -> tuple[str, ...]:
    found = re.search(r"top-1 ([\d.]+) % loss ([\d.]+) on (\d+) images", text)
    assert found, text
    return found.groups()


def test_the_runs_own_split_as_another_set_scores_the_same(run: Path, image_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    printed = karat_says("eval", str(run), "--on", str(image_folder), "--json", str(file))
    assert scores(printed) == scores(karat_says("eval", str(run)))
    (kept,) = read_evaluations(run)
    assert (kept.name, kept.images, kept.among, kept.classes) == ("images", IMAGES, CLASSES, CLASSES)
    assert f"{run / 'evaluations' / 'images.json'}" in printed
    assert json.loads(file.read_text())["top1"] == kept.top1
    (line,) = read_standing(run).evaluations
    assert line.startswith(f"images: top-1 {kept.top1:.2f} %")


def test_long_evaluation_says_in_a_file_how_far_it_is(run: Path, image_folder: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("karat_scale.foundation.console.PLAIN_LINE_SECONDS", 0.0)
    for more, what in (((), "evaluate batches"), (("--on", str(image_folder)), "evaluate on images")):
        karat_says("eval", str(run), *more)
        assert re.search(rf"^{what}: 4 of 4, [\d.,]+ a second, about .+ left$", capsys.readouterr().err, re.MULTILINE)


def test_outputs_that_are_not_finite_have_no_score(run: Path, image_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    for more in ((), ("--on", str(image_folder))):
        line = karat_refuses("eval", str(run), "augment.std=[1e-44,1e-44,1e-44]", *more, "--json", str(file))
        assert f"{run} step-" in line
        assert f"its outputs for {IMAGES} of {IMAGES} images are not finite, so it has no score; name another" in line
    assert not file.exists()
    assert not read_evaluations(run)


def test_a_subset_is_scored_among_its_own_classes(run: Path, image_folder: Path, tmp_path: Path) -> None:
    some = tmp_path / "sketch"
    for name in ("class1", "class3"):
        shutil.copytree(image_folder / "val" / name, some / name)
    shutil.copytree(image_folder / "val" / "class0", some / "narwhal\udce9")  # as Latin-1 has it
    printed = karat_says("eval", str(run), "--on", str(some))
    assert "1 class that the run does not have, with 7 images, left out: narwhal\\udce9" in printed
    assert f"on {2 * VAL_PER_CLASS} images, among 2 of 4 classes\n" in printed
    (kept,) = read_evaluations(run)
    assert (kept.unmatched, kept.left_out) == (["narwhal\\udce9"], VAL_PER_CLASS)
    assert kept.top5 == 100  # there are only two


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("corrupt", [(), ("--corrupt", "shot_noise", "snow", "--severity", "3")], ids=["", "corrupt"])
def test_two_ranks_count_each_image_once_and_corrupt_it_as_one_does(run: Path, corrupt: tuple[str, ...]) -> None:
    if corrupt:
        pytest.importorskip("imagecorruptions", reason="needs the extra corruptions")
    for name, processes in (("one", 1), ("two", 2)):
        karat_done("eval", str(run), *corrupt, "--name", name, processes=processes)
    one, two = read_evaluations(run)
    assert one.images == two.images == IMAGES
    assert (one.top1, one.top5, one.corruptions) == (two.top1, two.top5, two.corruptions)
    assert corrupt or one.loss == pytest.approx(two.loss, rel=1e-5)


def test_an_image_that_cannot_be_read_is_counted_as_such(run: Path, image_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "broken"
    shutil.copytree(image_folder / "val", data)
    (data / "class0" / "000.jpg").write_bytes(b"no image")
    assert karat_here("eval", str(run), "--on", str(data)) == 2  # the recipe says stop
    karat_says("eval", str(run), "--on", str(data), "data.on_bad_sample=skip")
    (kept,) = read_evaluations(run)
    assert (kept.images, kept.unreadable) == (IMAGES - 1, 1)


def test_other_labels_of_the_runs_own_split(run: Path, tmp_path: Path) -> None:
    everything = {f"class{label}/{number:03d}": [*range(CLASSES)] for label in range(3) for number in range(7)}
    labels = tmp_path / "any.json"
    labels.write_text(json.dumps(everything))
    assert "7 images that the file does not have not counted" in karat_says("eval", str(run), "--labels", str(labels))
    (kept,) = read_evaluations(run)
    assert (kept.name, kept.images, kept.top1) == ("val-any", 21, 100.0)


def test_the_runs_own_folder_is_scored_as_plain_evaluation_scores_it(run: Path, image_folder: Path, tmp_path) -> None:
    shutil.copytree(image_folder, tmp_path / "photos")
    for path in (tmp_path / "photos" / "val").rglob("*.jpg"):
        with Image.open(path) as image:
            image.save(path, quality=95, exif=exif(6))
    data = ("data.backend=folder", f"data.path={tmp_path / 'photos'}")
    plain = scores(karat_says("eval", str(run), *data))
    assert scores(karat_says("eval", str(run), *data, "--name", "own")) == plain
    assert scores(karat_says("eval", str(run), "--on", str(tmp_path / "photos"))) != plain


@pytest.fixture
def url(shards: Path, nginx, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    pytest.importorskip("aiohttp", reason="aiohttp is not installed: pip install -e '.[remote]'")
    monkeypatch.setenv("KARAT_DATA_CACHE", str(tmp_path / "cache"))
    return f"http://127.0.0.1:{nginx(shards)}"


def test_data_at_a_url_take_other_labels_and_are_another_set(run: Path, shards: Path, url: str, tmp_path: Path) -> None:
    labels = tmp_path / "some.json"
    labels.write_text(json.dumps({f"class{label}/{number:03d}": label for label in range(3) for number in range(7)}))
    for place, name in ((shards, "here"), (url, "there")):
        karat_says("eval", str(run), f"data.path={place}", "--labels", str(labels), "--name", name)
    here, there = read_evaluations(run)
    assert (there.images, there.top1, there.unreadable) == (here.images, here.top1, 0)
    assert there.source.startswith(f"{url}, labels of ")
    karat_says("eval", str(run), "--on", url, "--name", "whole")
    whole = read_evaluations(run)[-1]
    assert (whole.source, whole.images, whole.among) == (url, IMAGES, CLASSES)


@pytest.mark.slow
def test_data_at_a_url_are_corrupted_as_on_disk(run: Path, shards: Path, url: str) -> None:
    pytest.importorskip("imagecorruptions", reason="needs the extra corruptions")
    for place, name in ((shards, "here"), (url, "there")):
        karat_says("eval", str(run), f"data.path={place}", *CONTRAST, "--severity", "1", "--name", name)
    here, there = read_evaluations(run)
    assert there.corruptions == here.corruptions != {}


def test_the_folder_of_a_split_keeps_a_result_of_its_own(run: Path, image_folder: Path) -> None:
    for split in ("train", "val"):
        karat_says("eval", str(run), "--on", str(image_folder / split))
    assert [kept.name for kept in read_evaluations(run)] == ["images-train", "images-val"]


def test_data_of_other_classes_are_not_scored_by_number(run: Path, shards: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(shards, other)
    record = read_dataset_record(other)
    record.classes.reverse()
    write_dataset_record(other, record)
    line = karat_refuses("eval", str(run), f"data.path={other}")
    assert f"data.path = {other} has other classes than the run; use `karat eval {run} --on DIR`" in line
    karat_says("eval", str(run), "--on", str(other))


def test_a_mistake_is_one_line(run: Path, image_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(image_folder, tmp_path / "copy")
    karat_says("eval", str(run), "--on", str(image_folder), "--name", "a")
    for arguments, words in (
        (("--on", str(tmp_path / "copy"), "--name", "a"), "choose another --name"),
        (("--on", str(tmp_path / "copy"), "--name", "../a"), "should be a file's name"),
        (("--on", str(tmp_path / "nowhere")), "nowhere is not a directory; name shards"),
        (("data.path=nowhere", "--split", "val"), "data.path = nowhere is not a directory"),
        (("data.backend=synthetic", "data.path=", "--labels", "x"), "data.backend = synthetic has none; name a dir"),
        (("--severity", "3"), "--severity has no effect without --corrupt"),
        (("--severity", "6", "--corrupt"), "unknown value 6"),
        (("--corrupt", "fogg"), "did you mean fog?"),
        (("--corrupt", "fog", "--labels", "x"), "exclude each other"),
    ):
        assert words in karat_refuses("eval", str(run), *arguments)
    exported = ROOT / "tests/checkpoint/of_0_2_0/exported"
    for command in ("eval", "status", "analyze", "export", "verify"):
        assert "an exported folder, not a run" in karat_refuses(command, str(exported))
    assert f"the first of {', '.join(SPLITS)})" in " ".join(karat_says("eval", "--help").split())


def test_a_directory_that_takes_nothing_does_not_cost_the_scores(run: Path, image_folder: Path, tmp_path: Path, capsys):
    (run / "evaluations").symlink_to(tmp_path)  # nothing is written where a link leads
    file = tmp_path / "scores.json"
    assert "is a link" in karat_refuses("eval", str(run), "--on", str(image_folder), "--json", str(file))
    assert scores(capsys.readouterr().out)[0] == f"{json.loads(file.read_text())['top1']:.2f}"


def test_corrupted_copies_are_counted_kept_and_resumed(run: Path) -> None:
    pytest.importorskip("imagecorruptions", reason="needs the extra corruptions")
    arguments = ("eval", str(run), *CONTRAST, "brightness")
    printed = karat_says(*arguments, "--severity", "1", "5")
    assert "4 passes over 28 images take about" in printed
    assert "mean of 4 kinds and severities of 75 on 28 images each" in printed
    (kept,) = read_evaluations(run)
    assert kept.name == "val-corrupted"
    assert kept.top1 is None  # nothing may pass for the mean over all of them
    assert {name: [*by] for name, by in kept.corruptions.items()} == {"brightness": [1, 5], "contrast": [1, 5]}
    printed = karat_says(*arguments, "--severity", "1", "2")
    assert "contrast 1:" not in printed
    assert "contrast 2:" in printed
    (more,) = read_evaluations(run)
    assert more.corruptions["contrast"][1] == kept.corruptions["contrast"][1]
    values = [top1 for by in more.corruptions.values() for top1 in by.values()]
    assert f"top-1 {sum(values) / 6:.2f} %, mean of 6 kinds" in printed


def test_another_split_of_as_many_images_is_corrupted_anew(run: Path, image_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("imagecorruptions", reason="needs the extra corruptions")
    shutil.copytree(image_folder, tmp_path / "data")
    shutil.copytree(image_folder / "val", tmp_path / "data" / "test")
    for split in ("val", "test"):
        settings = (f"data.path={tmp_path / 'data'}", f"data.val_split={split}")
        assert "contrast 1:" in karat_says("eval", str(run), *settings, *CONTRAST, "--severity", "1")
    assert {one.name for one in read_evaluations(run)} >= {"val-corrupted", "val-test-corrupted"}


def test_a_set_with_another_image_is_corrupted_anew(run: Path, image_folder: Path, tmp_path: Path) -> None:
    """Before the fix, a mean of scores on different images was kept."""
    pytest.importorskip("imagecorruptions", reason="needs the extra corruptions")
    shutil.copytree(image_folder / "val", tmp_path / "data")
    for is_new in (True, False, True):
        said = karat_says("eval", str(run), "--on", str(tmp_path / "data"), *CONTRAST, "--severity", "1")
        assert ("contrast 1:" in said) == is_new
        if not is_new:
            (tmp_path / "data/class0/000.jpg").rename(tmp_path / "data/class0/new.jpg")


def test_a_set_with_an_image_replaced_in_place_has_another_identity(run: Path, image_folder, tmp_path: Path) -> None:
    shutil.copytree(image_folder / "val", tmp_path / "data")
    found = []
    for _ in range(3):
        karat_says("eval", str(run), "--on", str(tmp_path / "data"))
        found += [kept.identity for kept in read_evaluations(run)]
        if len(found) == 2:
            shutil.copyfile(tmp_path / "data/class0/000.jpg", tmp_path / "data/class1/000.jpg")
    first, again, replaced = found
    assert first == again != replaced


def test_a_kept_result_is_not_replaced_by_that_of_another_model(run: Path, image_folder: Path) -> None:
    on = ("eval", str(run), "--on", str(image_folder))
    karat_says(*on)
    (kept,) = read_evaluations(run)
    holds = f"images.json holds the result of {kept.checkpoint} (ema weights), "
    for other, said in (
        (("--weights", "raw"), f"not of {kept.checkpoint} (raw weights); choose another --name, or remove the file"),
        (("model.image_size=48",), "with other settings, such as model.image_size; choose another --name"),
    ):
        assert f"{holds}{said}" in karat_refuses(*on, *other)
        assert read_evaluations(run) == [kept]
        karat_says("eval", str(run), *other)  # which keeps nothing
    karat_says(*on, "--weights", "raw", "--name", "raw")
    assert read_evaluations(run)[0] == kept


def test_the_result_of_an_earlier_checkpoint_is_replaced(run: Path, image_folder: Path) -> None:
    on = ("eval", str(run), "--on", str(image_folder), "--checkpoint")
    *_, first, last = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    karat_says(*on, first)
    assert f"note: this replaces the result of {first}\n" in karat_says(*on, last)
    (kept,) = read_evaluations(run)
    assert kept.checkpoint == last
    assert f"holds the result of {last} (ema weights), not of {first}" in karat_refuses(*on, first)


def test_a_damaged_result_is_named_in_our_words(tmp_path: Path) -> None:
    file = tmp_path / "evaluations" / "owls.json"
    file.parent.mkdir()
    facts = dict.fromkeys(("name", "source", "checkpoint", "weights", "identity", "model", "date"), "x")
    for content, said in (
        (json.dumps({**facts, "images": "many"}), "images: should be a whole number, such as 12; remove it and"),
        (json.dumps(facts), "images: is missing; remove it and evaluate again"),
        ("[1]", "should be a section of keys; remove it"),
        ('{"name": ', "it is not JSON; remove it"),
    ):
        file.write_text(content)
        with pytest.raises(RunDirectoryError, match=rf"owls\.json: not an evaluation of karat eval: {re.escape(said)}"):
            read_evaluations(tmp_path)


def test_processes_that_corrupt_at_once_keep_each_others_scores(tmp_path: Path) -> None:
    facts = {"source": "", "checkpoint": "step-00000016", "weights": "raw", "model": "m", "date": "2026-11-28 12:00"}
    empty = Evaluation(name="val-corrupted", identity="a", images=9, among=3, classes=3, **facts)

    def keep(one: tuple[str, int]) -> None:
        keep_evaluation(tmp_path, empty.model_copy(update={"corruptions": {one[0]: {one[1]: 50.0}}}))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(keep, itertools.product(CORRUPTIONS, SEVERITIES)))
    (kept,) = read_evaluations(tmp_path)
    assert is_complete(kept.corruptions)
    assert kept.top1 == 50
    keep_evaluation(tmp_path, empty.model_copy(update={"identity": "b", "corruptions": {"fog": {1: 20.0}}}))
    (other,) = read_evaluations(tmp_path)
    assert (other.corruptions, other.top1) == ({"fog": {1: 20.0}}, None)


def test_only_all_corruptions_at_all_severities_are_complete() -> None:
    whole = {name: dict.fromkeys(SEVERITIES, 50.0) for name in CORRUPTIONS}
    assert is_complete(whole)
    assert not is_complete({**whole, "fog": {1: 50.0}})
    assert not is_complete({name: own for name, own in whole.items() if name != "fog"})
