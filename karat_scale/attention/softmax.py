"""Softmax attention with KArAt's arguments, and initial values with which KArAt's S is near softmax(A).

The attention is for heads that keep softmax. The initial values are for the Fourier operator, modular or of full rank.
In an untrained ViT scores are small, and there

    softmax(A) ~ (1 / N) (1 1^T + exp(A) P),  P = I - 1 1^T / N,

up to the spread of the rows' sums, which is of second order in A. A Fourier series of G harmonics fits exp(x), except
for a constant that P removes. Another one, of cosines, fits 1. So the full-rank form is softmax up to these fits.
The modular form has r - 1 units in addition to the constant's unit: P becomes U U^T, where the columns of U [N, r - 1]
are orthonormal and sum to zero. Unit j is phi_jq(x) = U_qj exp(x), and W_j = U_j / N. This is ours, not the paper's.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from karat_scale.attention.bases.fourier import GAINS


def softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """softmax(A) V [B, h, N, d] of query, key and value [B, h, N, d]; bias and mask as in `karat_attention`."""
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=_join(bias, mask, query))


def softmax_scores(query: Tensor, key: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """softmax(A) [B, h, N, N] of query and key [B, h, N, d]; bias and mask as in `karat_attention`."""
    raw = query @ key.mT / query.shape[-1] ** 0.5
    attn_mask = _join(bias, mask, query)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        raw = raw.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        raw = raw + attn_mask
    # A row that keeps no pair attends to nothing, as in scaled_dot_product_attention.
    weights: Tensor = raw.softmax(-1).nan_to_num(0)
    return weights


def _join(bias: Tensor | None, mask: Tensor | None, query: Tensor) -> Tensor | None:
    """Return bias and mask as PyTorch's one `attn_mask`, which must have N columns."""
    if bias is None:
        return None if mask is None else mask.expand(*mask.shape[:-2], *query.shape[2:3] * 2)
    bias = bias.to(query.dtype)
    joined = bias if mask is None else torch.where(mask, bias, -torch.inf)
    return joined.expand(*joined.shape[:-2], *query.shape[2:3] * 2)


# Half the width of the fitted range of scores: in an untrained ViT, their standard deviation is about 4e-4 D.
REACH = 0.5
POINTS = 201


@torch.no_grad()
def start_like_softmax(parameters: Mapping[str, Tensor], proj: Tensor | None) -> None:
    """Fill `cos_coef` and `sin_coef` [h, p, N, G], gains, and W [h, N, r] where the form has one, in place.

    Every head starts with the same values; only queries and keys differ. Raises ValueError if r is larger than N.
    """
    cos, sin = parameters["cos_coef"], parameters["sin_coef"]
    for name in GAINS:
        if name in parameters:
            parameters[name].fill_(1)
    tokens, grid = cos.shape[2:]
    exp_cos, exp_sin, one = (series.view(1, 1, -1) for series in fourier_fits(grid))
    if proj is None:
        centred = (torch.eye(tokens, dtype=torch.float64, device="cpu") - 1 / tokens) / tokens
        cos.copy_(centred.unsqueeze(-1) * exp_cos + one / tokens**2)
        sin.copy_(centred.unsqueeze(-1) * exp_sin)
        return
    modes = smooth_modes(tokens, proj.shape[2] - 1)
    weights = modes.mT.unsqueeze(-1)
    constant = (one / tokens).expand(1, tokens, grid)
    # A unit's functions and its column of W share their scale evenly, so that neither learns much faster.
    share = (float(torch.cat((exp_cos, exp_sin)).norm()) * tokens) ** -0.5
    cos.copy_(torch.cat((constant, share * weights * exp_cos)))
    sin.copy_(torch.cat((torch.zeros_like(constant), share * weights * exp_sin)))
    proj.copy_(torch.cat((modes.new_ones(tokens, 1), modes / share), 1) / tokens)


def fourier_fits(grid: int) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients [G], float64, by least squares over [-REACH, REACH].

    Returns cosines and sines of exp(x) minus a constant that does not matter, and the cosines of 1.
    """
    _, cos, sin = fourier_fit_of_exp(grid)
    x, phases = _phases(grid)
    one = torch.linalg.lstsq(phases.cos(), torch.ones_like(x), driver="gelsd").solution[:, 0]
    return cos, sin, one


def fourier_fit_of_exp(grid: int) -> tuple[float, Tensor, Tensor]:
    """The constant, cosines and sines [G], float64, that fit exp(x) best over [-REACH, REACH]."""
    x, phases = _phases(grid)
    features = torch.cat((phases.cos(), phases.sin(), torch.ones_like(x)), 1)
    # The harmonics of a large G are nearly dependent there; gelsd takes the smallest coefficients.
    exp = torch.linalg.lstsq(features, x.exp(), driver="gelsd").solution[:, 0]
    return float(exp[-1]), exp[:grid], exp[grid : 2 * grid]


def _phases(grid: int) -> tuple[Tensor, Tensor]:
    """Points x [POINTS, 1], and m x for each order [POINTS, G]."""
    x = torch.linspace(-REACH, REACH, POINTS, dtype=torch.float64, device="cpu").unsqueeze(1)
    return x, x * torch.arange(1, grid + 1, dtype=torch.float64, device="cpu")


def smooth_modes(tokens: int, count: int) -> Tensor:
    """U [N, count], float64: orthonormal columns that sum to zero, of class and register tokens and of low frequencies.

    N tokens are taken as the largest square of patches, with class and register tokens before it. Columns have the
    signs of the Gram-Schmidt process: LAPACK's signs differ between libraries, and checkpoints rely on the signs.
    Raises ValueError when there are fewer than `count` such columns.
    """
    if count >= tokens:
        raise ValueError(
            f"rank = {count + 1} is more than N = {tokens} tokens, which init = 'softmax_like' cannot fill; "
            "use a lower rank"
        )
    side = math.isqrt(tokens)
    prefix = tokens - side * side
    line = torch.arange(side, dtype=torch.float64, device="cpu")
    waves = torch.cos(math.pi * torch.outer(line + 0.5, line) / side)  # the cosine transform's, a column each
    frequency = (line.unsqueeze(1) ** 2 + line**2).flatten()
    patches = torch.kron(waves, waves)[:, frequency.argsort(stable=True)[1:]]
    apart = torch.eye(tokens, prefix, dtype=torch.float64, device="cpu")
    smooth = torch.cat((patches.new_zeros(prefix, patches.shape[1]), patches))
    columns = torch.cat((smooth.new_ones(tokens, 1), apart, smooth), 1)
    orthonormal, triangular = torch.linalg.qr(columns[:, : count + 1])
    modes: Tensor = (orthonormal * triangular.diagonal().sign())[:, 1:]
    return modes
