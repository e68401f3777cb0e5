"""KArAt attention of any basis and form as functions of tensors; the parameters of each form, and its operations.

All forms are one operation, O = Phi(A) V', on the scores A of queries and keys. `streaming` and `reference` implement
it. Modular: V' = W^T V. Full rank: V' = V. Project first: the scores are those of the r keys W^T K or, with a mask, the
rows of A W, tile by tile. Two operators: the H of the first are the scores of the second.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from karat_scale.attention import call, functional, reference, streaming
from karat_scale.attention.bases import BASE_ACTIVATIONS, Basis, FeatureBasis, Fourier, Linear, key_of, make_basis
from karat_scale.attention.call import FourierCall, UnitsCall, compute_dtype, full_precision, output_dtype, project

FORMS = ("modular", "project_first", "two_operators", "full_rank")
# What is projected onto the simplex: nothing, the N entries of each row of S, or the r of each row of H, before W.
Simplex = bool | Literal["hidden"]
# The prefix of the names of the second operator's parameters.
SECOND = "second_"


def parameter_shapes(basis: Basis, form: str, heads: int, tokens: int, rank: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the basis's parameters; W, where the form has one, is `proj` [h, N, r]."""
    if form == "full_rank":
        return basis.shapes(heads, tokens, tokens)
    if form == "project_first":
        return basis.shapes(heads, tokens, rank)
    shapes = basis.shapes(heads, rank, tokens)
    if form == "two_operators":
        shapes |= {SECOND + name: shape for name, shape in basis.shapes(heads, tokens, rank).items()}
    return shapes


def check_simplex(simplex: Simplex, form: str) -> None:
    """Raises ValueError for an unknown place of the projection, or one that the form does not have."""
    if simplex not in (False, True, "hidden"):
        raise ValueError(f"simplex = {simplex!r}: expected False, True or 'hidden'")
    if simplex == "hidden" and form != "modular":
        raise ValueError(f"simplex = 'hidden' needs form = 'modular', not {form!r}")


def has_projector(form: str) -> bool:
    """Return whether the form has a W."""
    return form in ("modular", "project_first")


