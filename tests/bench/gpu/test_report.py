"""The files of a report, and the command's exit code."""

import json
import os
from pathlib import Path
from typing import Any

from karat_scale.bench.gpu.process import Channel
from karat_scale.bench.gpu.report import Report, cell
from karat_scale.bench.gpu.sections import ATTENTION, KERNELS

CALL = {"call": "bf16: G 3", "dtype": "bf16", "topic": "ViT", "error": 1e-3, "worst": "query", "tolerance": 5e-3}


def report_of(path: Path, *events: tuple[str, Any]) -> tuple[int, str]:
    report = Report(path, "karat bench gpu")
    report.begin(KERNELS)
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
    assert markdown.startswith("### NVIDIA H100\n")
    assert "**not finished**" in markdown
    assert "| ViT-Tiny | KArAt G3 | 0.75 |" in markdown


def test_cells_are_read_at_a_glance() -> None:
    assert [cell(x) for x in (None, True, False, 3, 1.5e-4, 0.4321, 12345.6)] == [
        *("-", "yes", "NO", "3", "1.5e-04", "0.432", "12,346")
    ]


def test_figures_that_are_not_finite_are_told_as_none() -> None:
    reader, writer = os.pipe()
    Channel(writer).row(error=float("inf"), of="query")
    assert json.loads(os.read(reader, 1000)) == {"row": {"error": None, "of": "query"}}
