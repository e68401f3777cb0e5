"""Kolmogorov-Arnold attention: a learnable operator instead of softmax. The only library it needs is torch."""

from karat_scale.attention.bases import BASES, ElementwiseBasis, FeatureBasis, Wavelet, make_basis
from karat_scale.attention.forms import karat_attention, karat_scores
from karat_scale.attention.functional import fourier_karat_attention, fourier_karat_scores
from karat_scale.attention.operator import FourierKaratOperator, HybridHeads, KaratOperator, ResidualHeads

__all__ = [
    "BASES",
    "ElementwiseBasis",
    "FeatureBasis",
    "FourierKaratOperator",
    "HybridHeads",
    "KaratOperator",
    "ResidualHeads",
    "Wavelet",
    "fourier_karat_attention",
    "fourier_karat_scores",
    "karat_attention",
    "karat_scores",
    "make_basis",
]
