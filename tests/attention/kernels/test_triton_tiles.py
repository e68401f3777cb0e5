"""Tests of what is decided for the Triton kernels before they run, on a machine without a GPU."""

import pytest
import torch

from karat_scale.attention.kernels.triton_launch import room_for_rows, rows_in
from karat_scale.attention.kernels.triton_tiles import tf32_is_allowed

HAS_BOTH = hasattr(torch.backends.cuda.matmul, "fp32_precision")


@pytest.fixture
def switches():
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    yield matmul
    matmul.allow_tf32 = before  # once the newer switch is set, torch refuses to read this one


@pytest.mark.skipif(not HAS_BOTH, reason="torch has the older switch alone")
def test_both_switches_of_tf32_are_read(switches) -> None:
    for precision, allowed in (("tf32", True), ("ieee", False)):
        switches.fp32_precision = precision
        assert tf32_is_allowed() is allowed
    for allowed in (True, False):
        switches.allow_tf32 = allowed
        assert tf32_is_allowed() is allowed


def test_rows_too_far_apart_for_32_bits_are_copied() -> None:
    """Heads that are views of tokens [N, B, 3, h, d] are copied if the batch is too large for 32-bit offsets."""
    for tokens, is_kept in ((512, True), (1024, False)):
        apart = torch.empty(tokens, 1024, 3, 12, 64, device="meta")[:, :, 0].permute(1, 2, 0, 3)
        assert (rows_in(apart, apart.dtype) is apart) is is_kept
        assert (room_for_rows(apart) is apart) is is_kept
