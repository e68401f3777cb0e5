"""The equations of the operators, materialised: the oracle of every other implementation."""

import torch
from torch import Tensor

from karat_scale.attention import call as simplex
from karat_scale.attention.bases import BASE_ACTIVATIONS, Basis, ElementwiseBasis, FeatureBasis
from karat_scale.attention.call import FourierCall, UnitsCall, compute_dtype, full_precision


def attend(call: FourierCall) -> Tensor:
    """O = S V [B, h, N, dv], in float32 or, with any float64 input, in float64."""
    learned = scores(call)
    with full_precision(call.query.device):
        dtype = torch.promote_types(learned.dtype, call.value.dtype)
        return learned.to(dtype) @ call.value.to(dtype)


def scores(call: FourierCall) -> Tensor:
    """S = H W^T [B, h, N, N] with H[k, p] = sum_q phi_pq(A[k, q]) (arXiv 2503.10632, section 4).

    Holds the B h N N G features at once. float32 or, with any float64 input but the value, float64.
    """
    query, key, _, cos_coef, sin_coef, proj, bias, mask, base = call
    dtype = compute_dtype(query, key, cos_coef, sin_coef, proj, bias)
    query, key, cos_coef, sin_coef, proj = (x.to(dtype) for x in (query, key, cos_coef, sin_coef, proj))
    with full_precision(query.device):
        raw = query @ key.mT / query.shape[-1] ** 0.5
        if bias is not None:
            raw = raw + bias.to(dtype)
        if mask is not None:
            raw = raw.masked_fill(~mask, 0)
        orders = torch.arange(1, cos_coef.shape[-1] + 1, dtype=dtype, device=raw.device)
        angles = raw.unsqueeze(-1) * orders
        keep = torch.ones_like(raw) if mask is None else mask.to(dtype).expand_as(raw)
        hidden = torch.einsum("bhkqm,bhkq,hpqm->bhkp", angles.cos(), keep, cos_coef)
        hidden = hidden + torch.einsum("bhkqm,bhkq,hpqm->bhkp", angles.sin(), keep, sin_coef)
        activation = BASE_ACTIVATIONS[base]
        if activation is not None:
            hidden = hidden + (activation.value(raw) * keep).sum(-1, keepdim=True)
        return (hidden @ proj.mT) * keep


def attend_units(call: UnitsCall) -> Tensor:
    """O = S V of any basis; derivatives are autograd's.

    Holds every phi_pq(A[k, q]) at once. float32 or, with any float64 input, float64.
    """
    proj, bias, mask, cut, basis, base, on_simplex = call[4:]
    dtype = compute_dtype(*call[:6])
    query, key, value, coef = (x.to(dtype) for x in call[:4])
    with full_precision(query.device):
        raw = query @ key.mT / query.shape[-1] ** 0.5
        if bias is not None:
            raw = raw + bias.to(dtype)
        if mask is not None:
            raw = raw.masked_fill(~mask, 0)
        keep = torch.ones_like(raw) if mask is None else mask.to(dtype).expand_as(raw)
        rows = _units(raw, keep, coef, basis)
        activation = BASE_ACTIVATIONS[base]
        if activation is not None:
            rows = rows + (activation.value(raw) * keep).sum(-1, keepdim=True)
        if proj is not None:
            rows = rows @ proj.to(dtype).mT
        if on_simplex:
            return simplex.project(rows, cut) @ value
        return (rows if cut is None else rows * cut) @ value


def _units(raw: Tensor, keep: Tensor, coef: Tensor, basis: Basis) -> Tensor:
    """H [B, h, N, p] of scores [B, h, N, q], without the base activation."""
    if isinstance(basis, FeatureBasis):
        return torch.einsum("fbhkq,bhkq,hfpq->bhkp", torch.stack(list(basis.value(raw))), keep, coef)
    assert isinstance(basis, ElementwiseBasis)
    theta = coef.unsqueeze(2).unbind(1)
    return (basis.value(raw.unsqueeze(3), *theta) * keep.unsqueeze(3)).sum(-1)