class FormCall(NamedTuple):
    """The arguments of `karat_attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    basis: Basis
    parameters: Mapping[str, Tensor]
    proj: Tensor | None
    form: str
    base: str
    bias: Tensor | None
    mask: Tensor | None
    simplex: Simplex


def check_parameters(given: FormCall) -> None:
    """Raises ValueError for shapes, names, dtypes or devices that the form in this basis cannot take."""
    query, key, value, basis, parameters, proj, form, _, bias, mask, _ = given
    heads, tokens = call.check_tokens(query, key, value)
    rank = 1
    if has_projector(form):
        if not isinstance(proj, Tensor) or proj.dim() != 3:
            found = list(proj.shape) if isinstance(proj, Tensor) else proj
            raise ValueError(f"proj has shape {found}: expected [h, N, r] = [{heads}, {tokens}, r]")
        rank = proj.shape[2]
        call.check_shape("proj", proj, "[h, N, r]", (heads, tokens, max(rank, 1)))
    elif proj is not None:
        raise ValueError(f"proj has shape {list(proj.shape)}: expected None, for form = {form!r} has no W")
    if form == "two_operators":
        rank = _first_rank(basis, parameters, heads, tokens)
    expected = parameter_shapes(basis, form, heads, tokens, rank)
    check_names(parameters, expected)
    for name, shape in expected.items():
        call.check_shape(name, parameters[name], "the basis's", shape)
    call.check_pairs(query, bias, mask)
    call.check_devices(query, [*zip(given._fields, given, strict=True), *parameters.items()])


def check_names(parameters: Mapping[str, Tensor], expected: Collection[str]) -> None:
    """Raises ValueError unless the parameters have exactly these names."""
    if set(parameters) != set(expected):
        raise ValueError(f"parameters are named {', '.join(parameters)}: expected {', '.join(expected)}")


def _first_rank(basis: Basis, parameters: Mapping[str, Tensor], heads: int, tokens: int) -> int:
    """Return r, read from the shape of the first parameter."""
    name, shape = next(iter(basis.shapes(heads, -1, tokens).items()))
    found = parameters.get(name)
    if isinstance(found, Tensor) and found.dim() == len(shape):
        return max(found.shape[shape.index(-1)], 1)
    return 1


_IMPLEMENTATIONS: dict[str, Callable[[UnitsCall], Tensor]] = {
    "reference": reference.attend_units,
    "streaming": streaming.attend_units,
    "auto": streaming.attend_units,
}


def karat_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    basis: Basis | str,
    parameters: Mapping[str, Tensor],
    proj: Tensor | None = None,
    *,
    form: str = "modular",
    base: str = "zero",
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    simplex: Simplex = False,
    implementation: str = "auto",
) -> Tensor:
    """Return attention with a learnable operator of any basis instead of softmax (arXiv 2503.10632).

    A = Q K^T / sqrt(d) + bias, O = S V, and by the form, with Phi(X)[k, p] = sum_q b(X[k, q]) + phi_pq(X[k, q]):

    - "modular": S = Phi(A) W^T, r x N functions;
    - "project_first": S = Phi(A W), N x r functions;
    - "two_operators": S = Phi2(Phi1(A)), r x N and N x r functions;
    - "full_rank": S = Phi(A), N x N functions.

    Args:
        query, key, value: [B, h, N, d], of any floating dtype and strides.
        basis: a basis, or the name of a basis, which then has its default settings.
        parameters: the basis's parameters by name, with the shapes of `parameter_shapes`.
        proj: W [h, N, r], for the first two forms.
        base: b(x): "zero", "identity", "silu" or "gelu".
        bias: added to the scores; broadcastable to [B, h, N, N].
        mask: boolean, broadcastable to [B, h, N, N], true where a pair takes part. For another pair (k, q), A[k, q]
            adds nothing to Phi(A)[k, :] or to (A W)[k, :], and S[k, q] = 0.
        simplex: True projects each row of S onto the probability simplex, and "hidden" each row of H, in the modular
            form.
        implementation: "reference", "streaming" or "auto"; the others support only the modular Fourier form.

    Returns:
        O [B, h, N, d], in the value's dtype or, under autocast, in autocast's.

    Raises:
        ValueError: a shape, dtype, device or name does not fit; the message says what was expected.
    """
    basis = make_basis(basis) if isinstance(basis, str) else basis
    given = FormCall(query, key, value, basis, parameters, proj, form, base, bias, mask, simplex)
    return attend_form(given, implementation)


def attend_form(given: FormCall, implementation: str) -> Tensor:
    """Return O of a call. See `karat_attention`."""
    fourier = _check(given, implementation)
    if fourier is not None:
        return functional.attend_call(fourier, implementation)
    return _attend(_IMPLEMENTATIONS[implementation], given).to(output_dtype(given.value))


def karat_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    basis: Basis | str,
    parameters: Mapping[str, Tensor],
    proj: Tensor | None = None,
    *,
    form: str = "modular",
    base: str = "zero",
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    simplex: Simplex = False,
    implementation: str = "auto",
) -> Tensor:
    """Return the learned attention S [B, h, N, N], for analysis: `karat_attention` with equal arguments is S @ value.

    `value` is not used and may be None. The dtype is the query's or, under autocast, autocast's.
    """
    basis = make_basis(basis) if isinstance(basis, str) else basis
    value = query if value is None else value
    given = FormCall(query, key, value, basis, parameters, proj, form, base, bias, mask, simplex)
    return form_scores(given, implementation)


def form_scores(given: FormCall, implementation: str) -> Tensor:
    """Return S of a call. See `karat_scores`."""
    fourier = _check(given, implementation)
    if fourier is not None:
        return functional.call_scores(fourier, implementation)
    given = given._replace(value=functional.identity(given.query))
    return _attend(_IMPLEMENTATIONS[implementation], given).to(output_dtype(given.query))


def _check(given: FormCall, implementation: str) -> FourierCall | None:
    """Check a call; return the same call of the modular Fourier operator, or None where it is another operator's."""
    call.check_choice("form", given.form, FORMS)
    call.check_choice("base", given.base, BASE_ACTIVATIONS)
    check_simplex(given.simplex, given.form)
    check_implementation(implementation, given.basis, given.form, given.simplex)
    if has_kernels(given.basis, given.form, given.simplex) and given.proj is not None:
        check_names(given.parameters, given.basis.shapes(1, 1, 1))
        return fourier_call(given)
    check_parameters(given)
    return None


