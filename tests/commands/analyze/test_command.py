import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from karat_scale.commands.analyze import command
from karat_scale.commands.analyze.analyses import ANALYSES
from karat_scale.commands.analyze.command import unique_labels
from karat_scale.commands.analyze.trained_run import TrainedRun
from karat_scale.commands.cli import main
from karat_scale.recipe.loading import dump_recipe
from tests.commands.analyze.browser import Browser
from tests.conftest import karat, karat_done

QUICK = ("--images", "4", "--grid", "3", "--samples", "8", "--hessian-samples", "4", "--image", "0", "5")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_ranks_share_the_landscape(karat_run: TrainedRun, tmp_path: Path) -> None:
    arguments = ["analyze", str(karat_run.path), *QUICK, "--only", "spectrum", "landscape"]
    assert main([*arguments, "--out", str(tmp_path / "one")]) == 0
    done = karat_done(*arguments, "--out", str(tmp_path / "two"), processes=2)
    assert done.stderr.splitlines().count("karat: landscape, random ...") == 1  # only rank 0 says it
    one, two = (np.load(tmp_path / name / "landscape" / "karat" / "arrays.npz") for name in ("one", "two"))
    for name in one.files:
        np.testing.assert_allclose(one[name], two[name], rtol=1e-5, atol=1e-6)
    files = {path.relative_to(tmp_path / "two").as_posix() for path in (tmp_path / "two").rglob("*.*")}
    assert {"report.html", "spectrum/karat/last_block.png", "landscape/karat/optimizer_path.png"} <= files
    assert not any("/.landscape" in name for name in files)
    refused = karat(*arguments, "--out", str(tmp_path / "none"), "--data", str(tmp_path / "one"), processes=2)
    assert refused.returncode != 0
    assert len([line for line in refused.stderr.splitlines() if line.startswith("error: landscape of karat")]) == 1


