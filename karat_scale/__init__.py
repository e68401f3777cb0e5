"""Kolmogorov-Arnold Attention (KArAt) vision transformers, trained at ImageNet scale."""

__version__ = "0.3.0"
