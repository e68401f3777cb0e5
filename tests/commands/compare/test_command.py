"""`karat compare` from its command line to its files."""

import csv
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from karat_scale.commands.cli import main
from karat_scale.commands.compare.command import mean_and_spread
from karat_scale.commands.compare.comparison import group_runs
from karat_scale.commands.compare.finished import SCORES as KNOWN
from karat_scale.commands.compare.finished import read_run
from karat_scale.commands.parsers.training import MATCHES, SCORES
from tests.commands.analyze.browser import open_browser
from tests.commands.compare.conftest import Copy
from tests.conftest import karat_done, karat_refuses, summary

BASE = [[50.0, 60.0, 70.0], [50.0, 61.0, 71.0], [50.0, 62.0, 71.5]]
BETTER = [[50.0, 63.0, 72.0], [50.0, 64.0, 72.5], [50.0, 66.0, 73.5]]


@pytest.fixture
def six(copy: Copy) -> list[Path]:
    """Return six runs: three seeds of each of two recipes."""
    keys = ("run.name=<b>better $x$", "optim.lr=0.002")
    base = [copy(f"base-seed{seed}", f"run.seed={seed}", top1=top1) for seed, top1 in enumerate(BASE)]
    better = [copy(f"better-seed{seed}", f"run.seed={seed}", *keys, top1=top1) for seed, top1 in enumerate(BETTER)]
    return [*base, *better]


def test_trained_runs_are_compared_by_a_user(trained: Path, tmp_path: Path) -> None:
    done = karat_done("compare", str(trained / "seed0"), str(trained / "seed1"), "--out", str(tmp_path / "out"))
    values = [summary(trained / f"seed{seed}")["last_top1"] for seed in (0, 1)]
    line = next(line for line in done.stdout.splitlines() if "last top-1" in line)
    assert f"{np.mean(values):.2f}" in line
    assert f"{np.std(values, ddof=1):.2f}" in line
    assert "Difference" not in done.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("compare.md", "compare.csv", "compare.html"),
        *("curve_steps.png", "curve_samples.png", "curve_hours.png"),
    }


def test_what_single_runs_do_not_have_is_no_column(copy: Copy, capsys) -> None:
    rows = (("a", 1e-3, 50.0), ("b", 2e-3, 60.0))
    runs = [copy(name, f"optim.lr={rate}", top1=[top1] * 3) for name, rate, top1 in rows]
    assert main(["compare", *map(str, runs)]) == 0
    printed = capsys.readouterr().out
    heads = [line.split("  ") for line in printed.splitlines() if " seeds " in line]
    assert [[*filter(None, map(str.strip, head))] for head in heads] == [
        ["group", "seeds", "mean"],
        ["group", "seeds", "difference", "verdict", "keys that differ"],
    ]
    assert "leads by 10.00 points; what another seed would change is unknown" in printed
    assert "top-5" not in printed  # of four classes it is always right


def test_a_difference_that_the_runs_support_is_told(six: list[Path], tmp_path: Path, capsys) -> None:
    out, file = tmp_path / "out", tmp_path / "all.json"
    assert main(["compare", *map(str, six), "--out", str(out), "--json", str(file)]) == 0
    printed = capsys.readouterr()
    test = stats.ttest_rel([top1[-1] for top1 in BETTER], [top1[-1] for top1 in BASE])
    said = json.loads(file.read_text())
    (pair,) = said["differences"]
    assert (pair["seeds"], pair["verdict"]) == ([0, 1, 2], "higher")
    assert pair["p"] == pytest.approx(test.pvalue)
    assert pair["mean"] == pytest.approx(np.mean([2.0, 1.5, 2.0]))
    assert pair["keys"] == {"optim.lr": [0.0005, 0.002]}
    assert said["groups"][0]["measures"]["last_top1"]["mean"] == pytest.approx(np.mean([70.0, 71.0, 71.5]))
    assert "optim.lr: 0.0005 -> 0.002" in printed.out
    assert printed.err == ""

    page = (out / "compare.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "http" not in page.replace("http-equiv", "")
    assert "<b>better" not in page
    assert "&lt;b&gt;better" in page
    markdown = (out / "compare.md").read_text()
    assert "\\<b>better" in markdown
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in re.findall(r"\((\w+\.png)\)", markdown))
    rows = list(csv.DictReader((out / "compare.csv").open()))
    assert [float(row["last_top1"]) for row in rows] == [top1[-1] for top1 in BASE + BETTER]
    assert {row["test_images"] for row in rows} == {"28"}


