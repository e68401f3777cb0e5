"""Memory-lean KArAt attention in plain PyTorch, for any device and any feature basis.

O = S V = H (W^T V), so the N x N matrix S need never exist; H = sum_f f(A) C_f^T is summed tile by tile, and the
backward pass recomputes scores and features. Beside inputs and outputs only H [h, B, N, r] is kept, and the
features of one tile. A mask cuts entries of S, so with one S = H W^T is formed, by query rows.

Inside, arrays are head first ([h, B, N, ...]) and features lead ([F, h, B, rows, N]), so that each feature is
one contiguous matrix. Forward and backward are registered with torch.library: torch.compile takes each as one
opaque operation, and autograd knows the second as the derivative of the first.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from karat_scale.attention.bases import BASE_ACTIVATIONS, FeatureBasis, FourierBasis, feature_basis
from karat_scale.attention.precision import compute_dtype, full_precision
from karat_scale.attention.tiles import plan_tiles, workspace_budget

# BLAS multiplies by a matrix of 16 columns about as fast as by one of 12.
RANK_MULTIPLE = 16


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos_coef: Tensor,
    sin_coef: Tensor,
    proj: Tensor,
    base: str,
    bias: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """O [B, h, N, dv] in the value's dtype; differentiable once in everything but the mask."""
    dtype = compute_dtype(query, key, value, cos_coef, sin_coef, proj, bias)
    padding = -proj.shape[-1] % RANK_MULTIPLE
    coef = FourierBasis(cos_coef.shape[-1]).pack(cos_coef.to(dtype), sin_coef.to(dtype))
    coef = functional.pad(coef, (0, 0, 0, padding)).contiguous()
    proj = functional.pad(proj.to(dtype), (0, padding))
    forward = torch.ops.karat_scale.streaming_forward
    return forward(query, key, value, coef, proj, _as_4d(bias), _as_4d(mask), "fourier", base)[0]


