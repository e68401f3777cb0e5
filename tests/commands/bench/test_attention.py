import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from karat_scale.attention import BASES
from karat_scale.commands.cli import main
from karat_scale.commands.measure.attention import Case, attention_rows
from tests.conftest import karat

ROW = {
    "implementation",
    "forward_ms",
    "forward_backward_ms",
    "peak_mb",
    "ratio_forward",
    "ratio_forward_backward",
    "ratio_memory",
}


@pytest.mark.slow
def test_bench_attention_prints_ratios_and_writes_json(tmp_path: Path) -> None:
    out = tmp_path / "attention.json"
    done = karat("bench", "attention", "--batch", "2", "--rounds", "1", "--json", str(out))
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert {"model", "batch", "basis", "grid", "rank", "dtype", "device"} <= result.keys()
    names = [row["implementation"] for row in result["rows"]]
    assert names[:4] == ["sdpa", "softmax", "reference", "streaming"]
    for row in result["rows"]:
        assert row.keys() >= ROW
        assert row["forward_ms"] > 0
    memory = {row["implementation"]: row["peak_mb"] for row in result["rows"]}
    assert memory["reference"] > memory["streaming"]
    assert "streaming" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_here_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "attention", "--device", "cuda"]) == 2
    assert capsys.readouterr().err == "error: --device cuda: no CUDA device here; use --device cpu\n"


def case_of(**changes: Any) -> Case:
    return Case(**{**asdict(Case("tiny", 1, 3, 12, "fp32", "cpu", tokens=20)), **changes})


def output(name: str, case: Case) -> torch.Tensor:
    return case.attend_by(name)(*case.inputs())


@pytest.mark.parametrize("form", ["modular", "full_rank"])
@pytest.mark.parametrize("basis", BASES)
def test_contenders_compute_what_they_are_called(basis: str, form: str) -> None:
    case = case_of(basis=basis, form=form)
    torch.testing.assert_close(output("sdpa", case), output("softmax", case), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output("streaming", case), output("reference", case), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_only_what_has_the_operator_is_measured() -> None:
    names = [row["implementation"] for row in attention_rows(case_of(basis="dog"), 1, ["streaming", "triton", "cpu"])]
    assert names == ["sdpa", "softmax", "streaming"]


def test_the_content_form_is_measured_by_its_kernel() -> None:
    case = case_of(form="content")
    torch.testing.assert_close(output("streaming", case), output("reference", case), rtol=1e-4, atol=1e-5)
    names = [row["implementation"] for row in attention_rows(case, 1, ["streaming", "triton"])]
    assert names == ["sdpa", "softmax", "streaming"]


def test_the_content_form_is_of_fourier_series_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "attention", "--form", "content", "--basis", "dog"]) == 2
    assert capsys.readouterr().err.endswith("--form content needs --basis fourier, not dog\n")


def test_an_unknown_basis_is_a_users_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "attention", "--basis", "dogs"]) == 2
    assert "--basis = 'dogs': expected one of fourier, " in capsys.readouterr().err
