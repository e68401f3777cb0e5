"""Lets the attention of a model give what other attention gave in its place, block by block.

The original's attention and the new one get the same query, key and value: those that the original model has there. So
all blocks are independent of each other, and no error of one block reaches the next. Two ways bring O = S V closer:

Least squares, for heads with O = F C W^T V, where F are the harmonics of the scores, or of the query, and C the
coefficients. O is linear in C for a given W, and in W for a given C, so the two are solved for alternately, in float64.
W starts with the directions in which the original's S has most of its energy. A constant S needs one solution.

Gradient descent, for all parameters of any heads.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from karat_scale.attention.bases import Fourier
from karat_scale.attention.bound import BoundedHeads
from karat_scale.attention.operator import FourierKaratOperator, HybridHeads, layer_input
from karat_scale.attention.rivals import QueryOnly
from karat_scale.attention.softmax import softmax_attention, softmax_scores
from karat_scale.attention.variants import SmoothOperator, StaticHeads, WithoutScores
from karat_scale.models.layers import attention_layers

# Of the mean of the diagonal of a normal matrix. The harmonics of small scores are nearly dependent; without it their
# coefficients would be large and cancel.
RIDGE = 1e-7
# Unknowns that are solved for at once: their matrix has 8 bytes for each pair of them.
MOST_UNKNOWNS = 2500
# Images whose features are in memory at once.
CHUNK = 16


class Call(NamedTuple):
    """What a layer gave its attention, and the output O that the original made of it."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    mask: Tensor | None
    x: Tensor | None
    output: Tensor
    original: "Original"

    def of_heads(self, heads: slice) -> "Call":
        """Return the call of some of the heads."""
        query, key, value, output = (tensor[:, heads] for tensor in (self.query, self.key, self.value, self.output))
        bias, mask = (
            tensor[..., heads, :, :] if tensor is not None and tensor.dim() > 2 and tensor.shape[-3] > 1 else tensor
            for tensor in (self.bias, self.mask)
        )
        return Call(query, key, value, bias, mask, self.x, output, self.original)

    def parts(self, images: int) -> Iterator["Call"]:
        """Yield the same call of so many images each."""
        for start in range(0, len(self.query), images):
            part = slice(start, start + images)
            query, key, value, output = (tensor[part] for tensor in (self.query, self.key, self.value, self.output))
            bias, mask = (
                x[part] if x is not None and x.dim() > 3 and len(x) > 1 else x for x in (self.bias, self.mask)
            )
            x = None if self.x is None else self.x[part]
            yield Call(query, key, value, bias, mask, x, output, self.original)

    def answer(self, heads: Any) -> Tensor:
        """Return the output of other heads for the same call."""
        given = layer_input(heads, self.x)
        output: Tensor = heads(self.query, self.key, self.value, bias=self.bias, mask=self.mask, **given)
        return output

    def matrix(self, heads: Any) -> Tensor:
        """Return their S."""
        given = layer_input(heads, self.x)
        matrix: Tensor = heads.scores(self.query, self.key, bias=self.bias, mask=self.mask, **given)
        return matrix


class Original(nn.Module):
    """In the place of a layer's operator: the original's attention, softmax or an operator. It keeps the last call."""

    sees_input = True

    def __init__(self, operator: nn.Module | None) -> None:
        super().__init__()
        self.operator = operator
        self.call: Call | None = None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        x: Tensor | None = None,
    ) -> Tensor:
        """Return O [B, h, N, d]; the arguments are those of `InputHeads`."""
        if self.operator is None:
            output = softmax_attention(query, key, value, bias, mask)
        else:
            output = self.operator(query, key, value, bias=bias, mask=mask, **layer_input(self.operator, x))
        self.call = Call(query, key, value, bias, mask, x, output, self)
        return output

    def scores(
        self,
        query: Tensor,
        key: Tensor,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        x: Tensor | None = None,
    ) -> Tensor:
        """Return S [B, h, N, N]."""
        if self.operator is None:
            return softmax_scores(query, key, bias, mask)
        operator: Any = self.operator
        matrix: Tensor = operator.scores(query, key, bias=bias, mask=mask, **layer_input(operator, x))
        return matrix


