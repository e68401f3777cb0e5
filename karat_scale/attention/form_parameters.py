"""The forms of the operator, and the parameters of each: names, shapes and the checks of these."""

from collections.abc import Collection, Mapping
from typing import Literal

from torch import Tensor

from karat_scale.attention import call
from karat_scale.attention.bases import Basis

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
