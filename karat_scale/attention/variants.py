"""Attention that is not the paper's: the controls of all comparisons, and variants of KArAt.

The controls lack one part of what KArAt has. Static heads see neither queries nor keys. `WithoutScores` is KArAt whose
scores are all 0, so that S is a learned constant. `ScaledSoftmax` is softmax with the size of KArAt's S.

The variants: functions and a projector that vary smoothly over the image, and content addressing, a learned function of
each score added to the operator of low rank.

`attend_rows` computes O = S V in bounded memory, for any rule that makes rows of S from rows of scores.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from karat_scale.attention import flex
from karat_scale.attention.call import FourierCall, compute_dtype, full_precision, output_dtype
from karat_scale.attention.functional import attend_call, call_scores, content_kernel
from karat_scale.attention.kernels import cpu, triton_fourier
from karat_scale.attention.operator import (
    AttentionHeads,
    FourierHeads,
    FourierKaratOperator,
    LayerCall,
    WrappedHeads,
    plain_operator,
)
from karat_scale.attention.routes import Tiling, plan_tiles, workspace_budget
from karat_scale.attention.softmax import fourier_fit_of_exp, smooth_modes, softmax_attention, softmax_scores


class ControlHeads(AttentionHeads):
    """Heads with a single parameter, named by `parameter`, which has a part for each head.

    Args:
        num_tokens: N, class token included.
        num_heads: h.
        device, dtype: the device and dtype of the parameter.
    """

    parameter: str
    _shown = ("num_tokens", "num_heads")

    def __init__(
        self,
        num_tokens: int,
        num_heads: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_tokens, self.num_heads = num_tokens, num_heads
        setattr(self, self.parameter, nn.Parameter(torch.empty(self.shape(), device=device, dtype=dtype)))
        self.reset_parameters()

    def shape(self) -> tuple[int, ...]:
        """Return the shape of the parameter."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Give the parameter its initial values again."""
        raise NotImplementedError