def test_other_scores_are_compared_where_asked(six: list[Path], tmp_path: Path) -> None:
    file = tmp_path / "all.json"
    assert main(["compare", *map(str, six), "--metric", "loss", "--json", str(file)]) == 0
    (pair,) = json.loads(file.read_text())["differences"]
    assert (pair["mean"], pair["verdict"]) == (0.0, "not shown")  # the copies have the losses of one run
    assert set(SCORES) == set(KNOWN)


@pytest.mark.parametrize(
    ("match", "field", "figures", "title", "line"),
    [
        ("parameters", "parameters", (1000, 1049, 1200), "parameters", "1,200 parameters, +20.0 % against base"),
        # 8 images a step
        ("step_seconds", "images_per_second", (80.0, 77.5, 40.0), "seconds a step", "0.2000 seconds a step, +100.0 %"),
    ],
)
def test_groups_are_matched_where_asked(match, field, figures, title, line, copy, tmp_path, capsys) -> None:
    runs = [
        copy(f"{name}{seed}", f"run.seed={seed}", f"run.name={name}", f"optim.lr={lr}", top1=top1, **{field: figure})
        for name, lr, figure, scores in zip(
            ("base", "near", "far"), (1e-3, 2e-3, 3e-3), figures, (BASE, BETTER, BETTER), strict=True
        )
        for seed, top1 in enumerate(scores)
    ]
    file = tmp_path / "all.json"
    assert main(["compare", *map(str, runs), "--match", match, "--json", str(file)]) == 0
    printed = capsys.readouterr()
    assert f"paired by seed, at equal {title} (within 5 %)" in " ".join(printed.out.split())
    assert printed.err.startswith(f"left out: far: {line}")
    said = json.loads(file.read_text())
    assert said["match"] == match
    assert [pair["group"] for pair in said["differences"]] == ["near"]
    assert match in MATCHES


