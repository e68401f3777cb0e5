"""Floating-point operations of a model, as its equations require, whatever implementation computes them.

A multiply-add is two operations. As is usual for MFU, matrix products count. Elementwise work (norms, softmax, base
activations, the simplex) and whatever is computed a second time do not. A learnable function with K coefficients
counts as K multiply-adds per evaluation, so that KArAt's sums over keys count like the matrix products they are. With
attention transfer, S V counts, and the teacher's own pass does not.
"""

import copy
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from karat_scale.attention.operator import AttentionHeads
from karat_scale.foundation.errors import RecipeError, one_line
from karat_scale.models.factory import create_model
from karat_scale.models.layers import freeze
from karat_scale.models.transfer import TransferredAttention
from karat_scale.recipe import AttentionConfig, ModelConfig


class Flops(NamedTuple):
    """The operations for one image."""

    forward: int
    training: int
    """Forward and backward, without recomputation: three times forward, minus the gradients of the pixels and of frozen
    parameters. An operator's parameters count as learning unless all are frozen."""


def flops_per_image(model: ModelConfig, attention: AttentionConfig, frozen: Sequence[str] = ()) -> Flops:
    """Count a model's operations. Nothing is allocated: the model is built and run on torch's meta device.

    frozen: the patterns of `train.freeze`.

    Raises:
        RecipeError: the model cannot be built, a pattern matches nothing, or a class of the user's needs values.
    """
    with torch.device("meta"):
        network = create_model(model, attention)
        freeze(network, frozen)
        passed = _let_operators_pass(network)
        image = torch.empty(1, 3, model.image_size, model.image_size)
        # SDPA's fused backward passes would count the scores twice, since they compute them again.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            try:
                logits = network(image)
            except (NotImplementedError, RuntimeError) as error:
                if all(section.row for section in attention.sections):
                    raise
                raise RecipeError(
                    f"attention.kind: the forward of your class cannot be counted without values ({one_line(error)}); "
                    "define flops(self, tokens, width, masked=False)"
                ) from error
            forward = counter.get_total_flops()
            logits.sum().backward()
    learned = sum(operator.flops for operator in passed)
    backward = sum(operator.backward_flops for operator in passed)
    return Flops(forward + learned, counter.get_total_flops() + learned + backward)


def forward_flops(network: nn.Module, image_size: int) -> int:
    """Count the operations of any network's forward pass for one image, on a copy without memory."""
    counted = copy.deepcopy(network).to("meta").eval()
    passed = _let_operators_pass(counted)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        counted(torch.empty(1, 3, image_size, image_size, device="meta"))
    total: int = counter.get_total_flops()
    return total + sum(operator.flops for operator in passed)


class _PassedOperator(nn.Module):
    """Replaces an operator: counts it, and passes gradients to all three inputs."""

    def __init__(self, operator: AttentionHeads) -> None:
        super().__init__()
        self._counted = operator
        self.num_heads = operator.num_heads
        self.flops = self.backward_flops = 0
        parameters = list(operator.parameters())
        self._learns = [parameter for parameter in parameters if parameter.requires_grad][:1]
        # Where no product has a parameter, both factors are activations.
        self._of_parameters = operator.multiplies_parameters and bool(parameters)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Return a tensor of O's shape."""
        batch, _heads, tokens, width = query.shape
        flops = batch * self._counted.flops(tokens, width, masked=mask is not None)
        passed = query + key + value
        self.flops += flops
        others = bool(self._learns) if self._of_parameters else passed.requires_grad
        self.backward_flops += flops * (passed.requires_grad + others)
        return passed + sum(0 * parameter.sum() for parameter in self._learns)


class _AnyMatrices:
    """Replaces a student's teacher: returns S V without computing it."""

    def attend(self, _: int, value: Tensor) -> Tensor:
        """Return S V for value [B, h, N, d]."""
        return value.new_empty(*value.shape[:3], value.shape[2]) @ value


def _let_operators_pass(network: nn.Module) -> Collection[_PassedOperator]:
    """Let operators and teachers be counted instead of computed; return the modules that replace the operators.

    An operator that all blocks share is replaced once; an operator within another counts with the outer one. An
    operator that does not define `flops` is computed.
    """
    passed: dict[nn.Module, _PassedOperator] = {}

    def replace_in(module: nn.Module) -> None:
        if isinstance(module, TransferredAttention):
            module.teacher = _AnyMatrices()
        for name, child in list(module.named_children()):
            if isinstance(child, AttentionHeads) and type(child).flops is not AttentionHeads.flops:
                setattr(module, name, passed.setdefault(child, _PassedOperator(child)))
            elif not isinstance(child, _PassedOperator):  # a layer that blocks share already has one
                replace_in(child)

    replace_in(network)
    return passed.values()
