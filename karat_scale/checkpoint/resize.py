"""A saved state for the same model at another image size: weights, averages and the optimizer's states."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from karat_scale.checkpoint.saved_state import SavedState
from karat_scale.engine.shards import Fragment, Pieces
from karat_scale.models.init_from import take_weights

_SQUARES = "exp_avg_sq"


def fit_state(saved: SavedState, model: nn.Module) -> SavedState:
    """Return `saved` for the image size of `model`, unchanged if it is the same.

    Everything is interpolated as `karat_scale.models.interpolate` does it with weights. Second moments are interpolated
    by their square roots: so they stay positive, and the ratio of the moments, which is the size of an update, is
    interpolated with them.

    Args:
        model: of the wanted size, whole, not used otherwise: its values are changed.

    Raises:
        RecipeError: the state is of another model.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if shapes == saved.shapes:
        return saved
    fitted = SavedState(
        shapes,
        scalars=saved.scalars,
        frozen=saved.frozen,
        counters=saved.counters,
        loss_scaler=saved.loss_scaler,
    )
    for key, pieces in saved.elementwise.items():
        power = 0.5 if key == _SQUARES else 1.0
        fitted.elementwise[key] = _fit(pieces, saved, model, power)
    if saved.ema is not None:
        fitted.ema = _fit(saved.ema, saved, model)
    fitted.masters = _fit(saved.masters, saved, model)
    fitted.buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return fitted


def _fit(pieces: Pieces, saved: SavedState, model: nn.Module, power: float = 1.0) -> Pieces:
    """Return values by parameter name for the model's size; each is raised to `power` while it is interpolated."""
    values = {name: _whole(pieces, name, shape) ** power for name, shape in saved.shapes.items()}
    # Also named as buffers are the parameters of an operator that blocks share, once for each further block.
    own = dict(model.named_buffers())
    buffers = _floats({name: buffer for name, buffer in saved.buffers.items() if name in own})
    take_weights(model, {**values, **buffers}, new_head=False)
    fitted = Pieces()
    for name, parameter in model.named_parameters():
        if name in pieces:  # an optimizer has no states of frozen parameters, or other ones for some
            value = parameter.detach().float().clone() ** (1 / power)
            fitted.add([Fragment(name, 0, 0, value.numel())], value)
    return fitted


def _whole(pieces: Pieces, name: str, shape: tuple[int, ...]) -> Tensor:
    value = torch.zeros(shape)
    pieces.copy_into(name, value.view(-1))
    return value


def _floats(buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: buffer.float() if buffer.is_floating_point() else buffer for name, buffer in buffers.items()}
