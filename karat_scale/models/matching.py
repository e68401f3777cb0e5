"""Fits new attention to the output of the attention that it replaces, block by block.

The original's attention and the new one get the same query, key and value: those of the original model. So all blocks
are independent of each other, and no error of one block reaches the next. Two ways bring O = S V closer:

Least squares, in float64, for heads with O = F C W^T V, where F are features of the scores or of the query, and C the
coefficients. O is linear in C for a given W, and in W for a given C, so the two are solved for alternately. W starts
with the directions in which the original's S has most of its energy. Other heads are linear, too:

- A base activation adds b 1^T to F C, where b[k] = sum_q b(A[k, q]). Gains are 1, so C has all of the functions' size.
- `content` adds psi(A) V / N, linear in the 2 G + 1 coefficients of psi. psi is solved for in turn with C and W.
- `centred` has F without its mean over queries, and adds L R^T V, which has the same form with a feature for each
  position.
- A constant S needs one solution. Heads that are added to softmax are solved for what softmax lacks.

Where pairs are masked, each set of tokens that see each other is a separate problem with the same C and W.

Gradient descent, for all parameters of any heads.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from karat_scale.attention.bases import BASE_ACTIVATIONS, FeatureBasis, Fourier
from karat_scale.attention.bases.base import BaseActivation
from karat_scale.attention.bound import BoundedHeads
from karat_scale.attention.operator import HybridHeads, KaratOperator, ResidualHeads, layer_input
from karat_scale.attention.rivals import Centred, QueryOnly
from karat_scale.attention.softmax import softmax_attention, softmax_scores
from karat_scale.attention.variants import ContentOperator, SmoothOperator, StaticHeads, WithoutScores
from karat_scale.models.layers import attention_layers

# The ridge, as a part of the mean of a normal matrix's diagonal. The harmonics of small scores are nearly dependent;
# without a ridge, their coefficients would be large and cancel.
RIDGE = 1e-7
# Unknowns that are solved for at once: their matrix has 8 bytes for each pair of them.
MOST_UNKNOWNS = 2500
# Images whose features are in memory at once.
CHUNK = 16


class Call(NamedTuple):
    """The inputs that a layer gave its attention, and the original's output O."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    mask: Tensor | None
    x: Tensor | None
    output: Tensor
    original: "Original"
    keep: Tensor | None = None
    """For a region: 1 for its tokens and 0 for others [B, N, 1], in float64."""

    def of_heads(self, heads: slice) -> "Call":
        """Return the call of some of the heads."""
        query, key, value, output = (tensor[:, heads] for tensor in (self.query, self.key, self.value, self.output))
        bias, mask = (
            tensor[..., heads, :, :] if tensor is not None and tensor.dim() > 2 and tensor.shape[-3] > 1 else tensor
            for tensor in (self.bias, self.mask)
        )
        return Call(query, key, value, bias, mask, self.x, output, self.original)

    def parts(self, images: int) -> Iterator["Call"]:
        """Yield the call in parts of at most `images` images."""
        for start in range(0, len(self.query), images):
            part = slice(start, start + images)
            query, key, value, output = (tensor[part] for tensor in (self.query, self.key, self.value, self.output))
            bias, mask = (
                x[part] if x is not None and x.dim() > 3 and len(x) > 1 else x for x in (self.bias, self.mask)
            )
            x = None if self.x is None else self.x[part]
            yield Call(query, key, value, bias, mask, x, output, self.original)

    def regions(self) -> Iterator["Call"]:
        """Yield calls of tokens that see each other: with masks such as Swin's, these are parts of a window."""
        if self.mask is None:
            yield self
            return
        first = self.mask[:, 0].int().argmax(-1)  # the first token that each token sees [B, N]
        for number in first.unique().tolist():
            keep = first == number
            some = keep.any(1)
            query, key, value, output = (x[some] for x in (self.query, self.key, self.value, self.output))
            keep = keep[some].unsqueeze(-1).double()
            yield Call(query, key, value, self.bias, None, None, output, self.original, keep)

    def kept(self, rows: Tensor) -> Tensor:
        """Return rows [B, N, d] in float64, with 0 for tokens outside the region."""
        return rows.double() if self.keep is None else rows.double() * self.keep

    def answer(self, heads: Any) -> Tensor:
        """Return the output of other heads for the same call."""
        given = layer_input(heads, self.x)
        output: Tensor = heads(self.query, self.key, self.value, bias=self.bias, mask=self.mask, **given)
        return output

    def matrix(self, heads: Any) -> Tensor:
        """Return S of other heads for the same call."""
        given = layer_input(heads, self.x)
        matrix: Tensor = heads.scores(self.query, self.key, bias=self.bias, mask=self.mask, **given)
        return matrix