def _as_4d(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor[(None,) * (4 - tensor.dim())]


class _Tiles:
    """The call cut into tiles: picks parts of the inputs and computes a tile's scores and features."""

    def __init__(
        self, query: Tensor, coef: Tensor, bias: Tensor | None, mask: Tensor | None, basis: FeatureBasis
    ) -> None:
        batch, heads, tokens, width = query.shape
        self.dtype, self.scale, self.basis = coef.dtype, width**-0.5, basis
        budget = workspace_budget(query.device)
        self.groups, self.rows = plan_tiles(batch, heads, tokens, basis.num_features, budget)
        self._bias = None if bias is None else bias.transpose(0, 1)
        self._mask = None if mask is None else mask.transpose(0, 1)
        self._features = self.room_for_features(query)

    def room_for_features(self, like: Tensor) -> Tensor:
        """An empty flat array that holds the features of any tile."""
        matrices = max(((h.stop - h.start) * (b.stop - b.start) for h, b in self.groups), default=0)
        rows = max(r.stop - r.start for r in self.rows)
        size = self.basis.num_features * matrices * rows * like.shape[2]
        return like.new_empty(size, dtype=self.dtype)

    def pick(self, tensor: Tensor, heads: slice, batch: slice) -> Tensor:
        """The group's part of a [B, h, ...] tensor, head first, in the dtype of computation."""
        return tensor[batch, heads].transpose(0, 1).to(self.dtype)

    def mask_of(self, heads: slice, batch: slice, rows: slice) -> Tensor | None:
        """The tile's part of the mask, broadcastable to its scores."""
        return None if self._mask is None else pick_broadcast(self._mask, heads, batch, rows)

    def scores(self, query: Tensor, key: Tensor, heads: slice, batch: slice, rows: slice) -> Tensor:
        """A [h, b, rows, N], zero where masked; `query` comes scaled."""
        scores = query[:, :, rows] @ key.mT
        if self._bias is not None:
            scores += pick_broadcast(self._bias, heads, batch, rows)
        mask = self.mask_of(heads, batch, rows)
        return scores if mask is None else scores.masked_fill_(~mask, 0)

    def features(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        """[F, h, b, rows, N], zero where masked, in an array the next tile overwrites."""
        shape = (self.basis.num_features, *scores.shape)
        values = self._features[: self.basis.num_features * scores.numel()].view(shape)
        self.basis.evaluate(scores, values)
        return values if mask is None else values.mul_(mask)


def pick_broadcast(tensor: Tensor, *where: slice) -> Tensor:
    """tensor[where], leaving dimensions of size 1 as they are."""
    return tensor[tuple(part if size > 1 else slice(None) for part, size in zip(where, tensor.shape, strict=False))]


def _flat_rows(tensor: Tensor) -> Tensor:
    """[..., b, rows, x] as [..., b rows, x]."""
    return tensor.flatten(-3, -2)


def _streaming_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coef: Tensor,
    proj: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    basis: str,
    base: str,
) -> tuple[Tensor, Tensor]:
    """O [B, h, N, dv] and H [h, B, N, r]."""
    batch_size, num_heads, tokens, _ = query.shape
    activation = BASE_ACTIVATIONS[base]
    with full_precision(query.device):
        tiles = _Tiles(query, coef, bias, mask, feature_basis(basis, coef.shape[0]))
        output = _empty_output(value)
        hidden = coef.new_empty(num_heads, batch_size, tokens, coef.shape[2])
        for heads, batch in tiles.groups:
            q, k, v = (tiles.pick(x, heads, batch) for x in (query, key, value))
            q = q * tiles.scale
            w = proj[heads, None]
            narrow_value = w.mT @ v
            for rows in tiles.rows:
                keep = tiles.mask_of(heads, batch, rows)
                scores = tiles.scores(q, k, heads, batch, rows)
                values = tiles.features(scores, keep)
                summed = (_flat_rows(values) @ coef[:, heads].mT).sum(0).view(*scores.shape[:3], -1)
                if activation is not None:
                    summed += activation.value(scores).sum(-1, keepdim=True)
                hidden[heads, batch, rows] = summed
                result = summed @ narrow_value if keep is None else (summed @ w.mT).mul_(keep) @ v
                output[batch, heads, rows] = result.transpose(0, 1)
    return output, hidden


def _streaming_backward(
    grad_output: Tensor,
    hidden: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coef: Tensor,
    proj: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    basis: str,
    base: str,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query, key, value, coef, proj, and of bias (empty unless `needs_bias`)."""
    activation = BASE_ACTIVATIONS[base]
    with full_precision(query.device):
        tiles = _Tiles(query, coef, bias, mask, feature_basis(basis, coef.shape[0]))
        upstream_room = tiles.room_for_features(query)
        grad_query, grad_key, grad_value = (torch.empty_like(x) for x in (query, key, value))
        grad_coef, grad_proj = torch.zeros_like(coef), torch.zeros_like(proj)
        grad_bias = coef.new_zeros(bias.shape if needs_bias and bias is not None else 0)
        for heads, batch in tiles.groups:
            q, k, v, grad_o = (tiles.pick(x, heads, batch) for x in (query, key, value, grad_output))
            q = q * tiles.scale
            readout = _Readout(v, proj[heads, None])
            grad_k = torch.zeros_like(k, memory_format=torch.contiguous_format)
            for rows in tiles.rows:
                keep = tiles.mask_of(heads, batch, rows)
                scores = tiles.scores(q, k, heads, batch, rows)
                values = tiles.features(scores, keep)
                grad_hidden = readout.pull_back(hidden[heads, batch, rows], grad_o[:, :, rows], keep)
                flat = _flat_rows(grad_hidden)
                grad_coef[:, heads] += flat.mT @ _flat_rows(values)
                upstream = upstream_room[: values.numel()].view(values.shape)
                torch.matmul(flat, coef[:, heads], out=_flat_rows(upstream))
                grad_scores = tiles.basis.pull_back(scores, values, upstream)
                if activation is not None:
                    grad_scores += activation.derivative(scores) * grad_hidden.sum(-1, keepdim=True)
                if keep is not None:
                    grad_scores *= keep
                if needs_bias:
                    part = pick_broadcast(grad_bias.transpose(0, 1), heads, batch, rows)
                    part += grad_scores.sum_to_size(part.shape)
                grad_q = (grad_scores @ k).mul_(tiles.scale)
                grad_query[batch, heads, rows] = grad_q.transpose(0, 1)
                grad_k += grad_scores.mT @ q[:, :, rows]
            grad_key[batch, heads] = grad_k.transpose(0, 1)
            grad_v, grad_w = readout.gradients()
            grad_value[batch, heads] = grad_v.transpose(0, 1)
            grad_proj[heads] += grad_w
    if bias is not None:
        grad_bias = grad_bias.to(bias.dtype)
    return grad_query, grad_key, grad_value, grad_coef, grad_proj, grad_bias


class _Readout:
    """The derivative of O = (H W^T * keep) V for one group, gathered over its row tiles."""

    def __init__(self, value: Tensor, proj: Tensor) -> None:
        self._value, self._proj = value, proj
        self._narrow_value = proj.mT @ value
        self._grad_narrow_value = torch.zeros_like(self._narrow_value)
        self._grad_value: Tensor | None = None
        self._grad_proj: Tensor | None = None

    def pull_back(self, hidden: Tensor, grad_output: Tensor, keep: Tensor | None) -> Tensor:
        """The gradient of the tile's H [h, b, rows, r]."""
        if keep is None:
            self._grad_narrow_value += hidden.mT @ grad_output
            return grad_output @ self._narrow_value.mT
        learned = (hidden @ self._proj.mT).mul_(keep)
        grad_learned = (grad_output @ self._value.mT).mul_(keep)
        grad_value, grad_proj = learned.mT @ grad_output, (grad_learned.mT @ hidden).sum(1)
        self._grad_value = grad_value if self._grad_value is None else self._grad_value.add_(grad_value)
        self._grad_proj = grad_proj if self._grad_proj is None else self._grad_proj.add_(grad_proj)
        return grad_learned @ self._proj

    def gradients(self) -> tuple[Tensor, Tensor]:
        """The gradients of V [h, b, N, dv] and W [h, N, r], the latter summed over the group's batch."""
        if self._grad_value is not None and self._grad_proj is not None:
            return self._grad_value, self._grad_proj
        grad_proj = (self._value @ self._grad_narrow_value.mT).sum(1)
        return self._proj @ self._grad_narrow_value, grad_proj


def _empty_output(value: Tensor) -> Tensor:
    """[B, h, N, dv] stored token by token, as the layers that merge the heads want it."""
    batch, heads, tokens, width = value.shape
    return value.new_empty(batch, tokens, heads, width).transpose(1, 2)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], *inputs[:7])
    ctx.basis, ctx.base = inputs[7:]


