"""A control: KArAt whose scores are all 0, so that S is a learned constant."""

import torch
from torch import Tensor

from karat_scale.attention.heads import AttentionHeads


class WithoutScores(AttentionHeads):
    """An operator on A = 0. It has the operator's parameters and its start, but sees neither queries nor keys.

    What KArAt gains over this, it gains by what its functions do with the scores.
    """

    def __init__(self, operator: AttentionHeads) -> None:
        super().__init__()
        self.operator, self.num_heads = operator, operator.num_heads

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """O [B, h, N, d] of value [B, h, N, d]. Query, key and bias are ignored; the mask is not."""
        nothing = torch.zeros_like(query)
        output: Tensor = self.operator(nothing, nothing, value, None, mask)
        return output

    def scores(self, query: Tensor, key: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """S [B, h, N, N]."""
        nothing = torch.zeros_like(query)
        return self.operator.scores(nothing, nothing, None, mask)

    def flops(self, tokens: int, width: int, masked: bool = False) -> int:
        """See `AttentionHeads`. Computed as if the scores were not 0."""
        return self.operator.flops(tokens, width, masked)

    def refusal(self, width: int, device: torch.device, *, biased: bool = False, masked: bool = False) -> str | None:
        """See `AttentionHeads`."""
        return self.operator.refusal(width, device, masked=masked)

    def chosen(
        self, width: int, device: torch.device, *, biased: bool = False, masked: bool = False
    ) -> tuple[str, str | None]:
        """See `AttentionHeads`."""
        return self.operator.chosen(width, device, masked=masked)
