"""The projection of each row onto the probability simplex {x >= 0, sum x = 1}, and its derivative."""

import torch
from torch import Tensor


def project(rows: Tensor, keep: Tensor | None = None) -> Tensor:
    """max(y - lambda, 0) along the last dimension, with the lambda that makes it sum to one (paper, l1 projection).

    Entries whose `keep` is false are 0 and take no part; a row that keeps nothing is 0. A kept
    NaN or +infinity makes its row NaN.
    """
    lost = rows.detach().isnan() | (rows.detach() == torch.inf)
    lost = lost if keep is None else lost & keep
    if keep is not None:
        rows = rows.masked_fill(~keep, -torch.inf)
    descending = rows.detach().sort(-1, descending=True).values
    counts = torch.arange(1, rows.shape[-1] + 1, dtype=rows.dtype, device=rows.device)
    in_support = descending * counts > descending.cumsum(-1) - 1
    size = in_support.sum(-1, keepdim=True).clamp_(min=1)
    # The kept sum is taken of the rows themselves, so that autograd sees lambda.
    smallest = descending.gather(-1, size - 1)
    support = (rows >= smallest) & rows.isfinite()
    threshold = (torch.where(support, rows, 0).sum(-1, keepdim=True) - 1) / support.sum(-1, keepdim=True).clamp_(min=1)
    projected = torch.where(support, rows - threshold, 0)
    return projected.masked_fill(lost.any(-1, keepdim=True), torch.nan)


def pull_back(projected: Tensor, grad: Tensor) -> Tensor:
    """The gradient of the rows: on the support, less its mean there; elsewhere 0."""
    support = projected > 0
    kept = torch.where(support, grad, 0)
    mean = kept.sum(-1, keepdim=True) / support.sum(-1, keepdim=True).clamp_(min=1)
    return torch.where(support, grad - mean, 0)
