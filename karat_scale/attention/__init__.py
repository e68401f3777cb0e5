"""Kolmogorov-Arnold attention: the learnable operator that stands where softmax stood. Needs torch alone."""

from karat_scale.attention.functional import fourier_karat_attention, fourier_karat_scores
from karat_scale.attention.operator import FourierKaratOperator

__all__ = ["FourierKaratOperator", "fourier_karat_attention", "fourier_karat_scores"]
