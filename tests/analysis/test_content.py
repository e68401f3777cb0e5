"""What S depends on, of matrices whose shares are known."""

import math

import numpy as np
import pytest
import torch

from karat_scale.analysis.attention_matrices import watched
from karat_scale.analysis.content import Content, analyze_content
from karat_scale.analysis.result import Settings
from karat_scale.analysis.trained_run import TrainedRun
from karat_scale.models import create_model
from karat_scale.recipe import AttentionConfig
from tests.analysis.test_attention_matrices import SIZE


def measured(*batches):
    content = Content(1)
    for raw, learned in batches:
        content.add(0, raw, learned)
    return content


def test_a_constant_row_depends_on_nothing_and_noise_on_all():
    row = torch.randn(1, 2, 1, 9).expand(6, 2, 9, 9)
    assert measured((row, row)).shares[0, :2] == pytest.approx([0, 0], abs=1e-12)
    matrix = torch.randn(1, 2, 9, 9).expand(6, 2, 9, 9)
    by_query, by_image, _ = measured((matrix, matrix)).shares[0]
    assert by_query > 0.5
    assert by_image == pytest.approx(0, abs=1e-12)
    noise = torch.randn(4000, 1, 9, 9)
    assert measured((noise, noise)).shares[0, :2] == pytest.approx([8 / 9, 1], abs=0.01)


def test_batches_make_no_difference():
    raw, learned = torch.randn(6, 2, 9, 9), torch.randn(6, 2, 9, 9)
    whole, parts = measured((raw, learned)), measured(*zip(raw.split(4), learned.split(4), strict=True))
    np.testing.assert_allclose(parts.shares, whole.shares)
    norms = torch.linalg.matrix_norm(learned).mean()
    np.testing.assert_allclose(parts.norms([2]), [norms], rtol=1e-6)


def test_scores_beyond_pi_are_counted():
    raw = torch.full((1, 1, 2, 2), math.pi)
    raw[0, 0, 0] = torch.tensor([4.0, -4.0])
    assert measured((raw, raw)).shares[0, 2] == 0.5


@pytest.mark.parametrize(
    ("section", "expected"),
    [({"kind": "static"}, [True, False]), ({"kind": "karat", "scores": False}, [False, False]), ({}, [True, True])],
    ids=["static", "without scores", "softmax"],
)
def test_controls_depend_on_what_they_see(section, expected):
    torch.manual_seed(0)
    model = create_model(SIZE, AttentionConfig(rank=3, **section)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    content = Content(3)
    with watched(model, content.add), torch.no_grad():
        model(torch.randn(4, 3, 16, 16))
    assert ((content.shares[:, :2] > 1e-6) == expected).all()


def test_of_a_real_run(any_run: TrainedRun) -> None:
    result = analyze_content(any_run, Settings(images=6, batch=4))
    assert result.numbers["images"] == 6
    assert len(result.numbers["blocks"]) == 2
    for block in result.numbers["blocks"]:
        assert 0 <= block["by_query"] <= 1
        assert block["frobenius_norm"] > 0
