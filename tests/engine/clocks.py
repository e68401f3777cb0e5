"""A check on a CPU, with vector clocks, that the CUDA streams and the NCCL stream of a training step are in order.

DeepSpeed's own code runs on fake streams as one rank of several, with torch's fake process group. Each operation of the
dispatcher is work of the current stream, and the emulation notes which memory it reads and writes. Two pieces of work
race if they touch the same bytes, at least one of them writes, and no wait orders one before the other (Lamport, "Time,
clocks, and the ordering of events", 1978; Mattern, "Virtual time and global states", 1989). As in CUDA's caching
allocator, freed memory goes back to the stream that it was allocated on. The work of other streams on it must be
ordered before the first work on the next allocation there, or be announced by `record_stream`.

`python -m tests.engine.clocks CASES OUT WORLD RANK` trains each case of a JSON file (a recipe's overrides, a DeepSpeed
file, and whether hooks run apart), and writes the races of each.
"""

import functools
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.utils.clip_grad as clipping
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from karat_scale.engine import deepspeed_internals, distributed, optimizers
from karat_scale.engine.distributed import World
from karat_scale.engine.engine import Engine
from karat_scale.engine.optimizers import Ema
from karat_scale.models import create_model
from karat_scale.recipe.loading import load_recipe
from tests.conftest import SMALL
from tests.engine.fp16_on_cpu import allow_fp16

Clock = Counter[str]
"""How much of each stream's work is known to be done before what comes next."""

# They look at a tensor's form, or make it larger without touching what is there.
_TOUCH_NOTHING = ("aten.empty", "aten.new_empty", "aten.detach", "aten.resize_", "aten.set_", "aten.is_pinned")


def _join(clock: Clock, other: Clock) -> None:
    for name, time in other.items():
        clock[name] = max(clock[name], time)


class Stream:
    """A stand-in for a CUDA stream."""

    emulation: "Emulation"

    def __init__(self, *_: Any, name: str = "", **__: Any) -> None:
        own = self.emulation.streams
        self.name = name or f"side {len(own)}"
        self.clock: Clock = Counter()
        own.append(self)

    def work(self) -> None:
        """Begin a piece of work, after everything that this stream and the host have waited for."""
        _join(self.clock, self.emulation.host)
        self.clock[self.name] += 1

    def wait_stream(self, other: "Stream") -> None:
        """Order this stream's next work after all work that `other` has now."""
        _join(self.clock, other.clock)

    def wait_event(self, event: "Event") -> None:
        """Order this stream's next work after the event."""
        _join(self.clock, event.clock)

    def record_event(self, event: "Event | None" = None) -> "Event":
        """Return an event that comes after all work that this stream has now."""
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        """Let the host wait for this stream."""
        _join(self.emulation.host, self.clock)


class Event:
    """A stand-in for a CUDA event that never looks complete to the host."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.clock: Clock = Counter()

    def record(self, stream: Stream | None = None) -> None:
        """Place the event after all work that the stream has now."""
        self.clock = Counter((stream or Stream.emulation.current).clock)

    def wait(self, stream: Stream | None = None) -> None:
        """Order the stream's next work after the event."""
        (stream or Stream.emulation.current).wait_event(self)

    def query(self) -> bool:
        """Return False: the event is not complete."""
        return False

    def synchronize(self) -> None:
        """Let the host wait for the event."""
        _join(Stream.emulation.host, self.clock)


class Work:
    """A handle of a collective. It keeps an asynchronous collective's tensors until `wait` is called, as NCCL does."""

    def __init__(self, event: Event, kept: Any) -> None:
        self._event, self._kept = event, kept
        Stream.emulation.pending.append(self)

    def wait(self, *_: Any) -> bool:
        """Let the current stream wait for the collective; the host goes on."""
        self._event.wait()
        self._kept = None
        return True

    def is_completed(self) -> bool:
        """Return False: the host does not know whether the collective is complete."""
        return False


@dataclass
class _Access:
    start: int
    end: int
    stream: str
    time: int
    writes: bool
    by: str

    def is_before(self, clock: Clock) -> bool:
        return self.time <= clock[self.stream]


@dataclass
class _Memory:
    """The accesses to a storage, and the stream that it was allocated on."""

    storage: StorageWeakRef
    owner: Stream
    accesses: list[_Access] = field(default_factory=list)
    recorded: set[str] = field(default_factory=set)


