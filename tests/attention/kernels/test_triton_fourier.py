"""The Triton implementation, where it can run and where it cannot."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from karat_scale.attention import fourier_karat_attention
from karat_scale.attention.kernels import triton_fourier
from tests.attention.calls import make_call, relative_error

INTERPRETED = Path(__file__).with_name("interpreted_triton.py")


@pytest.mark.slow
def test_interpreted_kernels_agree_with_the_oracle():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(INTERPRETED)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_tensors_off_the_gpu_are_refused_by_name_and_left_to_others_by_auto():
    call = make_call(1, 1, 5, 16, 2, 1).to(torch.float32)
    with pytest.raises(ValueError, match="'triton' cannot take this call: it needs tensors on an NVIDIA GPU"):
        fourier_karat_attention(*call, implementation="triton")
    expected = fourier_karat_attention(*call, implementation="reference")
    assert relative_error(fourier_karat_attention(*call), expected) < 2e-6


def test_the_package_imports_without_triton():
    script = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch
from karat_scale.attention import fourier_karat_attention
tensors = [torch.zeros(1, 1, 5, 16)] * 3 + [torch.zeros(1, 2, 5, 1)] * 2 + [torch.zeros(1, 5, 2)]
fourier_karat_attention(*tensors)
try:
    fourier_karat_attention(*tensors, implementation="triton")
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("the package triton is not installed")


@pytest.mark.parametrize(
    ("version", "answer"), [("3.2.0", "needs triton 3.3 or newer and finds 3.2.0"), ("3.10.1", None)]
)
def test_an_old_triton_is_named(version, answer, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    found = triton_fourier._missing_triton()
    assert (found is None) if answer is None else (answer in found)
