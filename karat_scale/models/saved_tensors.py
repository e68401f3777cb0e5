"""Count the bytes that autograd keeps of a forward pass for the backward pass.

Each storage counts once and whole, however many operations save a part of it. Parameters, buffers and the given inputs
exist anyway and do not count. Works on any device, including the meta device.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from karat_scale.models.layers import AttentionLayer, attention_layers


@dataclass(frozen=True)
class BlockBytes:
    """The bytes that a block's forward pass keeps for its backward pass.

    Attributes:
        input: bytes of the block's input tokens.
        saved: all bytes kept, including the input.
        attention: the part of `saved` that the attention keeps in addition to its input; 0 in a block without `attn`.
    """

    input: int
    saved: int
    attention: int


@dataclass(frozen=True)
class ActivationBytes:
    """The bytes that a model's forward pass keeps for its backward pass: per block, and outside the blocks."""

    outside: int
    blocks: tuple[BlockBytes, ...]


def saved_bytes(module: nn.Module, *inputs: Any) -> int:
    """Return the bytes that autograd keeps of `module(*inputs)`.

    Tensors kept by `torch.utils.checkpoint` count; tensors outside autograd do not. Random generators are restored;
    the module's mode and autocast are the caller's.
    """
    ledger = _Ledger(module, inputs)
    with ledger.watching(inputs):
        module(*inputs)
    return ledger.top.bytes


def activation_bytes(model: nn.Module, images: Tensor) -> ActivationBytes:
    """`saved_bytes` of `model(images)` by part, for a model that recomputes nothing.

    Needs only the memory of one block's activations: counted tensors are freed block by block.
    """
    ledger = _Ledger(model, (images,))
    blocks: list[BlockBytes] = []
    with contextlib.ExitStack() as stack:
        for layer in attention_layers(model):
            stack.enter_context(_counting(layer, ledger, blocks))
        stack.enter_context(ledger.watching((images,)))
        model(images)
    return ActivationBytes(ledger.top.bytes, tuple(blocks))


class _Part:
    """A part of a model, and the storages that it was the first to save; they stay alive, so that none counts twice."""

    def __init__(self) -> None:
        self.bytes = self.input = self.attention = 0
        self.storages: dict[int, torch.UntypedStorage] = {}


class _Ledger:
    """Counts storages when they are saved, for the innermost part that is running."""

    def __init__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._parts = [_Part()]  # storages that exist anyway, then the whole module, then the parts running within it
        for tensor in (*module.parameters(), *module.buffers(), *inputs):
            if isinstance(tensor, Tensor):
                self.note(tensor)
        self.enter()

    @property
    def top(self) -> _Part:
        return self._parts[-1]

    def enter(self) -> None:
        self._parts.append(_Part())

    def leave(self) -> _Part:
        return self._parts.pop()

    def note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()  # the same object each time while the storage is alive
        if not any(id(storage) in part.storages for part in self._parts):
            self.top.storages[id(storage)] = storage
            self.top.bytes += storage.nbytes()

    @contextlib.contextmanager
    def watching(self, inputs: tuple[Any, ...]) -> Iterator[None]:
        cards = {x.device for x in inputs if isinstance(x, Tensor) and x.device.type == "cuda"}
        with (
            torch.random.fork_rng(devices=list(cards)),
            torch.enable_grad(),
            saved_tensors_hooks(self.note, _no_backward),
        ):
            yield


def _no_backward(_: None) -> Tensor:
    raise RuntimeError("a forward pass whose saved tensors were only counted has no backward pass")


@contextlib.contextmanager
def _counting(layer: AttentionLayer, ledger: _Ledger, blocks: list[BlockBytes]) -> Iterator[None]:
    """Append the bytes that the layer's block saves when it runs to `blocks`."""

    def enter_block(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        ledger.enter()
        ledger.note(inputs[0])
        ledger.top.input = ledger.top.bytes

    def leave_block(*_: Any) -> None:
        part = ledger.leave()
        blocks.append(BlockBytes(part.input, part.bytes, part.attention))

    def enter_attention(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        ledger.note(inputs[0])  # the block's input: it is kept even if the attention is recomputed
        ledger.enter()

    def leave_attention(*_: Any) -> None:
        part = ledger.leave()
        ledger.top.bytes += part.bytes
        ledger.top.attention += part.bytes
        ledger.top.storages.update(part.storages)

    handles = [
        layer.block.register_forward_pre_hook(enter_block),
        layer.block.register_forward_hook(leave_block),
        layer.attention.register_forward_pre_hook(enter_attention),
        layer.attention.register_forward_hook(leave_attention),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
