"""KArAt with content addressing: a learned function of each score beside the operator of low rank."""

import torch
from torch import Tensor, nn

from karat_scale.attention.call import FourierCall, output_dtype
from karat_scale.attention.functional import attend_call, content_kernel
from karat_scale.attention.kernels import cpu, triton_content
from karat_scale.attention.operator import AttentionHeads, FourierKaratOperator
from karat_scale.attention.softmax import fourier_fit_of_exp
from karat_scale.attention.variants.controls import Rule, attend_rows, rows_of_scores


class ContentOperator(AttentionHeads):
    """S[k, q] = psi(A[k, q]) / N + sum_p H[k, p] W[q, p]: the full-rank form, structured as diagonal plus low rank.

    In the paper's modular form S[k, q] depends on all scores of query k and not on A[k, q] itself, so a query cannot
    ask for the tokens that answer it. psi(x) = c + sum_{m=1..G} a_m cos(m x) + b_m sin(m x), with 2 G + 1 numbers for
    each head, adds that. Ours, not the paper's. It starts near softmax: psi at the fit of exp over small scores, which
    softmax is up to its denominator, and W at 0.

    Args:
        operator: H and W; its W is set to 0.
    """

    def __init__(self, operator: FourierKaratOperator) -> None:
        super().__init__()
        self.operator, self.num_heads = operator, operator.num_heads
        like = next(operator.parameters())
        self.psi_constant = nn.Parameter(like.new_empty(operator.num_heads))
        self.psi_cos = nn.Parameter(like.new_empty(operator.num_heads, operator.grid))
        self.psi_sin = nn.Parameter(like.new_empty(operator.num_heads, operator.grid))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start near softmax."""
        constant, cos, sin = fourier_fit_of_exp(self.operator.grid)
        self.psi_constant.fill_(constant)
        self.psi_cos.copy_(cos.expand_as(self.psi_cos))
        self.psi_sin.copy_(sin.expand_as(self.psi_sin))
        if self.operator.proj is not None:
            nn.init.zeros_(self.operator.proj)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """O [B, h, N, d] of query, key and value [B, h, N, d]; bias and mask as in `karat_attention`."""
        output: Tensor = self.operator(query, key, value, bias, mask, attend=self._attend)
        return output

    def _attend(self, call: FourierCall) -> Tensor:
        implementation = self.operator.implementation
        kernel = content_kernel(call, implementation)
        if kernel == "cpu":
            return cpu.attend(call, self._psi()).to(output_dtype(call.value))
        low_rank = attend_call(call, implementation)
        heads = call.query, call.key, call.value
        if kernel == "triton":
            return triton_content.attend(*heads, self._psi().float()).to(low_rank.dtype) + low_rank
        return attend_rows(self._rule(), *heads, call.bias, call.mask, implementation == "reference") + low_rank

    def scores(self, query: Tensor, key: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """S [B, h, N, N], both parts."""
        low_rank = self.operator.scores(query, key, bias, mask)
        return rows_of_scores(self._rule(), query, key, bias, mask) + low_rank

    def function_of_score(self, scores: Tensor) -> Tensor:
        """psi(A) [..., h, n, N]."""
        return _psi_at(scores, self.psi_constant, self.psi_cos, self.psi_sin)

    def flops(self, tokens: int, width: int, masked: bool = False) -> int:
        """See `AttentionHeads`. The scores serve both parts."""
        added = self.num_heads * tokens * tokens * (2 * width + 4 * self.operator.grid)
        return self.operator.flops(tokens, width, masked) + added

    def refusal(self, width: int, device: torch.device, *, biased: bool = False, masked: bool = False) -> str | None:
        """See `AttentionHeads`."""
        return self.operator.refusal(width, device, biased=biased, masked=masked)

    def chosen(
        self, width: int, device: torch.device, *, biased: bool = False, masked: bool = False
    ) -> tuple[str, str | None]:
        """See `AttentionHeads`."""
        name, why = self.operator.chosen(width, device, biased=biased, masked=masked)
        return "triton, psi by streaming" if name == "triton" and (biased or masked) else name, why

    def _psi(self) -> Tensor:
        """psi / N of each head [h, 2 G + 1]."""
        return torch.cat((self.psi_constant[:, None], self.psi_cos, self.psi_sin), 1) / self.operator.num_tokens

    def _rule(self) -> Rule:
        parameters = self.psi_constant, self.psi_cos, self.psi_sin

        def rule(scores: Tensor, keep: Tensor | None) -> Tensor:
            psi = _psi_at(scores, *parameters) / scores.shape[-1]
            return psi if keep is None else psi * keep

        return rule


def _psi_at(scores: Tensor, constant: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """psi of scores [..., h, n, N], for a constant [h], cosines and sines [h, G] of each head."""
    constant, cos, sin = (x.to(scores.dtype)[..., None, None] for x in (constant, cos, sin))
    psi = constant.expand_as(scores)
    for m in range(cos.shape[1]):
        angle = (m + 1) * scores
        psi = psi + cos[:, m] * angle.cos() + sin[:, m] * angle.sin()
    return psi
