"""The samples of the user's own map-style dataset, in our order: of any kind, such as all files beside an image.

A sample may use random numbers: its own generator, or those of Python, NumPy and torch. All of them are seeded for each
sample, so it is the same on any rank, in any worker, and after a resume.
"""

import copy
import inspect
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import default_collate

from karat_scale.data.backends.images import Backend
from karat_scale.data.batch import digest_sum
from karat_scale.data.indexing import LabelRule
from karat_scale.data.loading.assemble import ImageSpec
from karat_scale.data.loading.workers import OrderedResults, Whereabouts, worker_number
from karat_scale.data.plan import PADDING, BatchSlice, sample_seed
from karat_scale.data.shards.shards import ShardSplit
from karat_scale.data.shards.tars import scan_members
from karat_scale.foundation.console import plural
from karat_scale.foundation.errors import DataError, RecipeError


class Dataset(Protocol):
    """Samples by their number. `__getitem__` may take a second argument, `generator`: a torch.Generator."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True, eq=False)
class Collated:
    """A micro batch. content: the result of `collate`. sample_ids: int64 [b], without padding.

    digest: the digest sum of each sample's global batch, number and seed, as in `karat_scale.data.batch`.
    """

    content: Any
    sample_ids: torch.Tensor
    digest: int

    @property
    def tensors(self) -> list[Any]:
        """The tensors, and objects of other classes with a method `record_stream`, that move to the device."""
        found: list[Any] = []

        def note(x: Any) -> Any:
            if hasattr(x, "record_stream"):
                found.append(x)
            else:  # some of its tensors may stay on the host, as in a PackedSequence
                parts = x if isinstance(x, tuple) else getattr(x, "__dict__", {}).values()
                found.extend(part for part in parts if isinstance(part, torch.Tensor) and part.is_cuda)
            return x

        _each_tensor(self.content, note)
        return found

    def to(self, device: torch.device, non_blocking: bool = True) -> "Collated":
        """Return the same batch on `device`; `sample_ids` stay on the host."""

        def moved(x: Any) -> Any:  # the `to` of other classes may take nothing but a device
            return x.to(device, non_blocking=non_blocking) if isinstance(x, torch.Tensor) else x.to(device)

        return replace(self, content=_each_tensor(self.content, moved))

    def pin_memory(self) -> "Collated":
        """Return the same batch in page-locked memory, except what is on a device."""

        def pinned(x: Any) -> Any:
            return x if getattr(x, "is_cuda", False) or not hasattr(x, "pin_memory") else x.pin_memory()

        return replace(self, content=_each_tensor(self.content, pinned))


class OwnSamples(Backend):
    """The batches of a dataset. See Backend; training and evaluation have the same samples, and there are no classes.

    transform: a function of each sample, called in the worker; it may take a second argument, `generator`. collate: the
    function that makes a batch from a list of samples.
    """

    def __init__(
        self,
        dataset: Dataset,
        spec: ImageSpec,
        transform: Callable[..., Any] | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        super().__init__(spec, len(dataset), len(dataset), ())
        if not len(dataset):
            raise DataError("the dataset has no samples")
        if callable(getattr(dataset, "identity", None)):
            raise RecipeError("the dataset's identity is a method; make it a property")
        self._dataset = dataset
        self._steps: list[tuple[Callable[..., Any], bool]] = [
            (dataset.__getitem__, _takes_generator(type(dataset).__getitem__))
        ]
        if transform is not None:
            self._steps.append((transform, _takes_generator(transform)))
        self._collate = collate or default_collate
        self._at = Whereabouts()

    @property
    def identity(self) -> str:
        """The data's identity in a checkpoint: the dataset's `identity` if it has one, else its class and length."""
        own = getattr(self._dataset, "identity", None)
        return str(own) if own is not None else f"{type(self._dataset).__name__} of {self.num_train} samples"

    def train_batches(self, slices: Iterable[BatchSlice]) -> Iterator[Any]:
        """Return the batches of `slices`, each `Collated`, in their order."""
        data = self.spec.data
        return self._handing_out(
            OrderedResults(self._make, slices, data.workers, data.prefetch, data.timeout, self._whereabouts)
        )

    eval_batches = train_batches

    def _make(self, part: BatchSlice) -> Collated:
        ids: npt.NDArray[np.int64] = part.sample_ids[part.sample_ids != PADDING]
        seeds = [(sample_id, sample_seed(self.spec.seed, part.epoch, sample_id)) for sample_id in ids.tolist()]
        try:
            with _random_numbers_kept():
                samples = [self._sample(*row) for row in seeds]
                content = self._collate(samples) if samples else None
        except StopIteration as error:  # which would end the loop as if there were no more batches
            raise RuntimeError("the dataset, transform or collate raised StopIteration") from error
        digest = digest_sum((part.epoch, part.batch, *row) for row in seeds)
        return Collated(content, torch.from_numpy(ids.copy()), digest)

    def _sample(self, sample_id: int, seed: int) -> Any:
        self._at.tell(sample_id)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.random.default_generator.manual_seed(seed)
        made: Any = sample_id
        try:
            for step, takes_generator in self._steps:
                # From the same seed each, so that a transform draws the same whatever the dataset drew.
                made = step(made, generator=torch.Generator().manual_seed(seed)) if takes_generator else step(made)
        except Exception as error:
            if hasattr(error, "add_note"):  # since Python 3.11
                error.add_note(f"at sample {sample_id}")
            raise
        return made

    def _whereabouts(self, workers: int) -> str:
        return self._at.told(workers, lambda sample_id: f"at sample {sample_id}")


def _takes_generator(function: Callable[..., Any]) -> bool:
    if isinstance(function, torch.nn.Module):
        function = function.forward
    try:
        return "generator" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # of a function in C
        return False


@contextmanager
def _random_numbers_kept() -> Iterator[None]:
    """Restore the training process's random state after the block; in a worker, do nothing."""
    if worker_number() is not None:
        yield
        return
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _each_tensor(content: Any, change: Callable[[Any], Any]) -> Any:
    """Return the content of a batch with each tensor in it changed, and each object of a class with a method `to`."""
    if isinstance(content, torch.Tensor):
        return change(content)
    changed: Any
    if isinstance(content, MutableMapping):
        changed = copy.copy(content)
        for key, value in content.items():
            changed[key] = _each_tensor(value, change)
        return changed
    if isinstance(content, Mapping):
        return {key: _each_tensor(value, change) for key, value in content.items()}
    if is_dataclass(content) and not isinstance(content, type):
        changed = copy.copy(content)
        for field in fields(content):
            value = getattr(content, field.name)
            object.__setattr__(changed, field.name, _each_tensor(value, change))  # it may be frozen
        return changed
    if callable(getattr(content, "to", None)) and not isinstance(content, type):  # such as torch's PackedSequence
        return change(content)
    if isinstance(content, tuple) and hasattr(content, "_fields"):
        return type(content)(*(_each_tensor(value, change) for value in content))
    if isinstance(content, list | tuple):
        return type(content)(_each_tensor(value, change) for value in content)
    return content


