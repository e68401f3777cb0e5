"""Finds the first module and tensor of a step that is not finite: in the forward pass, then in the backward pass."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Finding:
    """A tensor with values that are not finite.

    Attributes:
        what: which tensor, such as "output of blocks.0.attn (KaratAttention)".
        bad, total: values that are not finite, and all.
        before: what the pass had computed just before it, with the largest finite magnitude in it.
    """

    what: str
    bad: int
    total: int
    before: str = ""

    def __str__(self) -> str:
        after = f"; before it: {self.before}" if self.before else ""
        return f"{self.what}: {self.bad:,} of {self.total:,} values{after}"


@dataclass
class Findings:
    """The first tensor that is not finite in each pass, and what the network saw and returned."""

    forward: Finding | None = None
    backward: Finding | None = None
    seen: list[Tensor] = field(default_factory=list)
    """The images of each micro batch."""
    returned: list[Tensor] = field(default_factory=list)
    """The logits of each micro batch."""


@contextmanager
def watched(network: nn.Module) -> Iterator[Findings]:
    """Watch the passes of a network inside the context. Each module's output is read, so a step is slower."""
    watch = _Watch(network)
    with ExitStack() as handles:
        for name, module in network.named_modules():
            handles.callback(module.register_forward_hook(watch.after(name)).remove)
        yield watch.findings


def not_finite(parameters: Iterator[tuple[str, Tensor]]) -> Finding | None:
    """Return the first parameter with values that are not finite; those that ZeRO stage 3 keeps elsewhere are empty."""
    return next((found for name, values in parameters if (found := _finding(f"weight {name}", values, ""))), None)


class _Watch:
    def __init__(self, network: nn.Module) -> None:
        self.findings = Findings()
        self._network = network
        self._largest = self._before_gradient = ""

    def after(self, name: str) -> Any:
        """The forward hook of one module."""

        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            title = f"{name or 'the network'} ({type(module).__name__})"
            if module is self._network:
                self._keep(inputs, output)
            for tensor in _floats(output):
                self._look_forward(title, tensor)
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: self._look_backward(title, gradient))

        return hook

    def _keep(self, inputs: tuple[Any, ...], output: Any) -> None:
        logits = output[0] if isinstance(output, tuple) else output
        self.findings.seen.append(inputs[0].detach().float().cpu())
        self.findings.returned.append(logits.detach().float().cpu())

    def _look_forward(self, title: str, output: Tensor) -> None:
        if self.findings.forward is None:
            self.findings.forward = _finding(f"output of {title}", output, self._largest)
            self._largest = f"output of {title} within {_largest(output):.3g}"

    def _look_backward(self, title: str, gradient: Tensor) -> None:
        if self.findings.backward is None:
            self.findings.backward = _finding(f"gradient of the output of {title}", gradient, self._before_gradient)
            self._before_gradient = f"gradient of the output of {title} within {_largest(gradient):.3g}"


def _finding(what: str, values: Tensor, before: str) -> Finding | None:
    bad = int((~torch.isfinite(values.detach())).sum())
    return Finding(what, bad, values.numel(), before) if bad else None


def _largest(values: Tensor) -> float:
    finite = values.detach().float()
    finite = finite[torch.isfinite(finite)]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _floats(output: Any) -> list[Tensor]:
    parts = output if isinstance(output, tuple | list) else (output,)
    return [part for part in parts if isinstance(part, Tensor) and part.is_floating_point()]
