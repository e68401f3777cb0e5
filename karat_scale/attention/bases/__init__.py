"""The functions phi_pq(x) that KArAt learns: bases by name, and the fixed base activations b(x)."""

from karat_scale.attention.bases.base import (
    BASE_ACTIVATIONS,
    INITIALISATIONS,
    BaseActivation,
    Basis,
    BoundFeatures,
    ElementwiseBasis,
    FeatureBasis,
    initialise_projector,
)
from karat_scale.attention.bases.fourier import Fourier
from karat_scale.attention.bases.polynomials import Chebyshev, Linear, Rational
from karat_scale.attention.bases.registry import BASES, basis_class, basis_of, key_of, make_basis
from karat_scale.attention.bases.splines import BSpline
from karat_scale.attention.bases.wavelets import DerivativeOfGaussian, MexicanHat, Meyer, Morlet, Shannon, Wavelet

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
