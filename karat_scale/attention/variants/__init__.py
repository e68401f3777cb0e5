"""Attention that is not the paper's: controls that have no learned function of the scores, and variants of KArAt."""

from karat_scale.attention.variants.content import ContentOperator
from karat_scale.attention.variants.scaled_softmax import ScaledSoftmax
from karat_scale.attention.variants.smooth import SmoothOperator
from karat_scale.attention.variants.static import StaticHeads
from karat_scale.attention.variants.without_scores import WithoutScores

__all__ = [
    "ContentOperator",
    "ScaledSoftmax",
    "SmoothOperator",
    "StaticHeads",
    "WithoutScores",
]