def fourier_call(given: FormCall) -> FourierCall:
    """Return the equivalent call of `fourier_karat_attention`."""
    assert isinstance(given.basis, Fourier)
    assert given.proj is not None
    coefficients = given.basis.series(given.parameters)
    return FourierCall(*given[:3], *coefficients, given.proj, given.bias, given.mask, given.base)


def has_kernels(basis: Basis, form: str, simplex: Simplex) -> bool:
    """Return True if `fourier_karat_attention`, and so every implementation, supports this operator."""
    return isinstance(basis, Fourier) and form == "modular" and not simplex


def check_implementation(implementation: str, basis: Basis, form: str, simplex: Simplex) -> None:
    """Raise ValueError for an unknown implementation, or one that does not support this operator."""
    call.check_choice("implementation", implementation, ("auto", *functional.IMPLEMENTATIONS))
    if implementation in _IMPLEMENTATIONS or has_kernels(basis, form, simplex):
        return
    raise ValueError(
        f"implementation = {implementation!r}: it has the modular Fourier operator only, without simplex; "
        "expected auto or streaming"
    )


def _attend(attend: Callable[[UnitsCall], Tensor], given: FormCall) -> Tensor:
    query, key, value, basis, parameters, proj, form, base, bias, mask, simplex = given
    dtype = compute_dtype(query, key, value, proj, bias, *parameters.values())
    wide = {name: parameter.to(dtype) for name, parameter in parameters.items()}
    w = None if proj is None else proj.to(dtype)
    with full_precision(query.device):
        coef = basis.pack({name: x for name, x in wide.items() if not name.startswith(SECOND)})
        first = UnitsCall(query, key, value, coef, proj, bias, mask, mask, basis, base, simplex is True)
        if simplex == "hidden":
            assert w is not None
            hidden = project(_hidden(attend, first))
            v = value.to(dtype)
            return hidden @ (w.mT @ v) if mask is None else (hidden @ w.mT * mask) @ v
        if form in ("modular", "full_rank"):
            return attend(first)
        if form == "project_first" and mask is None:
            assert w is not None
            if bias is not None:
                tokens = query.shape[2]
                bias = bias.to(dtype).expand(*bias.shape[:-2], tokens, tokens) @ w
            return attend(first._replace(key=w.mT @ key.to(dtype), proj=None, bias=bias))
        if form == "project_first":
            assert w is not None
            hidden = _hidden(attend, first._replace(coef=w.mT.unsqueeze(1), basis=_LINEAR, base="zero"))
        else:
            hidden = _hidden(attend, first)
            coef = basis.pack({name.removeprefix(SECOND): x for name, x in wide.items() if name.startswith(SECOND)})
        # As scores of sqrt(r) H against the rows of the identity.
        rank = hidden.shape[-1]
        units = _identity(hidden, query.shape[:2], rank)
        return attend(first._replace(query=hidden * rank**0.5, key=units, coef=coef, proj=None, bias=None, mask=None))


def _hidden(attend: Callable[[UnitsCall], Tensor], units: UnitsCall) -> Tensor:
    """H [B, h, N, r]: attention with the identity as W and as values."""
    rank, heads = units.coef.shape[2], units.query.shape[:2]
    values, proj = _identity(units.coef, heads, rank), _identity(units.coef, heads[1:], rank)
    return attend(units._replace(value=values, proj=proj, cut=None, on_simplex=False))


# With this basis, H is a masked A W.
_LINEAR = Linear()
key_of(_LINEAR)  # a compiled call may not be the first to name it


def _identity(like: Tensor, heads: Sequence[int], size: int) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device).expand(*heads, -1, -1)


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
        # A mask applies to pairs, so it needs A itself.
        head = (scores + 2 * n * n * r if masked else 4 * n * r * d) + function * n * n * r + values
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
