"""The files of a report, and the command's exit code."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from karat_scale.commands.bench.gpu.report import ATTENTION, KERNELS, LOSSES, RANKS, Report, Section, cell
from karat_scale.commands.bench.gpu.worker import Channel, late

CALL = {"call": "bf16: G 3", "dtype": "bf16", "topic": "ViT", "error": 1e-3, "worst": "query", "tolerance": 5e-3}


def report_of(path: Path, *events: tuple[str, Any], section: Section = KERNELS) -> tuple[int, str]:
    report = Report(path, "karat bench gpu")
    report.begin(section)
    for kind, content in events:
        report.receive(kind, content)
    report.end()
    return report.finish(), path.with_suffix(".md").read_text()


def test_a_wrong_value_makes_exit_code_1_and_is_listed(tmp_path: Path) -> None:
    wrong = {**CALL, "call": "bf16: G 16", "error": None, "right": False}
    code, markdown = report_of(tmp_path / "gpu.json", ("row", {**CALL, "right": True}), ("row", wrong))
    assert code == 1
    assert "| ViT | 1 of 2, not finite |" in markdown
    assert "| bf16: G 16 | query | 5.0e-03 | NO |" in markdown


def test_what_is_left_out_is_no_failure_but_what_fails_is(tmp_path: Path) -> None:
    left_out = ("left_out", {"what": "DALI", "why": "it is not installed"})
    code, markdown = report_of(tmp_path / "gpu.json", left_out)
    assert code == 0
    assert "- Left out: DALI: it is not installed" in markdown
    code, markdown = report_of(tmp_path / "gpu.json", ("failed", {"what": "graphs", "why": "first\nlast"}))
    assert code == 1
    assert "- FAILED: graphs: first ... last" in markdown


def test_both_files_are_whole_after_each_event(tmp_path: Path) -> None:
    report = Report(tmp_path / "gpu.json", "karat bench gpu")
    report.begin(ATTENTION)
    report.receive("machine", {"card": "NVIDIA H100", "versions": {"torch": "2.13"}})
    report.receive("row", {"case": "ViT-Tiny", "attention": "KArAt G3", "ratio_both": 0.75})
    data = json.loads((tmp_path / "gpu.json").read_text())
    assert data["sections"]["attention"]["rows"][0]["ratio_both"] == 0.75
    markdown = (tmp_path / "gpu.md").read_text()
    assert markdown.startswith("### NVIDIA H100: it is not known whether training is right\n")
    assert "**not finished**" in markdown
    assert "| ViT-Tiny | KArAt G3 | 0.75 |" in markdown


LATE = ("left_out", late("CUDA graphs", "there was no time for it"))
LOSS = {"mode": "fp32, ZeRO 2, eager", "difference": 1e-7, "right": True}


@pytest.mark.parametrize(
    ("events", "right", "verdict"),
    [
        ([("row", LOSS)], True, "training is right in all 1 checks"),
        (
            [("row", LOSS), LATE],
            None,
            "right in 1 checks, but others were left out for lack of time",
        ),
        ([("row", LOSS), ("left_out", {"what": "the section", "why": "there is one card"})], True, "all 1 checks"),
        (
            [LATE],
            None,
            "it is not known whether training is right",
        ),
        (
            [("row", {**LOSS, "right": False}), ("failed", {"what": LOSS["mode"], "why": "the loss of step 3 is 2"})],
            False,
            "WRONG in 1 of 1 checks: losses: fp32, ZeRO 2, eager",
        ),
        (
            [("row", {**LOSS, "mode": f"mode {number}", "right": False}) for number in range(5)],
            False,
            "WRONG in 5 of 5 checks: losses: mode 0; losses: mode 1; losses: mode 2 and 2 more",
        ),
    ],
)
def test_the_report_starts_with_the_verdict(tmp_path: Path, events: Any, right: bool | None, verdict: str) -> None:
    code, markdown = report_of(tmp_path / "gpu.json", *events, section=LOSSES)
    assert code == (1 if right is False else 0)
    assert verdict in markdown.splitlines()[0]
    data = json.loads((tmp_path / "gpu.json").read_text())
    assert list(data)[:2] == ["verdict", "right"]
    assert data["right"] is right
    assert data["verdict"].endswith(verdict)


def test_right_kernels_alone_are_no_right_training(tmp_path: Path) -> None:
    _, markdown = report_of(tmp_path / "gpu.json", ("row", {**CALL, "right": True}))
    assert markdown.splitlines()[0].endswith("it is not known whether training is right; 1 other checks are")


def test_one_wrong_row_of_several_with_a_name_is_in_the_verdict(tmp_path: Path) -> None:
    case = {"case": "ViT-Small, softmax", "difference": 1e-4}
    rows = [("row", {**case, "contender": f"zero{stage}", "right": stage != 1}) for stage in range(4)]
    code, markdown = report_of(tmp_path / "gpu.json", *rows, section=RANKS)
    assert code == 1
    assert "WRONG in 1 of 4 checks: ranks: ViT-Small, softmax" in markdown.splitlines()[0]


def test_a_slice_of_a_card_is_named_as_one(tmp_path: Path) -> None:
    machine = {"card": "NVIDIA A100-SXM4-80GB MIG 3g.40gb", "versions": {}}
    _, markdown = report_of(tmp_path / "gpu.json", ("machine", machine))
    assert markdown.startswith("### NVIDIA A100-SXM4-80GB MIG 3g.40gb: ")
    assert "a slice of a card (MIG), whose peak is not known" in markdown


def test_cells_are_read_at_a_glance() -> None:
    assert [cell(x) for x in (None, True, False, 3, 1.5e-4, 0.4321, 12345.6)] == [
        *("-", "yes", "NO", "3", "1.5e-04", "0.432", "12,346")
    ]


def test_figures_that_are_not_finite_are_told_as_none() -> None:
    reader, writer = os.pipe()
    Channel(writer).row(error=float("inf"), of="query")
    assert json.loads(os.read(reader, 1000)) == {"row": {"error": None, "of": "query"}}
