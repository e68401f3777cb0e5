"""The functions phi_pq(x) that KArAt learns: bases by name, and the fixed base activations b(x)."""

from karat_scale.attention.bases.base import (
    BASE_ACTIVATIONS,
    INITIALISATIONS,
    BaseActivation,
    Basis,
    BoundFeatures,
    ElementwiseBasis,
    FeatureBasis,
    basis_class,
    basis_of,
    initialise_projector,
    key_of,
    make_basis,
)
from karat_scale.attention.bases.fourier import Fourier
from karat_scale.attention.bases.polynomials import BSpline, Chebyshev, Linear, Rational
from karat_scale.attention.bases.wavelets import DerivativeOfGaussian, MexicanHat, Meyer, Morlet, Shannon, Wavelet
from karat_scale.foundation import tables

BASES: dict[str, type[Basis]] = {name: tables.load(row.place) for name, row in tables.BASES.items()}

__all__ = [
    "BASES",
    "BASE_ACTIVATIONS",
    "INITIALISATIONS",
    "BSpline",
    "BaseActivation",
    "Basis",
    "BoundFeatures",
    "Chebyshev",
    "DerivativeOfGaussian",
    "ElementwiseBasis",
    "FeatureBasis",
    "Fourier",
    "Linear",
    "MexicanHat",
    "Meyer",
    "Morlet",
    "Rational",
    "Shannon",
    "Wavelet",
    "basis_class",
    "basis_of",
    "initialise_projector",
    "key_of",
    "make_basis",
]