class Conversion:
    """A model of which each block in `originals` has its new attention or the original's.

    Args:
        model: with the new attention.
        originals: the operators of the original, None for softmax, by the numbers of the blocks.
    """

    def __init__(self, model: nn.Module, originals: Mapping[int, nn.Module | None]) -> None:
        self.model, self._layers = model, [layer.attention for layer in attention_layers(model)]
        self.new: dict[int, Any] = {number: self._layers[number].operator for number in originals}
        self.originals = {number: Original(operator) for number, operator in originals.items()}

    @property
    def blocks(self) -> list[int]:
        """The blocks with new attention."""
        return [*self.new]

    def groups(self) -> list[list[int]]:
        """Return the blocks that share an operator: one each, but where the attention is universal."""
        by_operator: dict[int, list[int]] = {}
        for number, operator in self.new.items():
            by_operator.setdefault(id(operator), []).append(number)
        return [*by_operator.values()]

    def use(self, blocks: Collection[int]) -> None:
        """Give these blocks their new attention, and the others the original's."""
        for number, original in self.originals.items():
            original.call = None
            original.to(next(self._layers[number].parameters()).device)
            self._layers[number].operator = self.new[number] if number in blocks else original

    @torch.no_grad()
    def calls(self, images: Tensor, blocks: Collection[int]) -> dict[int, Call]:
        """Return what these blocks of the original compute for normalised images; `use(())` was called before."""
        self.model(images)
        return {number: call for number in blocks if (call := self.originals[number].call) is not None}


@torch.no_grad()
def errors(conversion: Conversion, blocks: Sequence[int], images: Tensor) -> dict[int, list[float]]:
    """Return the share of the energy of O that each head of each block misses, |O' - O|^2 / |O|^2."""
    missed: dict[int, Tensor] = {}
    energy: dict[int, Tensor] = {}
    for part in images.split(CHUNK):
        for number, call in conversion.calls(part, blocks).items():
            output = call.output.double()
            difference = call.answer(conversion.new[number]).double() - output
            missed[number] = missed.get(number, 0) + difference.square().sum((0, 2, 3))
            energy[number] = energy.get(number, 0) + output.square().sum((0, 2, 3))
    return {number: _ratio(missed[number], energy[number]).tolist() for number in blocks}


def descend(
    conversion: Conversion,
    blocks: Sequence[int],
    batches: Iterable[Tensor],
    steps: int,
    lr: float,
    of_scores: float,
    on_step: Callable[[int], None],
) -> None:
    """Lower the errors of these blocks by `steps` of Adam, one for each batch of normalised images.

    Args:
        lr: of the first step; a cosine takes it to 0.
        of_scores: the weight of the same error of S.
        on_step: called with the number of each finished step.
    """
    learned = list(dict.fromkeys(p for number in blocks for p in conversion.new[number].parameters()))
    optimizer = torch.optim.Adam(learned, lr=lr) if learned else None
    for step, images in enumerate(batches):
        for number, call in conversion.calls(images, blocks).items() if optimizer is not None else ():
            heads = conversion.new[number]
            loss = _share(call.answer(heads), call.output)
            if of_scores:
                loss = loss + of_scores * _share(call.matrix(heads), call.matrix(call.original))
            if loss.requires_grad:  # it learns anything
                loss.backward()
        if optimizer is not None:
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
            optimizer.step()
            optimizer.zero_grad()
        on_step(step + 1)


