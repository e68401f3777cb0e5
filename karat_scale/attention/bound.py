"""A bound on scores: A = tau cos(q, k), where each head learns tau and tau stays below the bound.

Without one, nothing limits the scores q k / sqrt(d). At a high learning rate they grow beyond +-pi, where a Fourier
series repeats, and training becomes unstable. Query and key are scaled before the operator sees them, so
all forms, bases and implementations work with it.
"""

import math

import torch
from torch import Tensor, nn

from karat_scale.attention.call import compute_dtype
from karat_scale.attention.operator import AttentionHeads, WrappedHeads

START = 1.0
"""The initial tau."""
# Added to squared lengths, so that a query of 0 has scores of 0 and a finite gradient.
TINY = 1e-12


class BoundedHeads(WrappedHeads):
    """An operator on A = tau cos(q, k) plus the bias, with tau = bound sigmoid(t) and a learned t for each head.

    The parameter is `tau_logit` [h]. tau is in (0, bound), whatever t is, and weight decay takes it towards bound / 2.
    Scores are rounded like query and key, so in bfloat16 one can exceed the bound by 1 %. A bias, such as Swin's
    positions, is added to the scores afterwards and has no bound.

    Args:
        operator: the operator that gets the scaled query and key.
        bound: the largest |A|.
        start: the initial tau, limited to 0.9 of the bound.
    """

    _shown = ("bound",)

    def __init__(self, operator: AttentionHeads, bound: float, start: float = START) -> None:
        super().__init__(operator)
        like = next(operator.parameters())
        self.bound, self.start = bound, start
        self.tau_logit = nn.Parameter(like.new_empty(operator.num_heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Reset tau to its initial value."""
        share = min(self.start / self.bound, 0.9)
        self.tau_logit.fill_(math.log(share / (1 - share)))

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """O [B, h, N, d] of query, key and value [B, h, N, d]; bias and mask as in `karat_attention`."""
        output: Tensor = self.operator(*self.bounded(query, key), value, bias, mask)
        return output

    def scores(self, query: Tensor, key: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """S [B, h, N, N]."""
        return self.operator.scores(*self.bounded(query, key), bias, mask)

    def function_of_score(self, scores: Tensor) -> Tensor | None:
        """See `AttentionHeads`."""
        return self.operator.function_of_score(scores)

    def bounded(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Return tau sqrt(d) q / |q| and k / |k|."""
        tau = self.bound * self.tau_logit.to(compute_dtype(query, key)).sigmoid()
        return _scaled(query, tau[:, None] * query.shape[-1] ** 0.5), _scaled(key, 1.0)


def _scaled(heads: Tensor, length: Tensor | float) -> Tensor:
    """Return vectors [B, h, N, d] scaled to a length, or to a length for each head [h, 1], in the vectors' dtype."""
    tokens = heads.transpose(1, 2)  # the order in memory, where a CPU is several times faster
    squares = tokens.to(compute_dtype(heads)).square().sum(-1, keepdim=True)
    return (tokens * (length * (squares + TINY).rsqrt())).to(heads.dtype).transpose(1, 2)