def test_other_budgets_are_a_warning_and_stand_beside_the_verdict(copy: Copy, tmp_path: Path, capsys) -> None:
    runs = [copy(f"base{seed}", f"run.seed={seed}", top1=top1) for seed, top1 in enumerate(BASE)]
    runs += [
        copy(f"more{seed}", f"run.seed={seed}", "run.name=more", top1=top1, train_images=80)
        for seed, top1 in enumerate(BETTER)
    ]
    assert main(["compare", *map(str, runs), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert "higher, but the budgets differ" in printed.out
    assert (
        "warning: budgets differ: owls and more: epochs differ: 3 and 2.4; training images differ: 64 and 80"
        in printed.err
    )
    for name in ("compare.md", "compare.html"):
        assert "Budgets differ: owls and more" in (tmp_path / "out" / name).read_text()


def test_an_interval_of_an_accuracy_ends_at_0_and_100(copy: Copy, capsys) -> None:
    runs = [copy(f"seed{seed}", f"run.seed={seed}", top1=[5.0, 5.0, last]) for seed, last in ((1, 5.0), (2, 95.0))]
    assert main(["compare", *map(str, runs)]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "last top-1" in line]
    assert "seeds 1, 2 " in line
    assert "0.00 to 100.00" in line


def test_a_single_run_has_the_name_of_its_directory(copy: Copy, capsys) -> None:
    assert main(["compare", str(copy("mine", "run.seed=0", "run.name=other"))]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "last top-1" in line]
    assert line.split("%")[1].split()[:3] == ["mine", "seed", "0"]


def test_what_is_left_out_is_named_and_the_rest_is_compared(trained: Path, copy: Copy, tmp_path: Path, capsys) -> None:
    half = copy("half", "run.seed=3", exit=75, reason="stopped by SIGTERM")
    (tmp_path / "other").mkdir()
    paths = [trained / "seed0", half, tmp_path / "other", trained / "seed0"]
    assert main(["compare", *map(str, paths)]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "has not finished (stopped by SIGTERM)" in lines[0]
    assert "other: not a run directory" in lines[1]
    assert "seed0 is named twice" in lines[2]


def test_speeds_of_other_machines_are_noted_and_their_steps_not_matched(trained, copy, capsys) -> None:
    there = copy("there", "run.seed=3", device="NVIDIA H100", world_size=8)
    assert main(["compare", str(trained / "seed0"), str(there)]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "of different machines: 1 x CPU" in line
    assert "8 x NVIDIA H100" in line
    there = copy("matched", "run.seed=0", "optim.lr=1e-3", device="NVIDIA H100")
    assert main(["compare", str(trained / "seed0"), str(there), "--match", "step_seconds"]) == 0
    assert "it ran on another machine than" in capsys.readouterr().err


@pytest.mark.slow
def test_the_curves_follow_dark_mode(six: list[Path], tmp_path: Path) -> None:
    assert main(["compare", *map(str, six), "--out", str(tmp_path / "out")]) == 0
    drawn = {}
    with open_browser(tmp_path / "chromium") as browser:
        for scheme in ("light", "dark"):
            browser.prefer(scheme)
            browser.open(tmp_path / "out" / "compare.html")
            drawn[scheme] = browser.run("return getComputedStyle(document.querySelector('.curves img')).filter")
    assert drawn["light"] == "none"
    assert drawn["dark"].startswith("invert(")


def test_names_that_are_not_text_are_written_out(trained: Path, copy: Copy, tmp_path: Path) -> None:
    odd = copy("odd", "optim.lr=0.002", "augment.hflip=0.25", "optim.eps=1e-7", "optim.clip_grad=2")
    odd = odd.rename(odd.with_name(os.fsdecode(b"odd\xff\x1b[31m")))
    assert main(["compare", str(trained / "seed0"), str(odd), "--out", str(tmp_path / "out")]) == 0
    for name in ("compare.md", "compare.csv", "compare.html"):
        assert "\x1b" not in (tmp_path / "out" / name).read_text(encoding="utf-8")


def test_what_cannot_be_compared_is_one_line(trained: Path, six: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    first = str(trained / "seed0")
    assert "choose another directory" in karat_refuses("compare", first, "--out", str(tmp_path / "file"))
    assert "nowhere: there is no such directory" in karat_refuses("compare", first, str(tmp_path / "nowhere"))
    line = karat_refuses("compare", *map(str, six), "--metric", "box_ap")
    assert "--metric box_ap: these runs have top1, top5, loss" in line


def test_curves_are_means_at_equal_steps(six: list[Path]) -> None:
    (group, _), _ = group_runs([read_run(str(path)) for path in six])
    steps, mean, deviation = mean_and_spread(group, "top1", "steps") or pytest.fail("no curve")
    assert steps.tolist() == [8, 16, 24]
    assert mean == pytest.approx(np.mean(BASE, axis=0))
    assert deviation == pytest.approx(np.std(BASE, axis=0, ddof=1))
    samples, *_ = mean_and_spread(group, "top1", "samples") or pytest.fail("no curve")
    assert samples.tolist() == [64, 128, 192]
    hours, *_ = mean_and_spread(group, "top1", "hours") or pytest.fail("no curve")
    assert hours == pytest.approx(np.array([point.hours for point in group.runs[0].curve]))
