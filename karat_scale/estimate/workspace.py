"""What attention takes and gives back within one operation, which a trace does not see."""

import torch

from karat_scale.attention.tiles import workspace_budget
from karat_scale.models.factory import layer_sizes
from karat_scale.recipe import Recipe

# Beside a tile's features, its scores and their gradients, and products of them that live for a moment.
ARRAYS_OF_A_TILE = 3
FP32 = 4


def attention_workspace(recipe: Recipe, images: int, on_gpu: bool) -> int:
    """Bytes of the tiles of the `streaming` implementation; 0 for the others.

    The Triton kernels keep tiles in registers, the CPU kernel some hundred KB a thread outside torch's allocator. With
    `auto`, a GPU takes Triton for the modular Fourier form with any base, and a CPU takes its kernel without a base.
    Layers with a position bias count as `streaming`, since half of Swin's also have a mask.
    """
    attention = recipe.attention
    if attention.kind == "softmax" or attention.implementation not in ("auto", "streaming"):
        return 0
    sizes = layer_sizes(recipe.model)
    has_kernel = attention.is_modular_series and (on_gpu or attention.base == "zero")
    has_kernel &= not any(size.biased for size in sizes)
    if attention.implementation == "auto" and has_kernel:
        return 0
    budget = workspace_budget(torch.device("cuda" if on_gpu else "cpu"))
    features = max(1, 2 * attention.grid)
    tile = min(budget // features, images * max(size.scores for size in sizes))
    return FP32 * tile * (features + ARRAYS_OF_A_TILE)
