"""Layouts: which elements of which parameter lie where in the flat fp32 tensors that one rank steps.

A layout is the one thing that ZeRO stages and world sizes differ in. A checkpoint keeps each rank's layout, so that its
tensors can be read by parameter name and put into any other layout.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch


class Fragment(NamedTuple):
    """`length` elements of the flattened parameter `name`, from `param_start` on, lie from `master_start` on."""

    name: str
    param_start: int
    master_start: int
    length: int

    @classmethod
    def whole(cls, name: str, parameter: torch.Tensor) -> "Fragment":
        """Return the only fragment of a tensor that holds one whole parameter and nothing else."""
        return cls(name, 0, 0, parameter.numel())


Layout = list[list[Fragment]]
"""The fragments of each master tensor of a rank."""


class Pieces:
    """Flattened parameters by name, each in one or several parts."""

    def __init__(self) -> None:
        self._parts: dict[str, list[tuple[int, torch.Tensor]]] = defaultdict(list)

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def add(self, fragments: Sequence[Fragment], master: torch.Tensor) -> None:
        """Take in the parts that lie in one master tensor, or in another tensor of its shape; nothing is copied."""
        flat = master.detach().reshape(-1)
        for name, param_start, master_start, length in fragments:
            self._parts[name].append((param_start, flat[master_start : master_start + length]))

    def covers(self, name: str, size: int) -> bool:
        """Return whether the parts of a parameter of `size` elements hold each of its elements once."""
        end = 0
        for start, part in sorted(self._parts.get(name, ()), key=lambda found: found[0]):
            if start != end:
                return False
            end += part.numel()
        return end == size

    def copy_into(self, name: str, flat: torch.Tensor) -> None:
        """Copy the available parts of a parameter to their places in its flattened tensor."""
        for start, part in self._parts.get(name, ()):
            flat[start : start + part.numel()].copy_(part)

    def fill(self, fragments: Sequence[Fragment], master: torch.Tensor) -> None:
        """Copy the elements of `fragments` into a master tensor, whatever parts they come from; zero its padding.

        Raises:
            KeyError: no part has some of the elements.
        """
        flat = master.detach().view(-1)
        zero_padding(fragments, master)
        for name, param_start, master_start, length in fragments:
            copied = 0
            for start, part in self._parts.get(name, ()):
                low, high = max(start, param_start), min(start + part.numel(), param_start + length)
                if low < high:
                    to = master_start + low - param_start
                    flat[to : to + high - low].copy_(part[low - start : high - start])
                    copied += high - low
            if copied != length:
                raise KeyError(f"{name} is not whole in it")


def zero_padding(fragments: Sequence[Fragment], master: torch.Tensor) -> None:
    """Zero what no fragment covers; at stage 3, DeepSpeed leaves old memory there."""
    flat = master.detach().view(-1)
    end = 0
    for fragment in sorted(fragments, key=lambda f: f.master_start):
        flat[end : fragment.master_start] = 0
        end = fragment.master_start + fragment.length
    flat[end:] = 0