class StaticHeads(ControlHeads):
    """S is a learned constant: `matrix` [h, N, N], the same for every image. It mixes positions and has no function.

    A gain of KArAt over softmax is the functions' work only if KArAt also gains over this. The matrix is drawn from
    N(0, 1 / N), so that O has the values' variance.
    """

    parameter = "matrix"
    token_axes = MappingProxyType({"matrix": (1, 2)})
    summed_axes = MappingProxyType({"matrix": (2,)})
    matrix: nn.Parameter

    def shape(self) -> tuple[int, ...]:
        """[h, N, N]."""
        return self.num_heads, self.num_tokens, self.num_tokens

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the matrix again."""
        nn.init.normal_(self.matrix, std=self.num_tokens**-0.5)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """O [B, h, N, d] of value [B, h, N, d]. Query, key and bias are ignored; a masked pair has S[k, q] = 0."""
        return (self._kept(mask).to(output_dtype(value)) @ value).to(output_dtype(value))

    def scores(self, query: Tensor, key: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """S [B, h, N, N], the same for each item."""
        kept = self._kept(mask)
        return kept.expand(query.shape[0], *kept.shape[-3:]).to(output_dtype(query))

    def flops(self, tokens: int, width: int, masked: bool = False) -> int:
        """See `AttentionHeads`."""
        return 2 * self.num_heads * tokens * tokens * width

    def _kept(self, mask: Tensor | None) -> Tensor:
        return self.matrix if mask is None else self.matrix * mask


class WithoutScores(WrappedHeads):
    """An operator on A = 0. It has the operator's parameters and initial values, but sees neither queries nor keys.

    A gain of KArAt over this comes from what its functions do with the scores. Its operations count as if the scores
    were not 0.
    """

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

    @property
    def reach(self) -> float:
        """See `AttentionHeads`."""
        return math.inf

    def refusal(self, layer: LayerCall) -> str | None:
        """See `AttentionHeads`."""
        return super().refusal(layer._replace(biased=False))

    def chosen(self, layer: LayerCall) -> tuple[str, str | None]:
        """See `AttentionHeads`."""
        return super().chosen(layer._replace(biased=False))


class ScaledSoftmax(ControlHeads):
    """S = g softmax(A), with a learned gain g per head, initially sqrt(N).

    A row of softmax sums to 1, so initially O is a mean of the values, with 1 / N of their variance if they are
    independent. KArAt and `StaticHeads` start with the full variance. Their gain over softmax may come only from that.
    """

    parameter = "gain"
    multiplies_parameters = False
    gain: nn.Parameter

    def shape(self) -> tuple[int, ...]:
        """[h]."""
        return (self.num_heads,)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the gains to sqrt(N)."""
        self.gain.fill_(self.num_tokens**0.5)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """O [B, h, N, d] of query, key and value [B, h, N, d]; bias and mask as in `karat_attention`."""
        return self._scaled(softmax_attention(query, key, value, bias, mask))

    def scores(self, query: Tensor, key: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """S [B, h, N, N]."""
        return self._scaled(softmax_scores(query, key, bias, mask))

    def flops(self, tokens: int, width: int, masked: bool = False) -> int:
        """See `AttentionHeads`."""
        return 4 * self.num_heads * tokens * tokens * width

    def _scaled(self, heads: Tensor) -> Tensor:
        return heads * self.gain.to(heads.dtype)[:, None, None]


class BiasedSoftmax(ControlHeads):
    """S = softmax(A + B), with a learned bias B [h, N, N] of each pair of positions, which starts at 0.

    Softmax that can mix positions as `StaticHeads` does, and weigh them by content at the same time. Swin
    (arXiv 2103.14030) and BEiT (arXiv 2106.08254) share such a bias among all pairs at the same offset; here each pair
    has its own.
    """

    parameter = "position_bias"
    multiplies_parameters = False
    token_axes = MappingProxyType({"position_bias": (1, 2)})
    position_bias: nn.Parameter

    def shape(self) -> tuple[int, ...]:
        """[h, N, N]."""
        return self.num_heads, self.num_tokens, self.num_tokens

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the bias to 0, which gives softmax."""
        nn.init.zeros_(self.position_bias)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """O [B, h, N, d] of query, key and value [B, h, N, d]; the layer's bias and mask as in `karat_attention`."""
        output = softmax_attention(query, key, value, self._added(bias), mask)
        # PyTorch's attention of an empty batch gives its mask no gradient.
        return output if query.shape[0] else output + 0 * self.position_bias.sum()

    def scores(self, query: Tensor, key: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """S [B, h, N, N]."""
        return softmax_scores(query, key, self._added(bias), mask)

    def flops(self, tokens: int, width: int, masked: bool = False) -> int:
        """See `AttentionHeads`."""
        return 4 * self.num_heads * tokens * tokens * width

    def _added(self, bias: Tensor | None) -> Tensor:
        return self.position_bias if bias is None else bias + self.position_bias


# Rows of S [..., n, N] from scores [..., n, N] and, with a mask, from which pairs take part [..., n, N]. A rule holds
# the parameters of its call: the backward pass computes rows again, and the module may have other parameters by then.
Rule = Callable[[Tensor, Tensor | None], Tensor]
# Tensors of the size of the scores that a rule holds at once, roughly.
HELD = 4
_plans = False


@contextmanager
def planning() -> Iterator[None]:
    """Let `attend_rows` compute only the first row of O, and return it for all rows.

    The number of tiles follows from the batch and the device, so a trace of them would fit no other batch.
    """
    global _plans  # not a context variable, which torch.compile cannot trace
    before, _plans = _plans, True
    try:
        yield
    finally:
        _plans = before


def attend_rows(
    rule: Rule,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    whole: bool = False,
) -> Tensor:
    """O [B, h, N, d] = rule(A) V with A = Q K^T / sqrt(d) + bias, a tile of query rows at a time.

    The backward pass computes each tile again, so nothing of size N x N is kept. Parameters of the rule learn. Scores
    and S are float32, or float64 where an input is. The result has the dtype that PyTorch's attention would have.
    `whole` makes one tile of everything, which a tracer can record for any batch.
    """
    dtype = compute_dtype(query, key, value, bias)
    batch, heads, tokens, _ = query.shape
    with full_precision(query.device):
        q, k, v = (x.to(dtype) for x in (query, key, value))
        if whole or batch == 0 or torch.jit.is_tracing() or torch.compiler.is_exporting():  # keeps the number of tiles
            tiling = Tiling([slice(None)], [slice(None)])
        elif _plans:
            tiling = Tiling([slice(0, 1)], [slice(0, 1)])
        else:
            tiling = plan_tiles(batch, tokens, heads * key.shape[2] * HELD, workspace_budget(query.device))

        def attend(items: slice, rows: slice) -> Tensor:
            scores, keep = _scores(q, k, bias, mask, items, rows)
            return rule(scores, keep) @ v[items]

        def again(items: slice, rows: slice) -> Tensor:
            if not torch.is_grad_enabled():
                return attend(items, rows)
            output: Tensor = checkpoint(attend, items, rows, use_reentrant=False, preserve_rng_state=False)
            return output

        parts = [torch.cat([again(items, rows) for rows in tiling.rows], 2) for items in tiling.batches]
        output = parts[0] if len(parts) == 1 else torch.cat(parts)
        if _plans and not whole:
            output = output.expand_as(v).clone()
    return output.to(output_dtype(value))


def rows_of_scores(
    rule: Rule, query: Tensor, key: Tensor, bias: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """S [B, h, N, N], whole, for analysis: `attend_rows` with the same arguments is S @ value."""
    dtype = compute_dtype(query, key, bias)
    with full_precision(query.device):
        everything = slice(0, query.shape[0]), slice(0, query.shape[2])
        learned = rule(*_scores(query.to(dtype), key.to(dtype), bias, mask, *everything))
    return learned.to(output_dtype(query))


def _scores(
    query: Tensor, key: Tensor, bias: Tensor | None, mask: Tensor | None, items: slice, rows: slice
) -> tuple[Tensor, Tensor | None]:
    scores = query[items, :, rows] @ key[items].mT / query.shape[-1] ** 0.5
    if bias is not None:
        scores = scores + _tile(bias, items, rows).to(scores.dtype)
    if mask is None:
        return scores, None
    keep = _tile(mask, items, rows)
    # The score of a masked pair may be infinite, and harmonics of infinity are nan.
    return scores.masked_fill(~keep, 0), keep


def _tile(pairs: Tensor, items: slice, rows: slice) -> Tensor:
    """The tile of a tensor that broadcasts to [B, h, N, N]."""
    if pairs.dim() > 1 and pairs.shape[-2] > 1:
        pairs = pairs[..., rows, :]
    return pairs[items] if pairs.dim() > 3 and pairs.shape[0] > 1 else pairs


def mode_columns(tokens: int, count: int) -> Tensor:
    """M [N, K], float64: orthonormal columns. Raises ValueError when there are fewer than K modes."""
    if count > tokens:
        raise ValueError(f"modes = {count} is more than N = {tokens} tokens; use fewer")
    constant = torch.full((tokens, 1), tokens**-0.5, dtype=torch.float64, device="cpu")
    return torch.cat((constant, smooth_modes(tokens, count - 1)), 1)


class SmoothOperator(FourierHeads):
    """The modular Fourier operator with coefficients and W expanded from K modes of the patch grid.

    a_pqm = sum_j M_qj c_pjm and W = M w. The orthonormal columns of M [N, K] are the constant, class and register
    tokens, and the lowest frequencies of the cosine transform over the grid. Ours, not the paper's: N / K times fewer
    parameters.

    Args:
        num_tokens: N, class token included.
        num_heads: h.
        rank: r.
        grid: G.
        modes: K.
        implementation: as in `fourier_karat_attention`.
        device, dtype: the device and dtype of `cos_modes` and `sin_modes` [h, r, K, G] and `proj_modes` [h, K, r].

    Raises ValueError when there are fewer than K modes.
    """

    token_axes = MappingProxyType({"modes": (0,)})
    modes: Tensor

    def __init__(
        self,
        num_tokens: int,
        num_heads: int,
        rank: int = 12,
        grid: int = 3,
        modes: int = 16,
        implementation: str = "auto",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_tokens, self.num_heads, self.rank, self.grid = num_tokens, num_heads, rank, grid
        self.num_modes, self.implementation = modes, implementation
        columns = mode_columns(num_tokens, modes)
        kept = torch.get_default_dtype() if dtype is None else dtype
        # The buffer is also in checkpoints, where it shows N.
        where = torch.get_default_device() if device is None else device
        self.register_buffer("modes", columns.to(where, kept))

        def room(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.cos_modes = room(num_heads, rank, modes, grid)
        self.sin_modes = room(num_heads, rank, modes, grid)
        self.proj_modes = room(num_heads, modes, rank)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the parameters again, with the variance of each function and of W that the plain operator starts with.

        The functions of different keys are not independent. So the variance of H and O is N / K times the plain
        operator's while scores are near 0, and 1.4 times over standard normal scores (N = 65, K = 16).
        """
        # A row of M has a mean square of 1 / N, so K modes give K / N of a mode's variance.
        share = (self.num_tokens / self.num_modes) ** 0.5
        for coef in (self.cos_modes, self.sin_modes):
            nn.init.normal_(coef, std=share * (self.num_tokens * self.grid) ** -0.5)
        nn.init.normal_(self.proj_modes, std=share * (self.num_tokens * self.rank) ** -0.5)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """O [B, h, N, d] of query, key and value [B, h, N, d]; bias and mask as in `fourier_karat_attention`."""
        return attend_call(FourierCall(query, key, value, *self._expanded(), bias, mask), self.implementation)

    def scores(self, query: Tensor, key: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """S [B, h, N, N]."""
        return call_scores(FourierCall(query, key, query, *self._expanded(), bias, mask), self.implementation)

    @torch.no_grad()
    def plain(self) -> FourierKaratOperator:
        """Return the plain operator that computes the same."""
        return plain_operator(*self._expanded())

    def extra_repr(self) -> str:
        """The settings, in the constructor's names."""
        return (
            f"num_tokens={self.num_tokens}, num_heads={self.num_heads}, rank={self.rank}, grid={self.grid}, "
            f"modes={self.num_modes}, implementation={self.implementation!r}"
        )

    def _expanded(self) -> tuple[Tensor, Tensor, Tensor]:
        """cos_coef and sin_coef [h, r, N, G], and W [h, N, r]."""
        kept = self.cos_modes, self.sin_modes, self.proj_modes
        dtype = compute_dtype(*kept)
        with full_precision(self.modes.device):
            modes, cos, sin, proj = (x.to(dtype) for x in (self.modes, *kept))
            cos, sin = (torch.einsum("qj,hpjm->hpqm", modes, x) for x in (cos, sin))
            return cos, sin, modes @ proj


class ContentOperator(WrappedHeads):
    """S[k, q] = psi(A[k, q]) / N + sum_p H[k, p] W[q, p]: the full-rank form, structured as diagonal plus low rank.

    In the paper's modular form S[k, q] depends on all scores of query k and not on A[k, q] itself, so a query cannot
    ask for the tokens that answer it. psi(x) = c + sum_{m=1..G} a_m cos(m x) + b_m sin(m x), with 2 G + 1 numbers for
    each head, adds that. Ours, not the paper's. It starts near softmax: psi is fitted to exp over small scores (softmax
    up to its denominator), and W is 0.

    Args:
        operator: the operator with H and W; its W is set to 0.
    """

    operator: FourierKaratOperator

    def __init__(self, operator: FourierKaratOperator) -> None:
        super().__init__(operator)
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
            return triton_fourier.attend_psi(*heads, self._psi().float()).to(low_rank.dtype) + low_rank
        if kernel == "flex":
            return flex.attend_psi(*heads, self._psi()).to(low_rank.dtype) + low_rank
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
        return super().flops(tokens, width, masked) + added

    def chosen(self, layer: LayerCall) -> tuple[str, str | None]:
        """See `AttentionHeads`."""
        name, why = super().chosen(layer)
        streams_psi = name in ("cpu", "triton", "flex") and (layer.biased or layer.masked)
        return f"{name}, psi by streaming" if streams_psi else name, why

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
