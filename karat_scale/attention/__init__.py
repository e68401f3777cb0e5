"""Kolmogorov-Arnold attention: a learnable operator instead of softmax. The only library it needs is torch."""

from karat_scale.attention.bases import BASES, ElementwiseBasis, FeatureBasis, Wavelet, make_basis
from karat_scale.attention.forms import karat_attention, karat_scores
from karat_scale.attention.functional import fourier_karat_attention, fourier_karat_scores
from karat_scale.attention.operator import (
    AttentionHeads,
    FourierKaratOperator,
    HybridHeads,
    InputHeads,
    KaratOperator,
    ResidualHeads,
)

__all__ = [
    "BASES",
    "AttentionHeads",
    "ElementwiseBasis",
    "FeatureBasis",
    "FourierKaratOperator",
    "HybridHeads",
    "InputHeads",
    "KaratOperator",
    "ResidualHeads",
    "Wavelet",
    "fourier_karat_attention",
    "fourier_karat_scores",
    "karat_attention",
    "karat_scores",
    "make_basis",
]
