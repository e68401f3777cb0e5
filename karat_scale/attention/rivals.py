"""Published attention to compare with, and two rivals of our own.

Published: sigmoid and polynomial attention, which replace softmax by a function of each score; gated attention, whose
heads can be switched off by their input; differential attention, the difference of two softmaxes.

Ours: `QueryOnly` keeps KArAt's functions and W but has no scores, so that nothing is N x N. `Centred` moves the part of
S that all queries share, nearly all of a trained KArAt's S, into a separate matrix.
"""

import math
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from karat_scale.attention import flex
from karat_scale.attention.call import FourierCall, compute_dtype, full_precision, output_dtype
from karat_scale.attention.functional import call_scores
from karat_scale.attention.operator import AttentionHeads, FourierKaratOperator, InputHeads, LayerCall, WrappedHeads
from karat_scale.attention.softmax import softmax_attention, softmax_scores
from karat_scale.attention.variants import Rule, attend_rows, rows_of_scores

_BIAS_OR_MASK = "it has no bias and no mask for these kinds"


class PointwiseHeads(AttentionHeads):
    """S is a fixed function of each score, without parameters; a masked pair has S[k, q] = 0. See `function_of_score`.

    Args:
        num_tokens: N, class token included.
        num_heads: h.
        implementation: "flex" is PyTorch's FlexAttention, without bias or mask; "reference" forms all of S; any other
            name forms a tile of rows at a time.
    """

    kind: str
    _shown = ("num_tokens", "num_heads", "implementation")

    def __init__(self, num_tokens: int, num_heads: int, implementation: str = "auto") -> None:
        super().__init__()
        self.num_tokens, self.num_heads = num_tokens, num_heads
        self.implementation = implementation if implementation in ("flex", "reference") else "auto"

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """O [B, h, N, d] of query, key and value [B, h, N, d]; bias and mask as in `karat_attention`.

        Raises ValueError for a bias or a mask if the implementation is FlexAttention.
        """
        if self.implementation != "flex":
            return attend_rows(self._rule(), query, key, value, bias, mask, self.implementation == "reference")
        if bias is not None or mask is not None:
            raise ValueError(f"implementation = 'flex' cannot take this call: {_BIAS_OR_MASK}")
        output = flex.attend_pointwise(self.kind, self.num_tokens, query, key, value)
        return output.to(output_dtype(value))

    def scores(self, query: Tensor, key: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """S [B, h, N, N]."""
        return rows_of_scores(self._rule(), query, key, bias, mask)

    def flops(self, tokens: int, width: int, masked: bool = False) -> int:
        """See `AttentionHeads`."""
        return 4 * self.num_heads * tokens * tokens * width

    def refusal(self, layer: LayerCall) -> str | None:
        """See `AttentionHeads`."""
        if self.implementation != "flex":
            return None
        if layer.biased or layer.masked:
            return _BIAS_OR_MASK
        width = flex.width_refusal(layer.width) if layer.device.type == "cuda" else None
        return width or flex.device_refusal(layer.device, layer.width)

    def _rule(self) -> Rule:
        def rule(scores: Tensor, keep: Tensor | None) -> Tensor:
            weights = self.function_of_score(scores)
            assert weights is not None
            return weights if keep is None else weights * keep

        return rule


class SigmoidHeads(PointwiseHeads):
    """S = sigmoid(A - log N), sigmoid attention (arXiv 2409.04431).

    The bias makes a row of S sum to about 1 at the start. It is fixed, as in the authors' code.
    """

    kind = "sigmoid"

    def function_of_score(self, scores: Tensor) -> Tensor:
        """sigmoid(A - log N) [..., h, n, N]."""
        return (scores - math.log(self.num_tokens)).sigmoid()


class PolynomialHeads(PointwiseHeads):
    """S = A^3 / sqrt(N), polynomial attention (arXiv 2410.18613: A^p / sqrt(N)) with p = 3.

    The scale keeps the Frobenius norm of S of the order sqrt(N), as softmax's is.
    """

    kind = "polynomial"

    def function_of_score(self, scores: Tensor) -> Tensor:
        """A^3 / sqrt(N) [..., h, n, N]."""
        weights: Tensor = scores**3 / self.num_tokens**0.5
        return weights


class GatedHeads(InputHeads):
    """O = sigmoid(x w) softmax(A) V, gated attention (arXiv 2505.06708), in its form with one gate per head.

    Args:
        num_heads: h.
        embed_dim: D, the width of the layer's input x.
        device, dtype: the device and dtype of `gate_weight` w [h, D].
    """

    _shown = ("num_heads", "embed_dim")
    multiplies_parameters = False

    def __init__(
        self,
        num_heads: int,
        embed_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.embed_dim = num_heads, embed_dim
        self.gate_weight = nn.Parameter(torch.empty((num_heads, embed_dim), device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise like timm's linear layers, with gates near 1/2."""
        nn.init.trunc_normal_(self.gate_weight, std=0.02)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        x: Tensor,
    ) -> Tensor:
        """O [B, h, N, d] of query, key and value [B, h, N, d] and the layer's input [B, N, D]."""
        output = softmax_attention(query, key, value, bias, mask)
        gates = nn.functional.linear(x, self.gate_weight.to(x.dtype)).sigmoid()
        return output * gates.mT.unsqueeze(-1).to(output.dtype)

    def flops(self, tokens: int, width: int, masked: bool = False) -> int:
        """See `AttentionHeads`."""
        return 4 * self.num_heads * tokens * tokens * width + 2 * tokens * self.gate_weight.numel()


class DifferentialHeads(AttentionHeads):
    """S = softmax(A_1) - lambda softmax(A_2), differential attention (arXiv 2410.05258).

    The two scores are of the two halves of query and key. O is 0.2 RMSNorm(S V) by head, and lambda =
    exp(l_q1 l_k1) - exp(l_q2 l_k2) + 0.8. The paper's 0.8 falls to 0.2 towards the first block; it also tries 0.8 in
    all blocks, and calls its results relatively robust to that. Each head learns its own lambda and norm; the paper's
    heads share them.

    Args:
        num_heads: h.
        width: d, which must be even.
        device, dtype: the device and dtype of the parameters, four `lambda_*` [h, d / 2] and `norm_weight` [h, d].
    """

    _shown = ("num_heads", "width")
    is_linear = False
    multiplies_parameters = False
    start = 0.8
    epsilon = 1e-5

    def __init__(
        self,
        num_heads: int,
        width: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if width % 2:
            raise ValueError(f"kind = differential needs heads of an even width, not {width}; use another num_heads")
        self.num_heads, self.width = num_heads, width

        def room(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.lambda_q1, self.lambda_k1 = room(num_heads, width // 2), room(num_heads, width // 2)
        self.lambda_q2, self.lambda_k2 = room(num_heads, width // 2), room(num_heads, width // 2)
        self.norm_weight = room(num_heads, width)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the parameters again, as the paper does."""
        for part in (self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2):
            nn.init.normal_(part, std=0.1)
        nn.init.ones_(self.norm_weight)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """O [B, h, N, d] of query, key and value [B, h, N, d]; bias and mask as in `karat_attention`, of both parts."""
        halves = zip(query.chunk(2, -1), key.chunk(2, -1), strict=True)
        first, second = (softmax_attention(q, k, value, bias, mask) for q, k in halves)
        output = first - self._factor().to(first.dtype) * second
        normed = nn.functional.rms_norm(output, output.shape[-1:], eps=self.epsilon)
        return (normed * ((1 - self.start) * self.norm_weight)[:, None]).to(output.dtype)

    def scores(self, query: Tensor, key: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """S [B, h, N, N], before the norm."""
        halves = zip(query.chunk(2, -1), key.chunk(2, -1), strict=True)
        first, second = (softmax_scores(q, k, bias, mask) for q, k in halves)
        return first - self._factor().to(first.dtype) * second

    def flops(self, tokens: int, width: int, masked: bool = False) -> int:
        """See `AttentionHeads`."""
        return 4 * self.num_heads * tokens * tokens * width  # two products of half the width, and one with V

    def _factor(self) -> Tensor:
        """lambda [h, 1, 1]."""
        first = (self.lambda_q1 * self.lambda_k1).sum(-1).exp()
        second = (self.lambda_q2 * self.lambda_k2).sum(-1).exp()
        return (first - second + self.start)[:, None, None]


class QueryOnly(AttentionHeads):
    """S = H W^T where H[k] is a KAN layer of only the query: H[k, p] = sum_i phi_pi(Q[k, i]), a Fourier series each.

    KArAt without scores: each token weights r mixtures of all values by its query, and sees no key. The cost grows with
    N, not with its square. A bias of pairs has no effect; with a mask, S is formed. Ours, not the paper's.

    Args:
        num_tokens: N, class token included.
        num_heads: h.
        width: d.
        rank: r.
        grid: G.
        device, dtype: the device and dtype of `query_cos` and `query_sin` [h, r, d, G], and of W, `proj` [h, N, r].
    """

    _shown = ("num_tokens", "num_heads", "width", "rank", "grid")
    token_axes = MappingProxyType({"proj": (1,)})
    summed_axes = MappingProxyType({"proj": (1,)})

    def __init__(
        self,
        num_tokens: int,
        num_heads: int,
        width: int,
        rank: int = 12,
        grid: int = 3,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_tokens, self.num_heads, self.width, self.rank, self.grid = num_tokens, num_heads, width, rank, grid

        def room(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.query_cos, self.query_sin = (room(num_heads, rank, width, grid) for _ in range(2))
        self.proj = room(num_heads, num_tokens, rank)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the parameters again, so that O has the values' variance."""
        for coef in (self.query_cos, self.query_sin):
            nn.init.normal_(coef, std=(self.width * self.grid) ** -0.5)
        nn.init.normal_(self.proj, std=(self.num_tokens * self.rank) ** -0.5)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """O [B, h, N, d] of query and value [B, h, N, d]. Key and bias are ignored; a masked pair has S[k, q] = 0."""
        dtype = compute_dtype(query, value)
        with full_precision(query.device):
            if mask is None:
                output = self._units(query.to(dtype)) @ (self.proj.to(dtype).mT @ value.to(dtype))
            else:
                output = self._matrix(query.to(dtype), mask) @ value.to(dtype)
        return output.to(output_dtype(value))

    def scores(self, query: Tensor, key: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """S [B, h, N, N]."""
        with full_precision(query.device):
            matrix = self._matrix(query.to(compute_dtype(query)), mask)
        return matrix.to(output_dtype(query))

    def flops(self, tokens: int, width: int, masked: bool = False) -> int:
        """See `AttentionHeads`."""
        units = 4 * tokens * width * self.grid * self.rank
        product = 2 * tokens * tokens * (self.rank + width) if masked else 4 * tokens * self.rank * width
        return self.num_heads * (units + product)

    def _units(self, query: Tensor) -> Tensor:
        """H [B, h, N, r]."""
        orders = torch.arange(1, self.grid + 1, dtype=query.dtype, device=query.device)
        angles = (query.unsqueeze(-1) * orders).flatten(-2)  # [B, h, N, d G]
        features = torch.cat((angles.cos(), angles.sin()), -1)
        coef = torch.cat((self.query_cos.flatten(-2), self.query_sin.flatten(-2)), -1)
        return features @ coef.to(query.dtype).mT

    def _matrix(self, query: Tensor, mask: Tensor | None) -> Tensor:
        matrix = self._units(query) @ self.proj.to(query.dtype).mT
        return matrix if mask is None else matrix * mask


class Centred(WrappedHeads):
    """S = L R^T + (K - mean over queries of K), where K = H W^T is KArAt's modular Fourier operator.

    More than nine tenths of the energy of a trained KArAt's S is the same row for every query. Here that part, and all
    else that is the same for every image, is a learned matrix of rank r, and the functions learn what differs between
    queries. O needs no N x N matrix: the mean over queries of K V is the mean of the operator's output. With a mask, S
    is formed, and masked pairs are 0 in K and in S. Ours, not the paper's.

    Args:
        num_tokens: N, class token included.
        num_heads: h.
        rank: the rank r of both parts.
        grid: G.
        base, init, implementation: as in `FourierKaratOperator`.
        device, dtype: the device and dtype of the operator, and of `left` L and `right` R [h, N, r].
    """

    token_axes = MappingProxyType({"left": (1,), "right": (1,)})
    summed_axes = MappingProxyType({"right": (1,)})
    operator: FourierKaratOperator

    def __init__(
        self,
        num_tokens: int,
        num_heads: int,
        rank: int = 12,
        grid: int = 3,
        base: str = "zero",
        init: str = "variance_preserving",
        implementation: str = "auto",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(FourierKaratOperator(num_tokens, num_heads, rank, grid, base, init, implementation, **factory))
        self.num_tokens = num_tokens
        self.left, self.right = (nn.Parameter(torch.empty((num_heads, num_tokens, rank), **factory)) for _ in range(2))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the parameters again; L R^T starts with the variance of a learned constant S."""
        self.operator.reset_parameters()
        tokens, rank = self.left.shape[1:]
        for factor in (self.left, self.right):
            nn.init.normal_(factor, std=(tokens * rank) ** -0.25)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """O [B, h, N, d] of query, key and value [B, h, N, d]; bias and mask as in `karat_attention`."""
        if mask is not None:
            matrix = self._centred(self.operator(query, key, value, bias, mask, attend=self._form), mask)
            return matrix.to(output_dtype(value)) @ value.to(output_dtype(value))
        learned: Tensor = self.operator(query, key, value, bias)
        dtype = compute_dtype(value)
        with full_precision(value.device):
            left, right, wide = (x.to(dtype) for x in (self.left, self.right, learned))
            output = left @ (right.mT @ value.to(dtype)) + wide - wide.mean(2, keepdim=True)
        return output.to(learned.dtype)

    def scores(self, query: Tensor, key: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """S [B, h, N, N]."""
        return self._centred(self.operator.scores(query, key, bias, mask), mask)

    def flops(self, tokens: int, width: int, masked: bool = False) -> int:
        """See `AttentionHeads`."""
        rank = self.operator.rank
        added = 2 * tokens * tokens * rank if masked else 4 * tokens * rank * width
        return super().flops(tokens, width, masked) + self.num_heads * added

    def _form(self, call: FourierCall) -> Tensor:
        return call_scores(call, self.operator.implementation)

    def _centred(self, learned: Tensor, mask: Tensor | None) -> Tensor:
        matrix = (self.left @ self.right.mT).to(learned.dtype) + learned - learned.mean(2, keepdim=True)
        return matrix if mask is None else matrix * mask
