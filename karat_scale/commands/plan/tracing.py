"""The figures of a recipe before training: allocations and kernels of its passes, and the number of images.

The model runs forward and backward on fake tensors, which have shapes, dtypes and storages but no memory
(`torch._subclasses.fake_tensor`). So a trace takes about a second for any model and batch, and a GPU's operations are
traced on a machine without one. A trace does not see memory that an operation takes and gives back within itself;
`memory.attention_workspace` counts that of attention.

Images are counted only from the data's records: no image, decoder or hash is touched.
"""

import gc
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from karat_scale.data.shards import shard_format
from karat_scale.data.shards.shards import FolderSplit
from karat_scale.foundation.errors import DataError
from karat_scale.foundation.stores import StoreError
from karat_scale.foundation.tables import Files
from karat_scale.models.layers import blocks_of
from karat_scale.recipe import DataConfig

OUTSIDE = -1
"""The part of a model that is no block: patch embedding, last norm, head, loss."""

_aten = torch.ops.aten
# Operations that make a tensor and write nothing.
_ALLOCATE = (_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided)

# Kernels of operations that have more than one. A norm's backward pass reduces its weights' gradients separately;
# attention's first multiplies O by its gradient, and last rounds the query's gradient.
_KERNELS = {
    "native_layer_norm_backward": 2,
    "_scaled_dot_product_flash_attention_for_cpu_backward": 3,
    "convolution_backward": 3,
}
# Kernels of KArAt's own operations, which have one name each for the forward and the backward pass. The backward pass
# of psi(A) V, of the content form, ends with a sum.
OPERATOR_FORWARD, OPERATOR_BACKWARD = 2, 5
PSI_FORWARD, PSI_BACKWARD = 1, 3
# Operations that torch.compile leaves as separate kernels.
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")
_ATTENTION = "_scaled_dot_product"


@dataclass(frozen=True)
class Launches:
    """Kernels of a forward and backward pass: products (attention included), and all others, mostly elementwise."""

    products: int
    others: int

    @classmethod
    def of(cls, operations: Iterable[Any]) -> "Launches":
        """Return the launches of operations of the dispatcher (`OpOverload`) that each launch something."""
        products = others = 0
        for operation in operations:
            name = operation._schema.name.partition("::")[2]
            if operation.namespace == "karat_scale":
                passes = (PSI_FORWARD, PSI_BACKWARD) if "psi" in name else (OPERATOR_FORWARD, OPERATOR_BACKWARD)
                products += passes["backward" in name]
            elif name in _PRODUCTS or name.startswith(_ATTENTION):
                products += _KERNELS.get(name, 1)
            else:
                others += _KERNELS.get(name, 1)
        return cls(products, others)

    def kernels(self, compiled: bool) -> int:
        """Return how many kernels run: compiled, all operations between two products become one kernel."""
        return self.products + (min(self.others, self.products) if compiled else self.others)


@dataclass
class Allocation:
    """A storage of `bytes`, which is freed before the `died`-th storage is made, or never.

    Time is counted in births: storages that die between two births have no order, as when autocast frees its casts.
    `part` is the block whose forward pass made it, or OUTSIDE. `gradient`: whether a parameter keeps it.
    """

    bytes: int
    part: int
    died: int | None = None
    gradient: bool = False


@dataclass(frozen=True)
class Trace:
    """The allocations of one micro batch; the first `forward` are the forward pass's and the loss's.

    launching: the operations that launch kernels, in order.
    """

    allocations: tuple[Allocation, ...]
    forward: int
    launching: tuple[OpOverload, ...]


def fake_copy(model: nn.Module, dtype: torch.dtype | None = None) -> FakeTensorMode:
    """Give `model` parameters and buffers that are fake, in `dtype` if given; returns the mode they live in."""
    mode = FakeTensorMode()
    made: dict[Tensor, nn.Parameter] = {}

    def fake(tensor: Tensor) -> Tensor:
        with mode:
            return torch.empty(tensor.shape, dtype=dtype if dtype and tensor.is_floating_point() else tensor.dtype)

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in made:
                    made[parameter] = nn.Parameter(fake(parameter), parameter.requires_grad)
                module._parameters[name] = made[parameter]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer)
    return mode


