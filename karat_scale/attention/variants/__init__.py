"""Attention that is not the paper's: controls that have no learned function of the scores, and variants of KArAt."""

from karat_scale.attention.variants.content import ContentOperator
from karat_scale.attention.variants.controls import ScaledSoftmax, StaticHeads, WithoutScores
from karat_scale.attention.variants.smooth import SmoothOperator

__all__ = [
    "ContentOperator",
    "ScaledSoftmax",
    "SmoothOperator",
    "StaticHeads",
    "WithoutScores",
]
