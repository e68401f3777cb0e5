"""Softmax of a learned function of the scores: a superset of softmax with few parameters, for any number of tokens."""

import math

import torch
from torch import Tensor, nn

from karat_scale.attention.heads import AttentionHeads
from karat_scale.attention.variants.rows import Rule, attend_rows, rows_of_scores


class LearnedScore(AttentionHeads):
    """S = softmax(f(A)), with f(x) = x + sum_{m=1..G} a_m sin(m w x) + b_m (cos(m w x) - 1) for each head.

    Ours, not the paper's. It starts as softmax (a = b = 0, w = pi / 4). Rows of S are positive and sum to one, and no
    parameter belongs to a position.

    Args:
        num_heads: h.
        grid: G, the number of harmonics.
        implementation: "reference" computes all rows of S at once; others, a tile after another.
        device, dtype: of `sin_coef` a and `cos_coef` b [h, G] and of `frequency` w [h].
    """

    def __init__(
        self,
        num_heads: int,
        grid: int = 3,
        implementation: str = "auto",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.grid, self.implementation = num_heads, grid, implementation
        self.sin_coef = nn.Parameter(torch.empty((num_heads, grid), device=device, dtype=dtype))
        self.cos_coef = nn.Parameter(torch.empty((num_heads, grid), device=device, dtype=dtype))
        self.frequency = nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Go back to softmax."""
        nn.init.zeros_(self.sin_coef)
        nn.init.zeros_(self.cos_coef)
        nn.init.constant_(self.frequency, math.pi / 4)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """O [B, h, N, d] of query, key and value [B, h, N, d]; bias and mask as in `karat_attention`."""
        return attend_rows(self._rule(), query, key, value, bias, mask, self.implementation == "reference")

    def scores(self, query: Tensor, key: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """S [B, h, N, N]."""
        return rows_of_scores(self._rule(), query, key, bias, mask)

    def function_of_score(self, scores: Tensor) -> Tensor:
        """f(A) [..., h, n, N], before softmax."""
        return _learned_scores(scores, self.sin_coef, self.cos_coef, self.frequency)

    def flops(self, tokens: int, width: int, masked: bool = False) -> int:
        """See `AttentionHeads`."""
        return self.num_heads * tokens * tokens * (4 * width + 4 * self.grid)

    def chosen(
        self, width: int, device: torch.device, *, biased: bool = False, masked: bool = False
    ) -> tuple[str, str | None]:
        """See `AttentionHeads`."""
        return "reference" if self.implementation == "reference" else "streaming", None

    def extra_repr(self) -> str:
        """The settings, in the constructor's names."""
        return f"num_heads={self.num_heads}, grid={self.grid}, implementation={self.implementation!r}"

    def _rule(self) -> Rule:
        parameters = self.sin_coef, self.cos_coef, self.frequency

        def rule(scores: Tensor, keep: Tensor | None) -> Tensor:
            learned = _learned_scores(scores, *parameters)
            if keep is None:
                return learned.softmax(-1)
            # A row that keeps no pair attends to nothing, as in scaled_dot_product_attention.
            return learned.masked_fill(~keep, -torch.inf).softmax(-1).nan_to_num(0)

        return rule


def _learned_scores(scores: Tensor, sin: Tensor, cos: Tensor, frequency: Tensor) -> Tensor:
    """f of scores [..., h, n, N], for sines and cosines [h, G] and a frequency [h] of each head."""
    sin, cos, frequency = (x.to(scores.dtype)[..., None, None] for x in (sin, cos, frequency))
    phase, learned = frequency * scores, scores
    for m in range(cos.shape[1]):
        angle = (m + 1) * phase
        learned = learned + sin[:, m] * angle.sin() + cos[:, m] * (angle.cos() - 1)
    return learned