def _differentiate(ctx: Any, grad_output: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    needs_bias = ctx.needs_input_grad[5]
    backward = torch.ops.karat_scale.streaming_backward
    *grads, grad_bias = backward(grad_output, *ctx.saved_tensors, ctx.basis, ctx.base, needs_bias)
    return *grads, grad_bias if needs_bias else None, None, None, None


_library = torch.library.Library("karat_scale", "FRAGMENT")
_library.define(
    "streaming_forward(Tensor query, Tensor key, Tensor value, Tensor coef, Tensor proj, Tensor? bias, "
    "Tensor? mask, str basis, str base) -> (Tensor, Tensor)"
)
_library.define(
    "streaming_backward(Tensor grad_output, Tensor hidden, Tensor query, Tensor key, Tensor value, Tensor coef, "
    "Tensor proj, Tensor? bias, Tensor? mask, str basis, str base, bool needs_bias) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.impl("streaming_forward", _streaming_forward, "CompositeExplicitAutograd")
_library.impl("streaming_backward", _streaming_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("karat_scale::streaming_forward", lib=_library)
def _fake_forward(
    query: Tensor, key: Tensor, value: Tensor, coef: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, _width = query.shape
    return _empty_output(value), coef.new_empty(heads, batch, tokens, coef.shape[2])


@torch.library.register_fake("karat_scale::streaming_backward", lib=_library)
def _fake_backward(
    grad_output: Tensor,
    hidden: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coef: Tensor,
    proj: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    basis: str,
    base: str,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_bias = torch.empty_like(bias) if needs_bias and bias is not None else coef.new_empty(0)
    return (*(torch.empty_like(x) for x in (query, key, value, coef, proj)), grad_bias)


torch.library.register_autograd(
    "karat_scale::streaming_forward", _differentiate, setup_context=_setup_context, lib=_library
)
