"""KArAt attention of any basis and form as functions of tensors, with the parameters of each form and their checks.

All forms are one operation, O = Phi(A) V', on the scores A of queries and keys. `streaming` and `reference` implement
it. Modular: V' = W^T V. Full rank: V' = V. Project first: the scores are those of the r keys W^T K or, with a mask, the
rows of A W, tile by tile. Two operators: the H of the first are the scores of the second.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Literal

import torch
from torch import Tensor

from karat_scale.attention import call, functional, reference, streaming
from karat_scale.attention.bases import BASE_ACTIVATIONS, Basis, Fourier, Linear, key_of, make_basis
from karat_scale.attention.call import compute_dtype, full_precision, output_dtype, project

FORMS = ("modular", "project_first", "two_operators", "full_rank")
# What is projected onto the simplex: nothing, the N entries of each row of S, or the r of each row of H, before W.
Simplex = bool | Literal["hidden"]
# Before the names of the second operator's parameters.
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
    """Whether the form has a W."""
    return form in ("modular", "project_first")


def check_parameters(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    basis: Basis,
    parameters: Mapping[str, Tensor],
    proj: Tensor | None,
    form: str,
    bias: Tensor | None,
    mask: Tensor | None,
) -> None:
    """Raises ValueError for shapes, names, dtypes or devices that the form in this basis cannot take."""
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
    call.check_scores("bias", bias, query)
    call.check_scores("mask", mask, query)
    call.check_devices(query, key=key, value=value, proj=proj, bias=bias, mask=mask, **parameters)


def check_names(parameters: Mapping[str, Tensor], expected: Collection[str]) -> None:
    """Raises ValueError unless the parameters bear just these names."""
    if set(parameters) != set(expected):
        raise ValueError(f"parameters are named {', '.join(parameters)}: expected {', '.join(expected)}")


def _first_rank(basis: Basis, parameters: Mapping[str, Tensor], heads: int, tokens: int) -> int:
    """r, read off the first parameter."""
    name, shape = next(iter(basis.shapes(heads, -1, tokens).items()))
    found = parameters.get(name)
    if isinstance(found, Tensor) and found.dim() == len(shape):
        return max(found.shape[shape.index(-1)], 1)
    return 1


_IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "reference": reference.attend_units,
    "streaming": streaming.attend_units,
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
        basis: a basis, or the name of one with its default settings.
        parameters: by name, of the shapes of `parameter_shapes`.
        proj: W [h, N, r], for the first two forms.
        base: b(x): "zero", "identity", "silu" or "gelu".
        bias: added to the scores; broadcastable to [B, h, N, N].
        mask: boolean, broadcastable to [B, h, N, N], true where a pair takes part. For another pair (k, q), A[k, q]
            adds nothing to Phi(A)[k, :] or to (A W)[k, :], and S[k, q] = 0.
        simplex: True projects each row of S onto the probability simplex, and "hidden" each row of H, in the modular
            form.
        implementation: "reference", "streaming" or "auto"; others have the modular Fourier form only.

    Returns:
        O [B, h, N, d], in the value's dtype or, under autocast, in autocast's.

    Raises:
        ValueError: a shape, dtype, device or name does not fit; the message says what was expected.
    """
    basis = make_basis(basis) if isinstance(basis, str) else basis
    call.check_choice("form", form, FORMS)
    call.check_choice("base", base, BASE_ACTIVATIONS)
    check_simplex(simplex, form)
    check_implementation(implementation, basis, form, simplex)
    if has_kernels(basis, form, simplex) and proj is not None:
        assert isinstance(basis, Fourier)
        check_names(parameters, basis.shapes(1, 1, 1))
        coefficients = basis.series(parameters)
        return functional.fourier_karat_attention(
            query, key, value, *coefficients, proj, base=base, bias=bias, mask=mask, implementation=implementation
        )
    check_parameters(query, key, value, basis, parameters, proj, form, bias, mask)
    attend = _IMPLEMENTATIONS["streaming" if implementation == "auto" else implementation]
    output = _attend(attend, query, key, value, basis, parameters, proj, form, base, bias, mask, simplex)
    return output.to(output_dtype(value))


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
    call.check_choice("form", form, FORMS)
    call.check_choice("base", base, BASE_ACTIVATIONS)
    check_simplex(simplex, form)
    check_implementation(implementation, basis, form, simplex)
    if has_kernels(basis, form, simplex) and proj is not None:
        assert isinstance(basis, Fourier)
        check_names(parameters, basis.shapes(1, 1, 1))
        coefficients = basis.series(parameters)
        return functional.fourier_karat_scores(
            query, key, value, *coefficients, proj, base=base, bias=bias, mask=mask, implementation=implementation
        )
    check_parameters(query, key, value, basis, parameters, proj, form, bias, mask)
    attend = _IMPLEMENTATIONS.get(implementation, streaming.attend_units)
    batch, heads, tokens, _ = query.shape
    # S = S I.
    identity = torch.eye(tokens, dtype=query.dtype, device=query.device).expand(batch, heads, -1, -1)
    learned = _attend(attend, query, key, identity, basis, parameters, proj, form, base, bias, mask, simplex)
    return learned.to(output_dtype(query))


