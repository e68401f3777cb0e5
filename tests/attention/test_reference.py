"""The oracle itself, against the paper's sums written out entry by entry."""

import math

import pytest
import torch

from karat_scale.attention import reference
from karat_scale.attention.call import FourierCall
from tests.attention.calls import make_call

BASES = {
    "zero": lambda x: 0.0,
    "identity": lambda x: x,
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
}


@pytest.mark.parametrize("base", BASES)
def test_scores_are_the_papers_sums(base):
    call = make_call(1, 2, 4, 3, 2, 3)
    bias = torch.randn(2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[1, 2] = mask[3, 0] = False
    learned = reference.scores(FourierCall(*call, bias, mask, base))
    for head in range(2):
        scores = call.query[0, head] @ call.key[0, head].T / math.sqrt(3) + bias[head]
        for k in range(4):
            for q in range(4):
                expected = 0.0
                for p in range(2):
                    hidden = 0.0
                    for j in range(4):
                        if not mask[k, j]:
                            continue
                        x = scores[k, j].item()
                        hidden += BASES[base](x)
                        for m in range(3):
                            hidden += call.cos_coef[head, p, j, m].item() * math.cos((m + 1) * x)
                            hidden += call.sin_coef[head, p, j, m].item() * math.sin((m + 1) * x)
                    expected += hidden * call.proj[head, q, p].item()
                assert learned[0, head, k, q].item() == pytest.approx(expected * mask[k, q].item(), abs=1e-12)
