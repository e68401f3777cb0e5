"""Floating-point operations of KArAt's forms, as their equations require, whatever implementation computes them."""

import torch

from karat_scale.attention.bases import Basis, FeatureBasis
from karat_scale.attention.forms import Simplex


def karat_flops(
    basis: Basis,
    form: str,
    heads: int,
    rank: int,
    tokens: int,
    width: int,
    *,
    simplex: Simplex = False,
    masked: bool = False,
) -> int:
    """Return the forward operations on one item of N tokens and heads of width d; a multiply-add is two.

    Modular, per head: 2 N^2 d for the scores, 2 K N^2 r for H, 4 N r d for O = H (W^T V); in the Fourier basis K = 2 G.
    A mask or the simplex needs the rows of S = H W^T.
    """
    n, d, r = tokens, width, rank
    function = 2 * coefficients_of(basis)
    scores = values = 2 * n * n * d
    if form == "modular":
        output = 2 * n * n * r + values if simplex is True or masked else 4 * n * r * d
        head = scores + function * n * n * r + output
    elif form == "project_first":
        head = 4 * n * r * d + function * n * n * r + values
    elif form == "two_operators":
        head = scores + 2 * function * n * n * r + values
    else:
        rows = function * n**3 + values
        # Without a W, O = sum_f f(A) (C_f^T V) can take fewer operations than forming S.
        spread = 2 * function * n * n * d
        can_spread = isinstance(basis, FeatureBasis) and not (simplex or masked)
        head = scores + (min(rows, spread) if can_spread else rows)
    return head * heads


def coefficients_of(basis: Basis) -> int:
    """Return K: multiply-adds per evaluation of one learnable function."""
    if isinstance(basis, FeatureBasis):
        return basis.num_features
    return sum(torch.Size(shape).numel() for shape in basis.shapes(1, 1, 1).values())