class SampleFiles:
    """The samples of a split as a map-style dataset, for `ExactLoader`: decode what you need in its `transform`.

    A sample is a dict: its members' bytes by their suffix, such as "jpg" and "txt"; "__key__", its name in the tar; and
    "__label__", its class. The members of a sample must follow each other in the tar, as everywhere in WebDataset.

    Args:
        path: the directory or the URL of shards, or of the index of tars.
        split: the name of the split.

    Raises:
        DataError: there are no such samples. `[]` raises it, too, if a tar has changed.
    """

    def __init__(self, path: str | Path, split: str = "train") -> None:
        try:
            self._split = ShardSplit(path, split, sys.maxsize)
        except DataError as error:
            text = str(error).replace(", set data.backend=folder for a folder of images,", "")
            raise DataError(re.sub(r"data\.(?:val_|train_)?(?=path|split)", "", text)) from None
        if apart := self._split.made.get("apart"):
            raise DataError(
                f"{path}: the members of {plural(apart, 'sample')} do not follow each other; make shards of them"
            )
        self._rule = LabelRule.parse(self._split.made.get("label", "cls"))  # says what of a member's name is the key
        self._repeats: dict[int, set[int]] = {}
        """For each number of a tar, the samples that have the same key as the sample before them."""

    def __len__(self) -> int:
        return len(self._split)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the labels."""
        return self._split.classes

    @property
    def identity(self) -> object:
        """The identity of the data in a loader's state; equal for copies of the data."""
        return self._split.identity

    def __getitem__(self, sample_id: int) -> dict[str, Any]:
        if not -len(self) <= sample_id < len(self):
            raise IndexError(f"sample {sample_id} of {len(self)}")
        sample_id %= len(self)
        by_key, found = dict[str, dict[str, bytes]](), None
        for number in range(self._first_of_its_key(sample_id), sample_id + 1):
            for key, suffix, offset, content in self._members(number):
                if suffix in by_key.setdefault(key, {}):  # another sample of the same key begins
                    if found == key:
                        break
                    by_key[key] = {}
                by_key[key][suffix] = content
                if offset == self._split.places.offsets[number]:
                    if number < sample_id:
                        break  # what follows is around the next image, too
                    found = key
        if found is None:
            key, shard = self._split.locate(sample_id)
            raise DataError(f"{shard}: the members of sample {key} do not follow each other; make shards of them")
        return {"__key__": found, "__label__": int(self._split.labels[sample_id]), **by_key[found]}

    def _members(self, sample_id: int) -> Iterator[tuple[str, str, int, bytes]]:
        """Yield key, suffix, offset and content of the files between the images before and after a sample's."""
        begin, part = self._split.around(sample_id)
        what = self._split.file_of(sample_id)
        for member in scan_members(lambda at, size: part[at : at + size], sys.maxsize, what) if part else ():
            end = member.offset + member.size
            if end > len(part):  # the header of the next image
                return
            if member.kind == "file":
                yield *self._rule.split_name(member.name), begin + member.offset, part[member.offset : end]

    def _first_of_its_key(self, sample_id: int) -> int:
        """Return the first of the samples in a row that have this one's key. Each index is read once."""
        place = self._split.places.shard_of(sample_id)
        if place not in self._repeats:
            start, keys = int(self._split.places.starts[place]), list[str]()
            with suppress(DataError):  # it has changed since it was opened
                keys = self._split.keys_of(place)
            self._repeats[place] = {start + n for n, pair in enumerate(pairwise(keys), 1) if pair[0] == pair[1]}
        while sample_id in self._repeats[place]:
            sample_id -= 1
        return sample_id