def trace_step(
    model: Any, mode: FakeTensorMode, batch: int, size: int, autocast: bool, pixels: torch.dtype | None, trains: bool
) -> Trace:
    """Trace forward, soft-target cross-entropy and backward of `batch` images [3, size, size] on a `fake_copy`.

    The images are in the dtype `pixels`, or that of the weights. They and the targets exist before the trace and do not
    count. Parameters have no gradients before it. Without `trains`, only the forward pass of an evaluation is traced.
    """
    parameters = list(model.parameters())
    model.train(trains)
    with _no_collection(), torch.set_grad_enabled(trains), mode:
        images = torch.empty(batch, 3, size, size, dtype=pixels or parameters[0].dtype)
        targets = torch.empty(batch, model.num_classes)
        tracker = _Tracker([*parameters, *model.buffers(), images, targets])
        followed = enumerate(blocks_of(model)) if trains else ()
        hooks = [hook for number, block in followed for hook in tracker.follow(number, block)]
        with tracker, torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            logits = model(images)
        with tracker:
            if trains:
                loss = torch.sum(-targets * torch.log_softmax(logits.float(), dim=-1), dim=-1).mean()
                del logits
                forward = tracker.births
                loss.backward()
            else:
                logits = logits.float()
                forward = tracker.births
        trace = tracker.trace(forward, [p.grad for p in parameters if p.grad is not None])
    for hook in hooks:
        hook.remove()
    for parameter in parameters:
        parameter.grad = None
    return trace


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector from freeing tensors at arbitrary moments."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class _Tracker(TorchDispatchMode):
    """Notes each new storage that an operation returns, and when it is freed."""

    def __init__(self, there: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._allocations: list[Allocation] = []
        self._launching: list[OpOverload] = []
        self._living: dict[int, Allocation | None] = {_key(tensor): None for tensor in there}
        self._part = OUTSIDE

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_new = [self._note(tensor) for tensor in tree_leaves(result) if isinstance(tensor, Tensor)]
        if (any(is_new) or func._schema.is_mutable) and func.overloadpacket not in _ALLOCATE:
            self._launching.append(func)
        return result

    @property
    def births(self) -> int:
        """Allocations so far."""
        return len(self._allocations)

    def follow(self, number: int, block: nn.Module) -> list[Any]:
        """Hooks that know which block runs."""

        def note(part: int) -> Callable[..., None]:
            return lambda *_: setattr(self, "_part", part)

        return [block.register_forward_pre_hook(note(number)), block.register_forward_hook(note(OUTSIDE))]

    def trace(self, forward: int, gradients: Iterable[Tensor]) -> Trace:
        """Return what was noted so far, without later deaths."""
        for gradient in gradients:
            allocation = self._living[_key(gradient)]
            assert allocation is not None
            allocation.gradient = True
        self._living = {}
        return Trace(tuple(self._allocations), forward, tuple(self._launching))

    def _note(self, tensor: Tensor) -> bool:
        """Note a tensor's storage; returns whether it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._living:
            return False
        allocation = Allocation(storage.nbytes(), self._part)
        self._living[key] = allocation
        self._allocations.append(allocation)
        weakref.finalize(storage, self._drop, key)
        return True

    def _drop(self, key: int) -> None:
        allocation = self._living.pop(key, None)
        if allocation is not None:
            allocation.died = self.births


def _key(tensor: Tensor) -> int:
    place: int = tensor.untyped_storage()._cdata
    return place


IMAGENET = 1_281_167
# Seconds for data at a URL, which this machine may not reach.
_PATIENCE = 10.0


def count_samples(data: DataConfig) -> tuple[int, str]:
    """Return the number of training images, and its source; ImageNet-1K's if the recipe's data is not here."""
    try:
        return _recorded(data), "of the recipe's data"
    except _AbsentError:
        return IMAGENET, "ImageNet-1K's, since the recipe's data is not here"


class _AbsentError(DataError):
    """There is nothing at data.path, or it does not answer."""


def _recorded(data: DataConfig) -> int:
    """Return the number in the data's records, or in a listing of an image folder. Raises DataError, _AbsentError."""
    if data.row.files is None:
        return data.synthetic_samples
    if data.stream_samples is not None:
        return data.stream_samples
    directory = shard_format.dataset_directory(shard_format.staged_copy(data.path) or data.path)
    if not isinstance(directory, str):
        try:
            shard_format.must_answer(directory, data.timeout)
        except DataError as error:
            raise _AbsentError from error
        if not directory.is_dir():
            raise _AbsentError
        if data.row.files is Files.IMAGES:
            return len(FolderSplit(directory, data.train_split, num_classes=sys.maxsize))
        if data.row.files is Files.BETONS:
            return shard_format.read_record(shard_format.beton_path(directory, data.train_split)).samples
    try:
        record = shard_format.read_dataset_record(directory, min(data.timeout, _PATIENCE))
    except StoreError as error:
        raise _AbsentError from error
    (split,) = shard_format.chosen_splits(directory, record, data.train_split).values()
    return split.samples
