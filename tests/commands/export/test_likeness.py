"""A model that answers otherwise than it should is not written."""

import pytest
import torch

from karat_scale.commands.export.command import check_likeness
from karat_scale.foundation.errors import RunDirectoryError


def test_a_difference_or_a_failure_is_one_line() -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    assert check_likeness(model, model, 2) == 0
    assert 0 < check_likeness(model, lambda images: model(images) + 1e-5, 2) < 2e-5
    for wrong in (lambda images: model(images) + 1e-2, lambda images: model(images) * float("nan")):
        with pytest.raises(RunDirectoryError, match=r"logits differ by .*; it is not written"):
            check_likeness(model, wrong, 2)
    with pytest.raises(RunDirectoryError, match=r"fails on a batch of 3: .*; it is not written"):
        check_likeness(model, lambda images: model(images.view(1, 12).view(1, 3, 2, 2)), 2)
