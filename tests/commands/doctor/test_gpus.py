"""Why torch sees no GPU: told apart, each with what helps."""

from typing import Any

import pytest
import torch

from karat_scale.commands.doctor.machine import no_gpu

TOO_OLD = "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver"


@pytest.mark.parametrize(
    ("driver", "cuda", "error", "shown", "value", "fix"),
    [
        (None, "13.0", "", None, "there is no NVIDIA driver", ""),
        ("580.65", None, "", None, "this torch is for CPUs only", "install torch for CUDA"),
        ("470.82", "13.0", TOO_OLD, None, "the driver 470.82 is too old for this torch", "update the driver"),
        ("470.82", "13.0", TOO_OLD, "0", "the driver 470.82 is too old for this torch", "update the driver"),
        ("580.65", "13.0", "No CUDA GPUs are available", "", "CUDA_VISIBLE_DEVICES='' shows torch no GPU", "unset it"),
        ("580.65", "13.0", "No CUDA GPUs are available", "7", "CUDA_VISIBLE_DEVICES='7' shows", "unset it"),
        (
            "580.65",
            "13.0",
            "No CUDA GPUs are available\nmore",
            None,
            "no GPU: No CUDA GPUs are available",
            "nvidia-smi",
        ),
    ],
)
def test_each_reason_has_its_own_words(
    monkeypatch: pytest.MonkeyPatch,
    driver: str | None,
    cuda: str | None,
    error: str,
    shown: str | None,
    value: str,
    fix: str,
) -> None:
    def refuse() -> Any:
        raise RuntimeError(error)

    monkeypatch.setattr(torch.cuda, "init", refuse)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    finding = no_gpu(driver, cuda)
    assert value in finding.value
    assert fix in finding.fix
    assert (finding.level == "problem") == bool(driver)
    assert len(f"{finding.value}{finding.fix}".splitlines()) == 1
