"""What every implementation of the modular Fourier operator is given."""

from typing import NamedTuple

from torch import Tensor


class FourierCall(NamedTuple):
    """The arguments of `fourier_karat_attention`, checked, of any float dtypes and strides."""

    query: Tensor
    key: Tensor
    value: Tensor
    cos_coef: Tensor
    sin_coef: Tensor
    proj: Tensor
    base: str
    bias: Tensor | None
    mask: Tensor | None


def as_4d(tensor: Tensor | None) -> Tensor | None:
    """Return a bias or a mask with the four dimensions that it broadcasts to."""
    return None if tensor is None else tensor[(None,) * (4 - tensor.dim())]