def _share(found: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean over heads of |found - wanted|^2 / |wanted|^2."""
    missed, energy = (tensor.float().square().sum((0, 2, 3)) for tensor in (found - wanted, wanted))
    return _ratio(missed, energy).mean()


def _ratio(missed: Tensor, energy: Tensor) -> Tensor:
    """Return missed / energy by head; 0 for a head that gives nothing, such as a pruned one."""
    gives = energy > 0
    return missed.where(gives, 0) / energy.where(gives, 1)


class _Series(NamedTuple):
    """Heads with O = F C W^T V: their parameters, and the columns that these are expanded by, if they are."""

    cos: nn.Parameter
    sin: nn.Parameter
    proj: nn.Parameter
    modes: Tensor | None = None
    of_query: bool = False

    def features(self, call: Call, head: int) -> Tensor:
        """Return F [B, N, 2 K G], cosines first, in float64."""
        query, key = (tensor[:, head].double() for tensor in (call.query, call.key))
        arguments = query if self.of_query else query @ key.mT / query.shape[-1] ** 0.5
        if call.bias is not None and not self.of_query:
            bias = call.bias.double()
            arguments = arguments + (bias[..., head if bias.shape[-3] > 1 else 0, :, :] if bias.dim() > 2 else bias)
        angles = arguments.unsqueeze(-1) * torch.arange(1, self.cos.shape[-1] + 1, device=query.device)
        waves = [angles.cos(), angles.sin()]
        if self.modes is not None:
            waves = [torch.einsum("bkqm,qj->bkjm", wave, self.modes.double()) for wave in waves]
        return torch.cat([wave.flatten(-2) for wave in waves], -1)

    def values(self, call: Call, head: int) -> Tensor:
        """Return what W^T acts on, [B, K, d], in float64."""
        value = call.value[:, head].double()
        return value if self.modes is None else self.modes.double().mT @ value

    def coefficients(self, head: int) -> Tensor:
        """Return C [2 K G, r] of a head, in float64."""
        return torch.cat([part[head].double().flatten(1) for part in (self.cos, self.sin)], 1).mT

    def set(self, head: int, coefficients: Tensor, proj: Tensor) -> None:
        """Set C and W of a head."""
        for part, values in zip((self.cos, self.sin), coefficients.mT.chunk(2, 1), strict=True):
            part[head].copy_(values.reshape(part[head].shape))
        self.proj[head].copy_(proj)


def _series_of(heads: Any) -> _Series | None:
    if isinstance(heads, SmoothOperator):
        return _Series(heads.cos_modes, heads.sin_modes, heads.proj_modes, heads.modes)
    if isinstance(heads, QueryOnly):
        return _Series(heads.query_cos, heads.query_sin, heads.proj, of_query=True)
    if isinstance(heads, FourierKaratOperator) and heads.base == "zero" and isinstance(heads.basis, Fourier):
        if heads.basis.gains or heads.proj is None:
            return None
        return _Series(heads.cos_coef, heads.sin_coef, heads.proj)  # type: ignore[arg-type]  # set by name
    return None


@torch.no_grad()
def solve(heads: Any, calls: Sequence[Call], rounds: int) -> bool:
    """Match heads with calls of one or more originals by least squares, in place; return whether they are linear.

    Heads that are not, and those of layers whose pairs are masked, do not change.
    """
    if rounds == 0 or any(call.mask is not None for call in calls):
        return False
    kept = slice(heads.softmax_heads if isinstance(heads, HybridHeads) else 0, None)
    own = heads.operator if isinstance(heads, HybridHeads) else heads
    calls = [part for call in calls for part in call.parts(CHUNK)]
    seen = [_as_seen(own, call.of_heads(kept)) for call in calls]
    inner = own
    while isinstance(inner, BoundedHeads | WithoutScores):
        inner = inner.operator
    if isinstance(inner, StaticHeads):
        for head in range(inner.num_heads):
            of_columns = [(call.value[:, head].mT.double(), call.output[:, head].mT.double()) for call in seen]
            inner.matrix[head].copy_(least_squares((value, None, output) for value, output in of_columns).mT)
        return True
    series = _series_of(inner)
    if series is None:
        return False
    matrices = (call.matrix(call.original)[:, kept].double() for call in calls)
    energy: Any = sum(torch.einsum("bhkj,bhki->hji", matrix, matrix) for matrix in matrices)
    for head in range(len(series.proj)):
        _solve_head(series, head, seen, energy[head], rounds)
    return True


def _as_seen(heads: Any, call: Call) -> Call:
    """Return the call that the functions of scores get, in float64 where query and key are scaled."""
    if isinstance(heads, BoundedHeads):
        query, key = heads.bounded(call.query.double(), call.key.double())
        return _as_seen(heads.operator, call._replace(query=query, key=key))
    if isinstance(heads, WithoutScores):
        nothing = torch.zeros_like(call.query)
        return _as_seen(heads.operator, call._replace(query=nothing, key=nothing, bias=None))
    return call


def _solve_head(series: _Series, head: int, calls: Sequence[Call], energy: Tensor, rounds: int) -> None:
    """Solve for C and W of a head in turn. `energy` is the sum of S^T S [N, N] of the original."""
    if series.modes is not None:
        energy = series.modes.double().mT @ energy @ series.modes.double()
    coefficients, proj = series.coefficients(head), series.proj[head].double()
    ratio = coefficients.norm() / proj.norm()
    first = torch.linalg.eigh(energy).eigenvectors.flip(1)[:, : proj.shape[1]]
    proj[:, : first.shape[1]] = first
    coefficients = torch.zeros_like(coefficients)
    at_once = max(1, MOST_UNKNOWNS // len(coefficients))

    def parts(units: Tensor | None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for call in calls:
            features, values = series.features(call, head), series.values(call, head)
            hidden, mixed = features @ coefficients, proj.mT @ values
            rest = call.output[:, head].double() - hidden @ mixed
            yield (hidden, values, rest) if units is None else (features, mixed[:, units], rest)

    for _ in range(rounds):
        for units in torch.arange(proj.shape[1], device=proj.device).split(at_once):
            coefficients[:, units] += least_squares(parts(units))
        proj += least_squares(parts(None)).mT
    # Only the product of a unit's coefficients and its column of W counts; their sizes start as in a new operator.
    share = (ratio * proj.norm(dim=0) / coefficients.norm(dim=0).clamp(min=1e-30)).sqrt()
    share = share.where(coefficients.any(0), 1)  # a unit that gives nothing must still be able to learn
    series.set(head, coefficients * share, proj / share)


def least_squares(parts: Iterable[tuple[Tensor, Tensor | None, Tensor]]) -> Tensor:
    """Return the D [a, b] for which the sum of |R - L D V|^2 over all parts (L, V, R) is least.

    L is [B, n, a], V [B, b, d] and R [B, n, d], all float64. Without V it is |R - L D|^2, for R [B, n, b]. By normal
    equations, with a ridge of `RIDGE`.
    """
    blocks: Any = 0
    right_side: Any = 0
    for left, right, rest in parts:
        squares, moments = (left.mT @ left).flatten(1), left.mT @ rest
        if right is None:
            weights = squares.new_ones(len(squares), 1)
        else:
            # The normal matrix has a block [a, a] for each pair of rows of V; those of (i, j) and (j, i) are the same.
            first, second = torch.triu_indices(right.shape[1], right.shape[1], device=right.device)
            weights, moments = (right @ right.mT)[:, first, second], moments @ right.mT
        blocks, right_side = blocks + weights.mT @ squares, right_side + moments.sum(0)
    size, columns = right_side.shape
    if right is None:
        return torch.cholesky_solve(right_side, _factor(blocks.view(size, size)))
    place = torch.empty(columns, columns, dtype=torch.long, device=blocks.device)
    place[first, second] = place[second, first] = torch.arange(len(first), device=blocks.device)
    matrix = blocks[place].view(columns, columns, size, size).transpose(1, 2).reshape(columns * size, columns * size)
    return torch.cholesky_solve(right_side.mT.reshape(-1, 1), _factor(matrix)).view(columns, size).mT


def _factor(matrix: Tensor) -> Tensor:
    """Return the Cholesky factor of a normal matrix, to which the ridge is added in place."""
    matrix.diagonal().add_(RIDGE * matrix.diagonal().mean().clamp(min=1e-30))
    factor: Tensor = torch.linalg.cholesky(matrix)
    return factor