class Original(nn.Module):
    """The original's attention, softmax or an operator, in place of a layer's operator. It keeps the last call."""

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
    """A model in which each block of `originals` has its new attention or the original's.

    Args:
        model: the model with the new attention.
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
        """Return the blocks that share an operator: one block each, unless the attention is universal."""
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
        """Return what these blocks of the original compute for normalised images; call `use(())` before."""
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
    """Lower the errors of these blocks by `steps` steps of Adam, one for each batch of normalised images.

    Args:
        lr: the learning rate of the first step; a cosine takes it to 0.
        of_scores: the weight of the same error of S.
        on_step: a function to call with the number of each finished step.
    """
    learned = list(dict.fromkeys(p for number in blocks for p in conversion.new[number].parameters()))
    optimizer = torch.optim.Adam(learned, lr=lr) if learned else None
    for step, images in enumerate(batches):
        for number, call in conversion.calls(images, blocks).items() if optimizer is not None else ():
            heads = conversion.new[number]
            loss = _share(call.answer(heads), call.output)
            if of_scores:
                loss = loss + of_scores * _share(call.matrix(heads), call.matrix(call.original))
            if loss.requires_grad:  # the heads have trainable parameters
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
    """A part of O that is F C W^T V, or F C V without a W: its parameters, and what F are features of.

    Attributes:
        coefs: C as [h, r, K] for each feature; they are parts of parameters.
        proj: W [h, K, r].
        basis: the basis of the features F; None for one feature for each position.
        modes: the columns by which the parameters are expanded, or None.
        base: the base activation; F has its sum over keys as one more column, and C a row of ones for it.
    """

    coefs: Sequence[Tensor]
    proj: Tensor
    basis: FeatureBasis | None
    modes: Tensor | None = None
    of_query: bool = False
    is_centred: bool = False
    base: BaseActivation | None = None

    @property
    def free(self) -> slice:
        """The rows of C that are parameters."""
        return slice(None if self.base is None else -1)

    def features(self, call: Call, head: int) -> Tensor:
        """Return F [B, N, f K], one feature after the other, in float64."""
        if self.basis is None:
            tokens = call.query.shape[2]
            waves = [torch.eye(tokens, dtype=torch.float64, device=call.query.device).expand(len(call.query), -1, -1)]
        else:
            arguments = call.query[:, head].double() if self.of_query else _scores(call, head)
            waves = [*self.basis.value(arguments)]
            waves += [] if self.base is None else [self.base.value(arguments)]
            if call.keep is not None and not self.of_query:
                waves = [wave * call.keep.mT for wave in waves]
            if self.modes is not None:
                waves = [wave @ self.modes.double() for wave in waves]
        if self.base is not None:
            waves[-1] = waves[-1].sum(-1, keepdim=True)
        features = call.kept(torch.cat(waves, -1))
        return call.kept(features - features.mean(1, keepdim=True)) if self.is_centred else features

    def values(self, call: Call, head: int) -> Tensor:
        """Return the values that W^T multiplies, [B, K, d], in float64."""
        value = call.kept(call.value[:, head])
        return value if self.modes is None else self.modes.double().mT @ value

    def coefficients(self, head: int) -> Tensor:
        """Return C [f K, r] of a head, in float64."""
        coef = torch.cat([part[head].double().mT for part in self.coefs])
        return coef if self.base is None else torch.cat([coef, torch.ones_like(coef[:1])])

    def set(self, head: int, coefficients: Tensor, proj: Tensor) -> None:
        """Set C and W of a head."""
        for part, values in zip(self.coefs, coefficients[self.free].chunk(len(self.coefs)), strict=True):
            part[head].copy_(values.mT)
        self.proj[head].copy_(proj)


def _scores(call: Call, head: int) -> Tensor:
    """Return A [B, N, N] of a head, in float64."""
    query, key = (tensor[:, head].double() for tensor in (call.query, call.key))
    scores: Tensor = query @ key.mT / query.shape[-1] ** 0.5
    if call.bias is not None:
        bias = call.bias.double()
        scores = scores + (bias[..., head if bias.shape[-3] > 1 else 0, :, :] if bias.dim() > 2 else bias)
    return scores


def _series_of(heads: Any) -> _Series | None:
    if isinstance(heads, SmoothOperator):
        coefs = _harmonics(heads.cos_modes, heads.sin_modes)
        return _Series(coefs, heads.proj_modes, Fourier(heads.grid), heads.modes)
    if isinstance(heads, QueryOnly):
        return _Series(_harmonics(heads.query_cos, heads.query_sin), heads.proj, Fourier(heads.grid), of_query=True)
    if not isinstance(heads, KaratOperator) or heads.form != "modular" or heads.proj is None or heads.simplex:
        return None
    base = BASE_ACTIVATIONS[heads.base]
    parameters = heads.basis_parameters()
    if isinstance(heads.basis, Fourier):
        if heads.basis.gains:
            parameters["gain"].fill_(1)  # the coefficients have all of the functions' size
        return _Series(_harmonics(parameters["cos_coef"], parameters["sin_coef"]), heads.proj, heads.basis, base=base)
    if isinstance(heads.basis, FeatureBasis) and [*parameters] == ["coef"]:
        return _Series(parameters["coef"].unbind(1), heads.proj, heads.basis, base=base)
    return None


def _harmonics(*parts: Tensor) -> list[Tensor]:
    return [harmonic for part in parts for harmonic in part.unbind(-1)]


@torch.no_grad()
def solve(heads: Any, calls: Sequence[Call], rounds: int) -> bool:
    """Match heads with calls of one or more originals by least squares, in place; return whether they are linear.

    Heads that are not linear do not change.
    """
    if rounds == 0:
        return False
    kept = slice(heads.softmax_heads if isinstance(heads, HybridHeads) else 0, None)
    calls = [part for call in calls for part in call.parts(CHUNK)]

    @cache
    def energy() -> Tensor:
        """The sum of S^T S [h, N, N] of the originals."""
        matrices = (call.matrix(call.original)[:, kept].double() for call in calls)
        total = torch.zeros((), dtype=torch.float64, device=calls[0].query.device)
        return sum((torch.einsum("bhkj,bhki->hji", matrix, matrix) for matrix in matrices), start=total)

    own = heads.operator if isinstance(heads, HybridHeads) else heads
    return _solve(own, [call.of_heads(kept) for call in calls], rounds, energy)


def _solve(heads: Any, calls: Sequence[Call], rounds: int, energy: Callable[[], Tensor]) -> bool:
    if isinstance(heads, BoundedHeads):  # in float64, as what follows
        pairs = [heads.bounded(call.query.double(), call.key.double()) for call in calls]
        bounded = [call._replace(query=q, key=k) for call, (q, k) in zip(calls, pairs, strict=True)]
        return _solve(heads.operator, bounded, rounds, energy)
    if isinstance(heads, WithoutScores):
        nothing = [torch.zeros_like(call.query) for call in calls]
        blind = [call._replace(query=x, key=x, bias=None) for call, x in zip(calls, nothing, strict=True)]
        return _solve(heads.operator, blind, rounds, energy)
    if isinstance(heads, ResidualHeads):
        if not heads.gate.all():
            return False
        gate = heads.gate[:, None, None]
        lacks = [call._replace(output=(call.output - softmax_attention(*call[:5])) / gate) for call in calls]
        return _solve(heads.operator, lacks, rounds, energy)
    if isinstance(heads, StaticHeads):
        if any(call.mask is not None for call in calls):
            return False
        for head in range(heads.num_heads):
            of_columns = ((call.value[:, head].mT.double(), None, call.output[:, head].mT.double()) for call in calls)
            heads.matrix[head].copy_(least_squares(of_columns).mT)
        return True
    series = _series_of(heads.operator if isinstance(heads, ContentOperator | Centred) else heads)
    if series is None:
        return False
    if isinstance(heads, ContentOperator):
        dtype = calls[0].value.dtype  # which all kernels take
        plain = [call._replace(query=call.query.to(dtype), key=call.key.to(dtype)) for call in calls]
        for number in range(rounds):
            of_series = [call.answer(heads.operator) for call in plain]
            _solve_psi(heads, _less(calls, of_series))
            of_psi = [call.answer(heads) - part for call, part in zip(plain, of_series, strict=True)]
            _solve_series([series], _less(calls, of_psi), 1, None if number else energy())
    elif isinstance(heads, Centred):
        constant = _Series([heads.left.mT], heads.right, None)
        _solve_series([constant, series._replace(is_centred=True)], calls, rounds, energy())
    else:
        _solve_series([series], calls, rounds, energy())
    return True


def _less(calls: Sequence[Call], parts: Sequence[Tensor]) -> list[Call]:
    """Return calls with `parts` subtracted from their outputs."""
    return [call._replace(output=call.output - part) for call, part in zip(calls, parts, strict=True)]


def _solve_psi(heads: ContentOperator, calls: Sequence[Call]) -> None:
    """Solve for the function psi of each score."""
    basis = Fourier(heads.operator.grid)
    for head in range(heads.num_heads):

        def parts(head: int) -> Iterator[tuple[Tensor, None, Tensor]]:
            for call in calls:
                scores = _scores(call, head)
                waves = torch.stack([torch.ones_like(scores), *basis.value(scores)], 1)
                kept = waves if call.mask is None else waves * call.mask
                mixed = kept @ call.value[:, head, None].double() / scores.shape[-1]
                yield mixed.flatten(2).mT, None, call.output[:, head].double().flatten(1).unsqueeze(-1)

        constant, cos, sin = least_squares(parts(head))[:, 0].split([1, basis.grid, basis.grid])
        heads.psi_constant[head], heads.psi_cos[head], heads.psi_sin[head] = constant[0], cos, sin


def _solve_series(terms: Sequence[_Series], calls: Sequence[Call], rounds: int, energy: Tensor | None) -> None:
    """Solve for C and W of each of the series, whose sum is O, in turn.

    energy: the sum of S^T S [h, N, N] of the original, to start from; None to go on from the parameters.
    """
    regions = [region for call in calls for region in call.regions()]
    for head in range(len(terms[0].proj)):
        _solve_head(terms, head, regions, rounds, None if energy is None else energy[head])


def _solve_head(terms: Sequence[_Series], head: int, calls: Sequence[Call], rounds: int, energy: Tensor | None) -> None:
    coefs, projs = [one.coefficients(head) for one in terms], [one.proj[head].double() for one in terms]
    # The norm of a new W is about 1, unless it is 0.
    ratios = [coef.norm() / (proj.norm() or 1) for coef, proj in zip(coefs, projs, strict=True)]
    if energy is not None:
        for one, coef, proj in zip(terms, coefs, projs, strict=True):
            seen = energy if one.modes is None else one.modes.double().mT @ energy @ one.modes.double()
            first = torch.linalg.eigh(seen).eigenvectors.flip(1)[:, : proj.shape[1]]
            proj[:, : first.shape[1]] = first
            coef[one.free, : first.shape[1]] = 0  # a unit without a direction must still be able to learn

    def parts(number: int, units: Tensor | None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for call in calls:
            sides = [(one.features(call, head), one.values(call, head)) for one in terms]
            halves = [(f @ coef, proj.mT @ v) for (f, v), coef, proj in zip(sides, coefs, projs, strict=True)]
            rest = call.kept(call.output[:, head]) - sum(hidden @ mixed for hidden, mixed in halves)
            (features, values), (hidden, mixed) = sides[number], halves[number]
            if units is None:
                yield hidden, values, rest
            else:
                yield features[..., terms[number].free], mixed[:, units], rest

    for number, one in enumerate(terms):
        if energy is not None and one.base is not None:  # b is there from the start, and W must fit it
            projs[number] += least_squares(parts(number, None)).mT
    for _ in range(rounds):
        for number, (coef, proj) in enumerate(zip(coefs, projs, strict=True)):
            for units in torch.arange(proj.shape[1], device=proj.device).split(max(1, MOST_UNKNOWNS // len(coef))):
                coef[terms[number].free, units] += least_squares(parts(number, units))
            proj += least_squares(parts(number, None)).mT
    for one, coef, proj, ratio in zip(terms, coefs, projs, ratios, strict=True):
        # Only the product of a unit's coefficients and its column of W counts; their sizes start as in a new operator.
        share = (ratio * proj.norm(dim=0) / coef.norm(dim=0).clamp(min=1e-30)).sqrt()
        share = share.where(coef.any(0), 1)  # a unit that gives nothing must still be able to learn
        share = share if one.base is None else torch.ones_like(share)  # b has a fixed size
        one.set(head, coef * share, proj / share)


def least_squares(parts: Iterable[tuple[Tensor, Tensor | None, Tensor]]) -> Tensor:
    """Return the D [a, b] for which the sum of |R - L D V|^2 over all parts (L, V, R) is least.

    L is [B, n, a], V [B, b, d] and R [B, n, d], all float64. Without V it is |R - L D|^2, for R [B, n, b]. It is found
    by normal equations, with a ridge of `RIDGE`.
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
