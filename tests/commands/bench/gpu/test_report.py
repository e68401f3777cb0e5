"""The files of a report, and the command's exit code."""

import json
import os
from pathlib import Path

import pytest

from karat_scale.commands.bench.gpu.report import ATTENTION, KERNELS, LOSSES, RANKS, Report, cell
from karat_scale.commands.bench.gpu.worker import Channel, late

CALL = {"call": "bf16: G 3", "dtype": "bf16", "topic": "ViT", "error": 1e-3, "worst": "query", "tolerance": 5e-3}
NOT_FINITE = {**CALL, "call": "bf16: G 16", "error": None, "right": False}
LATE = ("left_out", late("CUDA graphs", "there was no time for it"))
LOSS = {"mode": "fp32, ZeRO 2, eager", "difference": 1e-7, "right": True}
RANK = {"case": "ViT-Small, softmax", "difference": 1e-4}
SLICE = {"card": "NVIDIA A100-SXM4-80GB MIG 3g.40gb", "versions": {}}
UNKNOWN = "it is not known whether training is right"


@pytest.mark.parametrize(
    ("section", "events", "right", "verdict", "lines"),
    [
        (LOSSES, [("row", LOSS)], True, "training is right in all 1 checks", ()),
        (
            LOSSES,
            [("row", LOSS), LATE],
            None,
            "right in 1 checks, but others were left out for lack of time or memory",
            (),
        ),
        (LOSSES, [("row", LOSS), ("left_out", {"what": "it", "why": "there is one card"})], True, "all 1 checks", ()),
        (LOSSES, [LATE], None, UNKNOWN, ()),
        (
            LOSSES,
            [("row", {**LOSS, "right": False}), ("failed", {"what": LOSS["mode"], "why": "the loss of step 3 is 2"})],
            False,
            "WRONG in 1 of 1 checks: losses: fp32, ZeRO 2, eager",
            (),
        ),
        (
            LOSSES,
            [("row", {**LOSS, "mode": f"mode {number}", "right": False}) for number in range(5)],
            False,
            "WRONG in 5 of 5 checks: losses: mode 0; losses: mode 1; losses: mode 2 and 2 more",
            (),
        ),
        (KERNELS, [("row", {**CALL, "right": True})], None, f"{UNKNOWN}; 1 other checks are", ()),
        (
            KERNELS,
            [("row", {**CALL, "right": True}), ("row", NOT_FINITE)],
            False,
            "WRONG in 1 of 2 checks: kernels: bf16: G 16",
            ("| ViT | 1 of 2, not finite |", "| bf16: G 16 | query | 5.0e-03 | NO |"),
        ),
        (
            ATTENTION,
            [("left_out", {"what": "DALI", "why": "it is not installed"})],
            None,
            UNKNOWN,
            ("- Left out: DALI: it is not installed",),
        ),
        (
            KERNELS,
            [("failed", {"what": "graphs", "why": "first\nlast"})],
            False,
            "WRONG in 1 of 1 checks: kernels: graphs",
            ("- FAILED: graphs: first ... last",),
        ),
        (
            RANKS,
            [("row", {**RANK, "contender": f"zero{stage}", "right": stage != 1}) for stage in range(4)],
            False,
            "WRONG in 1 of 4 checks: ranks: ViT-Small, softmax",
            (),
        ),
        (KERNELS, [("machine", SLICE)], None, UNKNOWN, ("a slice of a card (MIG), whose peak is not known",)),
    ],
)
def test_the_report_starts_with_the_verdict(tmp_path, section, events, right, verdict, lines) -> None:
    report = Report(tmp_path / "gpu.json", "karat bench gpu")
    report.begin(section)
    for kind, content in events:
        report.receive(kind, content)
    report.end()
    assert report.finish() == (1 if right is False else 0)
    markdown, data = (tmp_path / "gpu.md").read_text(), json.loads((tmp_path / "gpu.json").read_text())
    assert markdown.splitlines()[0].endswith(verdict)
    assert all(line in markdown for line in lines)
    assert list(data)[:2] == ["verdict", "right"]
    assert data["right"] is right
    assert data["verdict"].endswith(verdict)


def test_both_files_are_whole_after_each_event(tmp_path: Path) -> None:
    report = Report(tmp_path / "gpu.json", "karat bench gpu")
    report.begin(ATTENTION)
    report.receive("machine", {"card": "NVIDIA H100", "versions": {"torch": "2.13"}})
    report.receive("row", {"case": "ViT-Tiny", "attention": "KArAt G3", "ratio_both": 0.75})
    data = json.loads((tmp_path / "gpu.json").read_text())
    assert data["sections"]["attention"]["rows"][0]["ratio_both"] == 0.75
    markdown = (tmp_path / "gpu.md").read_text()
    assert markdown.startswith(f"### NVIDIA H100: {UNKNOWN}\n")
    assert "**not finished**" in markdown
    assert "| ViT-Tiny | KArAt G3 | 0.75 |" in markdown


def test_cells_are_read_at_a_glance() -> None:
    shown = ["-", "yes", "NO", "3", "1.5e-04", "0.432", "12,346"]
    assert [cell(x) for x in (None, True, False, 3, 1.5e-4, 0.4321, 12345.6)] == shown


def test_figures_that_are_not_finite_are_told_as_none() -> None:
    reader, writer = os.pipe()
    Channel(writer).row(error=float("inf"), of="query")
    assert json.loads(os.read(reader, 1000)) == {"row": {"error": None, "of": "query"}}