def has_kernels(basis: Basis, form: str, simplex: Simplex) -> bool:
    """Return True if `fourier_karat_attention`, and so every implementation, supports this operator."""
    return isinstance(basis, Fourier) and form == "modular" and not simplex


def check_implementation(implementation: str, basis: Basis, form: str, simplex: Simplex) -> None:
    """Raise ValueError for an unknown implementation, or one that does not support this operator."""
    call.check_choice("implementation", implementation, ("auto", *functional.IMPLEMENTATIONS))
    if implementation in ("auto", *_IMPLEMENTATIONS) or has_kernels(basis, form, simplex):
        return
    raise ValueError(
        f"implementation = {implementation!r}: it has the modular Fourier operator only, without simplex; "
        "expected auto or streaming"
    )


def _attend(
    attend: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    basis: Basis,
    parameters: Mapping[str, Tensor],
    proj: Tensor | None,
    form: str,
    base: str,
    bias: Tensor | None,
    mask: Tensor | None,
    simplex: Simplex,
) -> Tensor:
    dtype = compute_dtype(query, key, value, proj, bias, *parameters.values())
    wide = {name: parameter.to(dtype) for name, parameter in parameters.items()}
    with full_precision(query.device):
        coef = basis.pack({name: x for name, x in wide.items() if not name.startswith(SECOND)})
        if simplex == "hidden":
            assert proj is not None
            hidden = project(_hidden(attend, query, key, coef, basis, base, bias, mask))
            v, w = value.to(dtype), proj.to(dtype)
            return hidden @ (w.mT @ v) if mask is None else (hidden @ w.mT * mask) @ v
        if form in ("modular", "full_rank"):
            return attend(query, key, value, coef, proj, basis, base, bias, mask, mask, simplex)
        if form == "project_first" and mask is None:
            assert proj is not None
            projector = proj.to(dtype)
            if bias is not None:
                tokens = query.shape[2]
                bias = bias.to(dtype).expand(*bias.shape[:-2], tokens, tokens) @ projector
            pseudo_keys = projector.mT @ key.to(dtype)
            return attend(query, pseudo_keys, value, coef, None, basis, base, bias, None, None, simplex)
        if form == "project_first":
            assert proj is not None
            hidden = _hidden(attend, query, key, proj.to(dtype).mT.unsqueeze(1), _LINEAR, "zero", bias, mask)
        else:
            hidden = _hidden(attend, query, key, coef, basis, base, bias, mask)
            coef = basis.pack({name.removeprefix(SECOND): x for name, x in wide.items() if name.startswith(SECOND)})
        # As scores of sqrt(r) H against the rows of the identity.
        rank = hidden.shape[-1]
        units = _identity(hidden, rank)
        return attend(hidden * rank**0.5, units, value, coef, None, basis, base, None, None, mask, simplex)


def _hidden(
    attend: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    coef: Tensor,
    basis: Basis,
    base: str,
    bias: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """H [B, h, N, r]: attention with the identity as W and as values."""
    rank = coef.shape[2]
    values = torch.eye(rank, dtype=coef.dtype, device=coef.device).expand(*query.shape[:2], -1, -1)
    proj = torch.eye(rank, dtype=coef.dtype, device=coef.device).expand(query.shape[1], -1, -1)
    return attend(query, key, values, coef, proj, basis, base, bias, mask)


# By which a masked W A is an H.
_LINEAR = Linear()
key_of(_LINEAR)  # a compiled call may not be the first to name it


def _identity(like: Tensor, size: int) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device).expand(*like.shape[:2], -1, -1)
