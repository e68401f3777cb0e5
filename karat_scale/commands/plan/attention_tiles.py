"""Memory and traffic of attention's tiles, which a trace does not see.

The tiles of `streaming` stay within an operation. Those of query rows (`attend_rows`) are not traced, as their number
follows from the batch.
"""

import torch

from karat_scale.attention.kernels.triton_fourier import LARGEST_WIDTH
from karat_scale.attention.tiles import MIN_ROWS, workspace_budget
from karat_scale.attention.variants.rows import HELD
from karat_scale.commands.plan.zero import FP32
from karat_scale.models.factory import layer_sizes
from karat_scale.models.layers import LayerSize
from karat_scale.recipe import Recipe

# Beside a tile's features, its scores and their gradients, and products of them that live for a moment.
ARRAYS_OF_A_TILE = 3
# Of a tile of query rows, in arrays of the size of its scores: what is alive at the worst moment of its backward pass,
# and all that is ever allocated. Of each harmonic, and beside them; counted on traces of one tile.
HELD_BY_A_HARMONIC, HELD_BY_ROWS = 3, 6
WRITTEN_BY_A_HARMONIC, WRITTEN_BY_ROWS = 28, 14


def attention_workspace(recipe: Recipe, images: int, on_gpu: bool) -> int:
    """Bytes of the tiles of a batch; 0 where attention makes none.

    The Triton kernels keep tiles in registers, the CPU kernel some hundred KB a thread outside torch's allocator.
    """
    sizes, grid = layer_sizes(recipe.model), recipe.attention.grid
    budget = workspace_budget(torch.device("cuda" if on_gpu else "cpu"))
    streaming = rows = 0
    if _streams(recipe, on_gpu):
        features = max(1, 2 * grid)
        tile = min(budget // features, images * max(size.scores for size in sizes))
        streaming = tile * (features + ARRAYS_OF_A_TILE)
    if _tiles_rows(recipe, on_gpu):
        rows = max(_rows(size, images, budget) for size in sizes) * (HELD_BY_A_HARMONIC * grid + HELD_BY_ROWS)
    return FP32 * max(streaming, rows)


def written_by_rows(recipe: Recipe, on_gpu: bool) -> int:
    """Bytes that tiles of query rows write in a training step, for an image; those of `streaming` do not count."""
    if not _tiles_rows(recipe, on_gpu):
        return 0
    scores = sum(size.heads * size.scores for size in layer_sizes(recipe.model))
    return FP32 * scores * (WRITTEN_BY_A_HARMONIC * recipe.attention.grid + WRITTEN_BY_ROWS)


def _rows(size: LayerSize, images: int, budget: int) -> int:
    """Scores in a tile of query rows."""
    return min(max(budget // HELD, MIN_ROWS * size.heads * size.tokens), images * size.heads * size.scores)


def _tiles_rows(recipe: Recipe, on_gpu: bool) -> bool:
    attention = recipe.attention
    if attention.form != "content" or attention.implementation == "reference":
        return False
    # With a bias, psi goes row by row whatever computes H.
    return _streams(recipe, on_gpu) or any(size.biased for size in layer_sizes(recipe.model))


def _streams(recipe: Recipe, on_gpu: bool) -> bool:
    """Whether `streaming` runs.

    With `auto`, a GPU takes Triton for the modular Fourier form with any base, up to a head's largest width, and a CPU
    takes its kernel without a base.
    """
    attention = recipe.attention
    if attention.kind != "karat" or attention.implementation not in ("auto", "streaming"):
        return False
    has_kernel = attention.is_modular_series and (on_gpu or attention.base == "zero")
    has_kernel &= not (on_gpu and any(size.width > LARGEST_WIDTH for size in layer_sizes(recipe.model)))
    return attention.implementation == "streaming" or not has_kernel