class Emulation(TorchDispatchMode):
    """Streams of a device, the memory that they touch, and the races that were found."""

    def __init__(self) -> None:
        super().__init__()
        Stream.emulation = self
        self.host: Clock = Counter()
        self.streams: list[Stream] = []
        self.default, self.nccl = Stream(name="default"), Stream(name="NCCL")
        self._inside = [self.default]
        self._memory: dict[int, _Memory] = {}
        self._watched: dict[int, _Memory] = {}
        self._freed: dict[Stream, list[_Access]] = defaultdict(list)
        self.races: Counter[str] = Counter()
        self.works: Counter[str] = Counter()
        self.pending: list[Work] = []

    @property
    def current(self) -> Stream:
        """Return the stream that new work goes to."""
        return self._inside[-1]

    @contextmanager
    def on(self, stream: Stream | None) -> Iterator[None]:
        """Send the work inside the block to this stream."""
        self._inside.append(stream or self.current)
        try:
            yield
        finally:
            self._inside.pop()

    def synchronize(self, *_: Any) -> None:
        """Let the host wait for the device."""
        for stream in self.streams:
            stream.synchronize()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = str(func), kwargs or {}
        if func.is_view or name.startswith(_TOUCH_NOTHING):
            out = func(*args, **kwargs)
            for tensor in _tensors(out):  # memory that is not written yet has an owner, too
                self._of(tensor)
            return out
        self._look_for_freed_memory()
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        # NCCL takes its own stream for a collective that the caller waits for later, and the current one for others.
        stream = self.nccl if func.namespace == "c10d" and given.get("async_op", True) else self.current
        if stream is self.nccl:
            self.nccl.wait_stream(self.current)
        stream.work()
        self.works[stream.name] += 1
        out = func(*args, **kwargs)
        schema = {argument.name: argument for argument in func._schema.arguments}
        touched: set[int] = set()
        for key, value in given.items():
            writes = schema[key].alias_info is not None and schema[key].alias_info.is_write
            reads = True
            if func.namespace == "c10d":
                writes, reads = not key.startswith("input"), not key.startswith("output")
            for tensor in _tensors(value):
                touched.add(tensor.untyped_storage()._cdata)
                if writes or reads:
                    self._touch(tensor, stream, writes, name)
        for tensor in _tensors(out):
            if tensor.untyped_storage()._cdata not in touched:
                self._touch(tensor, stream, True, name)
        if "_local_scalar_dense" in name or name.startswith(("aten.nonzero", "aten.equal")):
            stream.synchronize()
        return out

    def record_stream(self, tensor: torch.Tensor, stream: Stream) -> None:
        """Note, as torch does, that `stream` uses the memory: after it is freed, its reuse waits for that stream."""
        self._of(tensor).recorded.add(stream.name)

    def _of(self, tensor: torch.Tensor) -> _Memory:
        storage = tensor.untyped_storage()
        memory = self._memory.get(storage._cdata)
        if memory is None or memory.storage.expired():
            if memory is not None:
                self._free(memory)
            memory = self._memory[storage._cdata] = _Memory(StorageWeakRef(storage), self.current)
            self._watched.pop(storage._cdata, None)
        return memory

    def _touch(self, tensor: torch.Tensor, stream: Stream, writes: bool, by: str) -> None:
        if tensor.numel() == 0:
            return
        memory = self._of(tensor)
        if not memory.accesses:
            self._reuse(memory.owner, stream)
        size = tensor.element_size()
        start = tensor.storage_offset() * size
        last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        access = _Access(start, start + (last + 1) * size, stream.name, stream.clock[stream.name], writes, by)
        kept = []
        for other in memory.accesses:
            meets = other.start < access.end and access.start < other.end
            if meets and (writes or other.writes) and not other.is_before(stream.clock):
                kinds = ("reads", "writes")
                self.races[
                    f"{by} on {stream.name} {kinds[writes]} what {other.by} on {other.stream} {kinds[other.writes]}"
                ] += 1
            covered = access.start <= other.start and other.end <= access.end
            if not (covered and other.is_before(stream.clock) and (writes or not other.writes)):
                kept.append(other)
        memory.accesses = [*kept, access]
        if stream is not memory.owner:
            self._watched[tensor.untyped_storage()._cdata] = memory

    def _look_for_freed_memory(self) -> None:
        for key, memory in list(self._watched.items()):
            if memory.storage.expired():
                del self._watched[key]
                self._free(memory)

    def _free(self, memory: _Memory) -> None:
        self._freed[memory.owner] += [access for access in memory.accesses if access.stream not in memory.recorded]

    def _reuse(self, owner: Stream, stream: Stream) -> None:
        """Check the first work on newly allocated memory, which may be any memory that `owner` got back."""
        for access in self._freed[owner]:
            if not access.is_before(stream.clock):
                self.races[f"memory of {owner.name} is used again while {access.by} on {access.stream} needs it"] += 1
        self._freed[owner] = []


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