def test_missing_images_leave_what_needs_none(karat_run: TrainedRun, tmp_path: Path, capsys) -> None:
    out, empty = str(tmp_path / "out"), tmp_path / "empty"
    empty.mkdir()
    arguments = ["analyze", str(karat_run.path), *QUICK, "--out", out, "--data", str(empty)]
    names = ("accuracy", "calibration", "spectrum", "maps", "distributions")
    assert main([*arguments, "--only", *names]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1  # although four analyses need the images
    assert str(empty) in lines[0]
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count('class="problem"') == 1
    assert "missing for it: Accuracy, Calibration, Spectral behaviour, Attention maps" in page
    (tmp_path / "out" / "report.html").unlink()
    assert main([*arguments, "--only", "maps"]) == 2
    assert not (tmp_path / "out" / "report.html").exists()


def test_an_analysis_that_does_not_fit_into_memory_leaves_the_others(karat_run, tmp_path, monkeypatch, capsys) -> None:
    def too_large(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1")

    monkeypatch.setattr("karat_scale.commands.analyze.maps.analyze_maps", too_large)
    arguments = ["analyze", str(karat_run.path), *QUICK, "--out", str(tmp_path), "--only", "maps", "distributions"]
    assert main([*arguments, "--batch", "64"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert lines == [
        "error: maps of karat: out of memory: CUDA out of memory. Tried to allocate 2.00 GiB; lower --batch (now 64)"
    ]
    assert 'data-figure="distributions/' in (tmp_path / "report.html").read_text()


def test_a_gpu_too_full_to_time_the_model_leaves_the_analyses(karat_run, tmp_path, monkeypatch) -> None:
    def too_large(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1")

    monkeypatch.setattr(command, "_expected", too_large)
    arguments = ["analyze", str(karat_run.path), *QUICK, "--out", str(tmp_path), "--only", "distributions"]
    assert main(arguments) == 0
    assert 'data-figure="distributions/' in (tmp_path / "report.html").read_text()


def test_a_split_in_place_of_its_data_set_is_told_in_words_of_this_command(own_run, image_folder, capsys) -> None:
    folder = own_run.recipe.changed(data__backend="folder", data__path=str(image_folder))
    (own_run.path / "recipe.yaml").write_text(dump_recipe(folder))
    arguments = ["analyze", str(own_run.path), *QUICK, "--only", "maps", "--data", str(image_folder / "val")]
    assert main(arguments) == 2
    assert f"does not exist; use --data {image_folder}, which has it" in capsys.readouterr().err


def test_a_later_command_keeps_what_an_earlier_one_made(karat_run: TrainedRun, tmp_path: Path, capsys) -> None:
    arguments = ["analyze", str(karat_run.path), *QUICK, "--out", str(tmp_path)]
    assert main([*arguments, "--only", "maps"]) == 0
    before = (tmp_path / "report.html").read_text()
    assert 'data-figure="maps/' in before
    assert "earlier command" not in before
    (tmp_path / "empty").mkdir()
    assert main([*arguments, "--only", "maps", "--data", str(tmp_path / "empty")]) == 2
    assert (tmp_path / "report.html").read_text() == before
    assert "no analysis was possible, so" in capsys.readouterr().err.splitlines()[-1]
    assert main([*arguments, "--only", "distributions"]) == 0
    after = (tmp_path / "report.html").read_text()
    assert before.count('data-figure="maps/') == after.count('data-figure="maps/')
    assert 'data-figure="distributions/' in after
    assert after.count("made by an earlier command") == 1
    assert main([*arguments, "--only", "distributions", "--weights", "raw"]) == 0
    assert 'data-figure="maps/' not in (tmp_path / "report.html").read_text()


def test_ctrl_c_leaves_a_report_of_what_was_finished(karat_run, tmp_path, monkeypatch, capsys) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("karat_scale.commands.analyze.landscape.say_cost", interrupted)
    arguments = ["analyze", str(karat_run.path), *QUICK, "--out", str(tmp_path), "--only", "distributions", "sharpness"]
    assert main(arguments) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "error: stopped; run the same command again"
    page = (tmp_path / "report.html").read_text()
    assert 'data-figure="distributions/' in page


def test_a_checkpoint_of_another_model_leaves_the_other_run(karat_run, own_run, tmp_path, capsys) -> None:
    other = own_run.path.rename(tmp_path / "other")
    recipe = other / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("depth: 2", "depth: 3"))
    out, names = tmp_path / "out", ("maps", "distributions")
    assert main(["analyze", str(other), str(karat_run.path), *QUICK, "--out", str(out), "--only", *names]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert [line.split(":")[1] for line in lines] == [f" {name} of other" for name in names]
    assert all("holds another model: blocks.2" in line for line in lines)
    assert {path.parent.name for path in out.rglob("numbers.json")} == {"karat"}


def test_runs_of_one_name_are_told_apart(karat_run: TrainedRun) -> None:
    assert unique_labels([karat_run, karat_run]) == ["karat", "karat (2)"]
    numbered = dataclasses.replace(karat_run, path=karat_run.path.with_name("karat (2)"))
    assert unique_labels([numbered, karat_run, karat_run]) == ["karat (2)", "karat", "karat (3)"]
    alike = [dataclasses.replace(karat_run, path=karat_run.path.with_name(name)) for name in ("a b", "a_b")]
    assert unique_labels(alike) == ["a b", "a_b (2)"]  # otherwise its files would replace the other's


def test_off_a_terminal_it_prints_what_it_does_and_nothing_of_others(karat_run: TrainedRun, tmp_path: Path) -> None:
    done = karat_done("analyze", str(karat_run.path), *QUICK, "--only", "accuracy", "--out", str(tmp_path))
    assert done.stdout.splitlines() == [f"report: {tmp_path / 'report.html'}"]
    slow = re.compile(r" about |: \d+ of \d+")  # printed only by a slow machine
    lines = {line for line in done.stderr.splitlines() if not slow.search(line)}
    assert lines == {"karat: predict the validation split ...", "karat: draw figures ..."}


def test_what_all_analyses_take_is_said_first_and_what_is_left_of_them(
    karat_run, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr("karat_scale.commands.analyze.command.WORTH_TELLING", 0.0)
    monkeypatch.setattr("karat_scale.foundation.console.PLAIN_LINE_SECONDS", 0.0)
    only = ("--only", "spectrum", "content", "--out", str(tmp_path))
    assert main(["analyze", str(karat_run.path), *QUICK, *only]) == 0
    first, *lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"note: up to about .+s in all; spectrum .+s, content .+s", first)
    shares = [int(share) for share in re.findall(r"(\d+) % of all, about ", "\n".join(lines))]
    assert len(shares) > 3
    assert shares == sorted(shares)
    assert shares[-1] == 100
    page = (tmp_path / "report.html").read_text()
    assert (
        page.index("It is right on")
        < page.index(">S</a> depends")
        < page.index("Not shown here")
        < page.index("<section")
    )


def test_a_run_that_has_only_begun_has_its_curves(karat_run: TrainedRun, tmp_path: Path, capsys) -> None:
    begun, out = tmp_path / "begun", tmp_path / "out"
    begun.mkdir()
    for name in ("recipe.yaml", "metrics.jsonl", "classes.json"):
        shutil.copy(karat_run.path / name, begun)
    assert main(["analyze", str(begun), *QUICK, "--out", str(out)]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert line.endswith("no checkpoint; train the run first")
    page = (out / "report.html").read_text()
    assert page.count('class="problem"') == 1
    assert "not finished" in page


def test_what_runs_together_cannot_say_is_said(softmax_run: TrainedRun, own_run: TrainedRun, tmp_path: Path) -> None:
    recipe = own_run.path / "recipe.yaml"
    text = recipe.read_text().replace("kind: karat", "kind: softmax")
    recipe.write_text(text.replace("blocks: {}", "blocks: {'0': {kind: karat}}"))
    (own_run.path / "summary.json").unlink()
    arguments = ("--only", "training", "--out", str(tmp_path / "out"))
    page = tmp_path / "out" / "report.html"
    for others, absent in (([], True), ([softmax_run], False)):
        assert main(["analyze", *(str(run.path) for run in (own_run, *others)), *arguments]) == 0
        assert (" would do, trained the same way" in page.read_text()) == absent
        said = f"The runs are not compared: {own_run.path}: has no summary.json, so it has not finished"
        assert (said in page.read_text()) == bool(others)


HAS_NAN = {"calibration", "spectrum"}  # for bins without an image, and for singular values of 0


@pytest.mark.slow
def test_every_figure_number_and_section_of_two_runs(trained, tmp_path: Path, browser: Browser) -> None:
    runs = {kind: trained(kind) for kind in ("karat", "softmax")}
    out = tmp_path / "out"
    quick = ("--images", "4", "--grid", "3", "--samples", "8", "--image", "0", "7")
    done = karat_done("analyze", *map(str, runs.values()), *quick, "--out", str(out))
    assert not [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "note: functions of softmax: attention.kind = softmax has no learned functions" in done.stderr

    pictures = {path.relative_to(out) for path in out.rglob("*.png") if path.parent.name != "pictures"}
    drawn = {path.with_suffix("").as_posix() for path in pictures}
    assert {path.relative_to(out).with_suffix("").as_posix() for path in out.rglob("*.svg")} == drawn
    places = {name.rpartition("/")[0] for name in drawn} - {"training"}
    # These have no figures, no results here, or one result for all runs.
    alone = {"mistakes", "robustness", "conversion", "sharpness", "training"}
    of_each = {f"{analysis}/{kind}" for analysis in ANALYSES.keys() - alone for kind in runs}
    assert places == of_each - {"functions/softmax"}
    for place in places:
        assert json.loads((out / place / "numbers.json").read_text())
        with np.load(out / place / "arrays.npz") as arrays:
            assert arrays.files
            finite = all(np.isfinite(arrays[name]).all() for name in arrays.files)
            assert finite or place.partition("/")[0] in HAS_NAN, place

    page = (out / "report.html").read_text()
    assert set(re.findall(r'data-figure="([^"]+)"', page)) == drawn
    shown = [analysis for analysis in ANALYSES if analysis not in ("robustness", "conversion")]
    assert re.findall(r'<section id="(\w+)">', page) == [*shown, "absent", "glossary"]
    assert all(f"<h2>{ANALYSES[analysis].title}</h2>" in page for analysis in shown)
    for section in page.split("<section")[2:-2]:
        assert "<h3>karat</h3>" in section
        assert ("<h3>softmax</h3>" in section) == ('id="functions"' not in section)
    for kind in runs:
        path = json.loads((out / "landscape" / kind / "numbers.json").read_text())["path"]
        assert path["steps"] == [0, 4, 8, 12, 16]

    browser.open(out / "report.html")
    assert browser.messages() == []
    loaded = browser.run(
        "return [...document.querySelectorAll('figure img')].filter(i => i.complete && i.naturalWidth > 100)"
        ".map(i => i.dataset.figure).filter(name => name)"
    )
    assert set(loaded) == drawn
    tiles = browser.run("return [...document.querySelectorAll('.tiles img')].map(i => i.complete && i.naturalWidth)")
    assert tiles
    assert all(tiles)
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
