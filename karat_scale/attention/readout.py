"""O = (H W^T * keep) V for one head, and its derivative.

Without a mask O = H (W^T V), and the r x dv matrix W^T V stands for all keys. A mask cuts single entries of
S = H W^T, so then rows of S are formed, one tile at a time.
"""

import torch
from torch import Tensor

from karat_scale.attention.tiles import Tiling, pick_broadcast


def read_out(hidden: Tensor, value: Tensor, proj: Tensor) -> Tensor:
    """O [B, N, dv] of H [B, N, r], V [B, N, dv] and W [N, r]."""
    return torch.bmm(hidden, torch.bmm(_per_item(proj.mT, value), value))


def pull_back(hidden: Tensor, value: Tensor, proj: Tensor, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of H, V and W."""
    narrow = torch.bmm(_per_item(proj.mT, value), value)
    grad_narrow = torch.bmm(hidden.mT, grad_output)
    grad_hidden = torch.bmm(grad_output, narrow.mT)
    grad_value = torch.bmm(_per_item(proj, value), grad_narrow)
    return grad_hidden, grad_value, torch.bmm(value, grad_narrow.mT).sum(0)


def read_out_masked(hidden: Tensor, value: Tensor, proj: Tensor, mask: Tensor, head: int, tiling: Tiling) -> Tensor:
    """`read_out` under a mask broadcastable to [B, h, N, N]."""
    output = torch.empty_like(value)
    for batch, rows in tiling.tiles():
        keep = pick_broadcast(mask, head, batch, rows)
        learned = (hidden[batch, rows] @ proj.mT).mul_(keep)
        output[batch, rows] = torch.bmm(learned, value[batch])
    return output


def pull_back_masked(
    hidden: Tensor, value: Tensor, proj: Tensor, mask: Tensor, head: int, tiling: Tiling, grad_output: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`pull_back` under a mask broadcastable to [B, h, N, N]."""
    grad_hidden, grad_value, grad_proj = torch.empty_like(hidden), torch.zeros_like(value), torch.zeros_like(proj)
    for batch, rows in tiling.tiles():
        keep = pick_broadcast(mask, head, batch, rows)
        h, grad_o = hidden[batch, rows], grad_output[batch, rows]
        learned = (h @ proj.mT).mul_(keep)
        grad_learned = torch.bmm(grad_o, value[batch].mT).mul_(keep)
        grad_hidden[batch, rows] = grad_learned @ proj
        grad_value[batch] += torch.bmm(learned.mT, grad_o)
        grad_proj += torch.bmm(grad_learned.mT, h).sum(0)
    return grad_hidden, grad_value, grad_proj


def _per_item(matrix: Tensor, value: Tensor) -> Tensor:
    return matrix.expand(value.shape[0], -1, -1)