@contextmanager
def emulated() -> Iterator[Emulation]:
    """Yield an emulation. Inside the block DeepSpeed's accelerator has streams, and collectives have their own."""
    from deepspeed.accelerator import get_accelerator

    emulation = Emulation()
    kind = type(get_accelerator())
    own: dict[str, Any] = {
        "is_synchronized_device": lambda self: False,
        "resolves_data_dependency": lambda self: False,
        "handles_memory_backpressure": lambda self: False,
        "synchronize": lambda self, *_: emulation.synchronize(),
        "current_stream": lambda self, *_: emulation.current,
        "default_stream": lambda self, *_: emulation.default,
        "stream": lambda self, stream: emulation.on(stream),
        "Stream": Stream,
        "Event": Event,
    }
    with ExitStack() as stack:
        for name, value in own.items():
            stack.enter_context(patch.object(kind, name, value))
        stack.enter_context(patch.object(torch.Tensor, "record_stream", lambda t, s: emulation.record_stream(t, s)))
        for name, theirs in list(vars(dist.ProcessGroup).items()):
            if callable(theirs) and not name.startswith("__"):
                stack.enter_context(patch.object(dist.ProcessGroup, name, _returning_clocked_work(theirs, emulation)))
        # As on a GPU: one operation for all parameters.
        stack.enter_context(patch.object(optimizers, "averages_one_by_one", lambda device: False))
        stack.enter_context(patch.object(optimizers, "steps_fused", lambda device: True))
        stack.enter_context(patch.object(clipping, "_has_foreach_support", lambda tensors, device: True))
        stack.enter_context(emulation)
        yield emulation


def _returning_clocked_work(collective: Callable[..., Any], emulation: Emulation) -> Callable[..., Any]:
    @functools.wraps(collective)
    def call(*args: Any, **kwargs: Any) -> Any:
        out = collective(*args, **kwargs)
        is_async = any(getattr(argument, "asyncOp", True) is True for argument in args[1:])
        return Work(emulation.nccl.record_event(), args if is_async else None) if isinstance(out, dist.Work) else out

    return call


def _run_some_hooks_apart(emulation: Emulation, model: torch.nn.Module) -> Callable[[], None]:
    """Let the hooks of every second gradient run on a stream of their own, as torch.compile may.

    Call it before DeepSpeed adds its hooks, and call the function that it returns after that. The hooks do what torch's
    autograd engine does: a stream waits for what it gets from another, the allocator is told, and at the end of a
    backward pass all streams are joined.
    """
    side, apart = Stream(), list(model.parameters())[1::2]

    def join(_: torch.Tensor) -> None:
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(lambda: emulation.default.wait_stream(side))

    def to_side(parameter: torch.Tensor) -> None:
        side.wait_stream(emulation.default)
        emulation._inside.append(side)
        assert parameter.grad is not None
        emulation.record_stream(parameter.grad, side)
        parameter.grad.mul_(1)  # as if it was added to another micro batch's

    def from_side(_: torch.Tensor) -> None:
        emulation._inside.pop()

    def add_last_hooks() -> None:
        for parameter in apart:
            parameter.register_post_accumulate_grad_hook(from_side)

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(join)
    for parameter in apart:
        parameter.register_post_accumulate_grad_hook(to_side)
    return add_last_hooks


def races(
    world: World, scratch: Path, overrides: list[str], config: dict[str, Any], hooks_apart: bool = False
) -> dict[str, Any]:
    """Train a case for three steps; return its most frequent races and how much work each stream had."""
    file, base = scratch / "case.json", scratch / "case.yaml"
    file.write_text(json.dumps(config))
    base.write_text("data: {backend: synthetic, synthetic_samples: 32}\nattention: {kind: softmax}\n")
    fixed = ("schedule.warmup_epochs=0", f"run.dir={scratch / 'run'}", f"deepspeed.config={file}")
    recipe = load_recipe(base, [*SMALL, *fixed, *overrides])
    torch.manual_seed(0)
    with emulated() as emulation:
        model = create_model(recipe.model, recipe.attention)
        add_last_hooks = _run_some_hooks_apart(emulation, model) if hooks_apart else None
        engine = Engine(model, recipe, world, 2)
        if add_last_hooks is not None:
            add_last_hooks()
        average = Ema(engine.deepspeed, recipe.train)
        for step in range(1, 4):
            for _ in range(recipe.train.global_batch // world.size // 2):
                loss = torch.nn.functional.cross_entropy(engine.forward(torch.randn(2, 3, 16, 16)), torch.arange(2))
                engine.set_lr(1e-3)
                engine.backward(loss)
                engine.step()
            average.update(step)
        deepspeed_internals.refresh_module(engine.deepspeed)
        engine.forward(torch.randn(2, 3, 16, 16))
        emulation.synchronize()
    engine.release()
    return {"races": dict(emulation.races.most_common(5)), "works": dict(emulation.works)}


def main(cases_file: str, out_file: str, world_size: str, rank: str) -> None:
    """Train the cases one after the other."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=int(rank), world_size=int(world_size))
    distributed.tell_deepspeed("cpu")
    allow_fp16()
    os.environ["LOCAL_RANK"] = "0"
    world = World(int(rank), int(world_size), 0, torch.device("cpu"))
    found = []
    for case in json.loads(Path(cases_file).read_text()):
        found.append(races(world, Path(cases_file).parent, *case))
        Path(out_file).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
