"""Loaders for any training loop: batches in an exact order, on any number of ranks and workers, resumed at any step.

`karat train` reads its images through these classes.
"""

import inspect
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from hashlib import sha256
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from typing_extensions import Self

from karat_scale.data.backends import Backend, ImageSpec, open_backend
from karat_scale.data.backends.own import Dataset, OwnSamples
from karat_scale.data.batch import BITS, Batch, with_digest
from karat_scale.data.loading.device_feed import DeviceFeed
from karat_scale.data.plan import PADDING, BatchSlice, EvalPlan, TrainPlan, choose_micro_batch
from karat_scale.data.shards.shard_format import DATASET_FILE, beton_path
from karat_scale.foundation.errors import DataError, RecipeError, UserError
from karat_scale.foundation.machine import launch_environment
from karat_scale.foundation.stores import is_url
from karat_scale.recipe import AugmentConfig, DataConfig
from karat_scale.recipe.loading import section_of

# The default augmentation: a random resized crop and a flip.
PLAIN = {"randaugment": "", "mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0}
Waiting = Callable[[], AbstractContextManager[None]]


class _Loader:
    """A loader that a `with` block closes at its end."""

    _source: Backend

    def close(self) -> None:
        """Stop the workers and close the files."""
        self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ExactLoader(_Loader):
    """Training batches in an order that depends only on the data, the seed and the global batch.

    Rank k of W gets the k-th part of each global batch. So the samples of a step, and all that is drawn for them, are
    the same for any number of ranks, workers and micro batches. The last incomplete global batch of an epoch is left
    out.

    Iterating yields the rest of the current epoch; the next iteration yields the next epoch. A batch of images is
    (images, labels): float32 [b, 3, H, W], normalised, and int64 [b]; or float32 [b, classes] where `augment` mixes or
    smooths labels. A batch of your own dataset is what `collate` returns. Inside the loop body, `state_dict` already
    counts the current batch.

    Args:
        data: images, as `karat train` reads them: a folder of classes, shards, betons, or the index of tars, also at a
            URL. Or your own dataset, with `__len__` and `__getitem__(index)`, or `__getitem__(index, generator)`.
        split: the split of the images to read.
        global_batch: the samples of a step, over all ranks.
        seed: the seed of the order and of all random draws.
        rank, world_size: the rank of this process and the number of ranks; by default those of torch.distributed, else
            of the launcher's environment, else 0 and 1.
        workers: the number of processes that read and decode; with 0, this process does it.
        micro_batch: the samples of a batch on this rank; by default the rank's whole part of a step. A smaller one
            divides the part into several batches.
        epochs: the number of epochs; None never ends.
        image_size: H and W of the images.
        augment: settings of the recipe's `augment` section; the default is a plain random resized crop and flip.
        transform: for your own dataset, a function of each sample: `transform(sample)` or
            `transform(sample, generator)`.
        collate: for your own dataset, the function that makes a batch from a list of samples; by default torch's.
        device: the device of the tensors. Copies to a GPU overlap with the work on the previous batch.
        dtype: the dtype of the images. torch.uint8 leaves them as they were read.
        num_classes: the number of classes, for labels that are mixed or smoothed; by default that of the data.
        total_digest: whether `state_dict` has the digest of the whole run, a sum over all ranks. If so, all ranks must
            call it, as they do in DCP, Lightning and accelerate.
        options: settings of the recipe's `data` section, such as backend, decoder, order, prefetch, timeout,
            on_bad_sample, verify.

    Raises:
        DataError: the data cannot be used, or an epoch has no whole global batch.
        RecipeError: a setting is wrong, or the global batch does not divide over the ranks.
    """

    def __init__(
        self,
        data: str | Path | Dataset,
        split: str = "train",
        *,
        global_batch: int,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        workers: int = 2,
        micro_batch: int | None = None,
        epochs: int | None = None,
        image_size: int = 224,
        augment: Mapping[str, Any] | AugmentConfig | None = None,
        transform: Callable[..., Any] | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        num_classes: int | None = None,
        total_digest: bool = False,
        **options: Any,
    ) -> None:
        global_batch, seed, image_size = _whole(global_batch=global_batch, seed=seed, image_size=image_size)
        counts = {"micro_batch": micro_batch, "epochs": epochs, "num_classes": num_classes}
        rank, world_size, *rest = _whole(may_be_none=True, rank=rank, world_size=world_size, **counts)
        micro_batch, epochs, num_classes = rest
        rank, world_size = place(rank, world_size)
        device = _usable(device)
        if epochs is not None and epochs < 0:
            raise RecipeError(f"epochs = {epochs}: expected 0 or more")
        if num_classes is not None and num_classes < 1:
            raise RecipeError(f"num_classes = {num_classes}: expected 1 or more")
        if options.get("order") == "stream":
            raise RecipeError("order = stream: only `karat train` reads a stream; use full or block")
        for name in {"stream", "stream_samples"} & options.keys():
            raise RecipeError(f"{name}: only `karat train` reads a stream; remove it")
        images_only = {"image_size": image_size, "augment": augment, "dtype": dtype, "num_classes": num_classes}
        with named_as_arguments():
            spec, source = open_source(
                data, split, True, seed, workers, device, world_size, images_only, transform, collate, options
            )
            mixes = not isinstance(source, OwnSamples) and spec.augment.mixes
            micro = choose_micro_batch(global_batch, world_size, micro_batch, even=mixes)
            plan = source.plan(global_batch, micro, rank, world_size)
        _warn_of_notices(source, rank)
        self._set_up(spec, plan, source, device, dtype)
        self._steps, self._total_digest = sys.maxsize if epochs is None else epochs * plan.steps_per_epoch, total_digest

    @classmethod
    def of(
        cls, spec: ImageSpec, plan: TrainPlan, backend: Backend, device: torch.device, dtype: torch.dtype
    ) -> "ExactLoader":
        """Return the loader of an open backend's images, in the order of a plan."""
        loader = cls.__new__(cls)
        loader._set_up(spec, plan, backend, device, dtype)
        loader.finish.soft = True
        return loader

    def _set_up(
        self, spec: ImageSpec, plan: TrainPlan, source: Backend, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.plan, self._spec, self._source, self._device = plan, spec, source, device
        self._steps, self._total_digest = sys.maxsize, False
        self._taken = 0  # micro batches since the start of training
        self._ahead: DeviceFeed[Any] | None = None
        self._reading: Any = None
        self.digest = self._digest_of_steps = 0
        """The digest of this rank's samples since the loader was made or set to a step.

        The sum over all ranks, modulo 2^40, is the run's. Two runs with the same digest trained on the same samples
        with the same random choices."""
        if not isinstance(source, OwnSamples):
            self.finish = Finish(spec, dtype, source.num_classes)

    def __len__(self) -> int:
        """The number of batches of a whole epoch on this rank."""
        return self.plan.steps_per_epoch * self.plan.accumulation

    @property
    def step(self) -> int:
        """The number of steps since the start of training whose batches have all been taken."""
        return self._taken // self.plan.accumulation

    @property
    def epoch(self) -> int:
        """The epoch of the next batch, counted from 0."""
        return self._taken // len(self)

    def set_step(self, step: int) -> None:
        """Continue with the first batch of this step, counted from the start of training. Raises ValueError."""
        if not (isinstance(step, Integral) and 0 <= step < sys.maxsize):
            raise ValueError(f"step = {step!r}: expected a whole number from 0 to 2^63")
        self._taken, self.digest, self._digest_of_steps = int(step) * self.plan.accumulation, 0, 0
        self._stop()

    def run_digest(self) -> int:
        """Return the sum of the digests of all whole steps, over all ranks. Every rank must call this.

        It covers the whole run if each loaded state came from a loader with `total_digest`.
        """
        if self.plan.world_size == 1:
            return self._digest_of_steps
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            raise RecipeError(
                f"world_size = {self.plan.world_size}: a digest of all ranks needs torch.distributed; call "
                "init_process_group first, or leave out total_digest"
            )
        found: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, (self.plan.rank, self._digest_of_steps))
        # As a dict, because the ranks of a split model may have the same samples.
        total: int = sum(dict(found).values())
        return total % (1 << BITS)

    def state_dict(self) -> dict[str, Any]:
        """Return the loader's step, and the identity of its data and settings. It is the same on every rank."""
        state = {"step": self.step, "identity": self.identity}
        return {**state, "digest": self.run_digest()} if self._total_digest else state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume where another loader was, on any number of ranks and workers.

        Raises:
            DataError: the other loader had other data or settings, or the state is not from a loader.
        """
        fix = "load what an ExactLoader's state_dict() returned"
        if not (isinstance(state, Mapping) and isinstance(state.get("identity"), Mapping) and "step" in state):
            raise DataError(f"the state has no identity or no step; {fix}")
        if not isinstance(digest := state.get("digest", 0), Integral):
            raise DataError(f"the state has digest = {digest!r}; {fix}")
        theirs, ours = state["identity"], self.identity
        for name in ours:
            there, here = theirs.get(name), ours[name]
            if isinstance(there, dict) and isinstance(here, dict) and there != here:
                key = next(key for key in there | here if there.get(key) != here.get(key))
                name, there, here = f"{name}.{key}", there.get(key), here.get(key)
            if there != here:
                if name == "data":
                    there, here = str(there)[:12], here[:12]
                what = f"{name}: the state is of a loader with {there!r}, and this one has {here!r}"
                raise DataError(f"{what}; use the same, or start from the beginning")
        try:
            self.set_step(state["step"])
        except ValueError as error:
            raise DataError(f"the state has {error}; {fix}") from error
        if self.plan.rank == 0:
            self.digest = self._digest_of_steps = int(digest)

    @property
    def identity(self) -> dict[str, Any]:
        """The data and settings that must be equal in a state and in the loader that loads it."""
        plan = self.plan
        found: dict[str, Any] = {
            "data": sha256(json.dumps(self._source.identity).encode()).hexdigest(),
            "seed": plan.seed,
            "global_batch": plan.global_batch,
            "order": plan.order if plan.order == "full" else [plan.order, plan.block_samples, plan.window_blocks],
        }
        if not isinstance(self._source, OwnSamples):
            found |= {"image_size": self._spec.image_size, "augment": self._spec.augment.model_dump(mode="json")}
        return found

    def __iter__(self) -> Iterator[Any]:
        """Yield the rest of the epoch."""
        end = min((self.epoch + 1) * self.plan.steps_per_epoch, self._steps) * self.plan.accumulation
        while self._taken < end:
            if self._ahead is None:
                self._taken, self.digest = self.step * self.plan.accumulation, self._digest_of_steps
                with named_as_arguments():
                    self._ahead = self.feed(self.plan.slices(self.step, self._steps))
            try:
                with named_as_arguments():
                    batch = next(self._ahead)
                if isinstance(self._source, OwnSamples):
                    finished = batch.content
                else:
                    _warn_of(batch, "the next one takes its place")
                    finished = self.finish(batch)
            except BaseException:  # also Ctrl-C: the batch comes again
                self._stop()
                raise
            self._taken += 1
            self.digest = (self.digest + batch.digest) % 2**BITS
            if self._taken % self.plan.accumulation == 0:
                self._digest_of_steps = self.digest
            yield finished

    def feed(self, slices: Iterable[BatchSlice], waiting: Waiting = nullcontext) -> DeviceFeed[Any]:
        """Return the micro batches of `slices` on the device, before `finish`; it waits for each inside `waiting()`."""
        if self._reading is not None:  # of a step that training does not go on from
            self._reading.close()
        self._reading = self._source.train_batches(slices)
        return DeviceFeed(map(with_digest, self._reading), self._device, waiting)

    def _stop(self) -> None:
        if self._ahead is not None:
            self._reading.close()
            self._ahead = None

    def close(self) -> None:
        """Stop the workers and close the files."""
        self._stop()
        super().close()


class EvalLoader(_Loader):
    """Every sample of a split exactly once over any number of ranks.

    Iterating yields (images, labels, ids): float32 [b, 3, H, W], int64 [b] and int64 [b], the numbers of the samples in
    the split; for your own dataset, (batch, ids). It may be iterated again. Every rank has the same number of batches.
    The last ones may be smaller, or empty where there are too few samples. Empty ones are left out; with
    drop_empty=False they are yielded too, for loops with collective calls. An image that cannot be read is
    left out, or ends the loop, as `on_bad_sample` says. A folder's labels number the classes of `train_split`, if that
    exists.

    The arguments that are not listed here are those of `ExactLoader`.

    Args:
        batch: the samples of a batch, on each rank.
        drop_empty: whether to leave out empty batches.

    Raises:
        DataError, RecipeError: as `ExactLoader`.
    """

    def __init__(
        self,
        data: str | Path | Dataset,
        split: str = "val",
        *,
        batch: int = 256,
        rank: int | None = None,
        world_size: int | None = None,
        workers: int = 2,
        image_size: int = 224,
        augment: Mapping[str, Any] | AugmentConfig | None = None,
        transform: Callable[..., Any] | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        drop_empty: bool = True,
        **options: Any,
    ) -> None:
        batch, image_size = _whole(batch=batch, image_size=image_size)
        rank, world_size = _whole(may_be_none=True, rank=rank, world_size=world_size)
        rank, world_size = place(rank, world_size)
        device = _usable(device)
        if batch < 1:
            raise RecipeError(f"batch = {batch}: expected 1 or more")
        images_only = {"image_size": image_size, "augment": augment, "dtype": dtype}
        with named_as_arguments():
            spec, source = open_source(
                data, split, False, 0, workers, device, world_size, images_only, transform, collate, options
            )
        _warn_of_notices(source, rank)
        self.plan = EvalPlan(source.num_val, batch, rank, world_size)
        self._source, self._device, self._drop_empty = source, device, drop_empty
        self._finish = None if isinstance(source, OwnSamples) else Finish(spec, dtype, source.num_classes)

    def __len__(self) -> int:
        """The number of batches of this rank; one whose images all cannot be read counts, too."""
        if not self._drop_empty:
            return self.plan.num_batches
        return sum(bool((part.sample_ids != PADDING).any()) for part in self.plan.slices())

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        """Yield all of this rank's batches."""
        with named_as_arguments():
            batches: DeviceFeed[Any] = DeviceFeed(self._source.eval_batches(self.plan.slices()), self._device)
        while True:
            with named_as_arguments():
                batch = next(batches, None)
            if batch is None:
                return
            found: tuple[Any, ...]
            if self._finish is None:
                found = batch.content, batch.sample_ids
            else:
                _warn_of(batch, "it is left out")
                found = self._finish.of_eval(batch)
            if len(found[-1]) or not self._drop_empty:
                yield found


class Finish:
    """Finishes a batch of images on the device: augmentation, normalisation, mixing, and targets."""

    soft: bool
    """Whether targets are float32 [b, classes], even where a label is one class."""

    def __init__(self, spec: ImageSpec, dtype: torch.dtype, classes_of_data: int) -> None:
        # They look for Triton, which takes time.
        from karat_scale.data.augmentation.device_augment import DeviceAugment, Normalize
        from karat_scale.data.augmentation.mixing import Mixer

        augment, raw = spec.augment, dtype == torch.uint8
        if not (isinstance(dtype, torch.dtype) and (raw or dtype.is_floating_point)):
            fix = "use a floating point type of torch, such as torch.float16, or torch.uint8"
            raise RecipeError(f"dtype = {dtype!r}: {fix}")
        if raw and augment.mixes and spec.trains:
            raise RecipeError("dtype = torch.uint8: augment mixes images, which are float32 then; use mix_prob=0")
        self.soft = augment.mixes or augment.label_smoothing > 0
        num_classes = classes_of_data if spec.num_classes == sys.maxsize else spec.num_classes
        self.augment, self.mixer = DeviceAugment(augment, spec.image_size), Mixer(augment, num_classes, spec.seed)
        self.normalize = None if raw else Normalize(augment.mean, augment.std, dtype)

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return images and labels, or soft targets, of a training batch."""
        images = self.augment(batch.images, batch.draws)
        mix = self.mixer.params(batch.epoch, batch.batch, *images.shape[-2:])
        images = images if self.normalize is None else self.normalize(images, mix)
        return images, self.mixer.targets(batch.labels, mix) if self.soft else batch.labels

    def of_eval(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the readable images of an evaluation's batch, their labels, and their ids."""
        images, labels, ids = batch.images, batch.labels, batch.sample_ids
        # From what the host has: to ask the device would wait for it.
        bad = torch.tensor([sample.sample_id for sample in batch.bad], dtype=torch.int64, device="cpu")
        kept = ((ids != PADDING) & ~torch.isin(ids, bad)).nonzero()[:, 0]
        if len(kept) < len(ids):
            there = kept.to(images.device)
            images, labels, ids = images[there], labels[there], ids[kept]
        return images if self.normalize is None else self.normalize(images), labels, ids


def _warn_of(batch: Batch, done: str) -> None:
    """Warn of each image that could not be read; `done` says what is done instead."""
    for bad in batch.bad:
        warnings.warn(f"{bad}; {done}", stacklevel=3)


def _whole(may_be_none: bool = False, **arguments: Any) -> list[Any]:
    """Return whole numbers, such as numpy's, as ints. Raises RecipeError for any other argument."""
    for name, value in arguments.items():
        if not (isinstance(value, Integral) or (may_be_none and value is None)):
            raise RecipeError(f"{name} = {value!r}: expected a whole number")
    return [None if value is None else int(value) for value in arguments.values()]


def place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Return the rank and the world size, from torch.distributed or the environment where they are None."""
    if rank is None and world_size is None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return launch_environment(os.environ)[:2]
    if rank is None or world_size is None or not 0 <= rank < world_size:
        raise RecipeError(f"rank = {rank} and world_size = {world_size}: give both, with rank below world_size")
    return rank, world_size


def _warn_of_notices(source: Backend, rank: int) -> None:
    for notice in source.notices if rank == 0 else ():
        warnings.warn(notice, stacklevel=3)


def _usable(device: torch.device | str) -> torch.device:
    found: torch.device | None
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = None
    if found is None or (found.type != "cpu" and not (found.type == "cuda" and torch.cuda.is_available())):
        raise RecipeError(f"device = {device}: use cpu, or cuda where torch finds a GPU")
    return found


# The keys of `data` that have an argument, and those that also apply to a dataset of one's own.
_ARGUMENTS = {"path": "data", "train_split": "split", "val_split": "split"}
_OF_KEYS = {
    "train.global_batch": "global_batch",
    "train.micro_batch": "micro_batch",
    "model.num_classes": "num_classes",
    "run.device": "device",
    **{f"data.{key}": _ARGUMENTS.get(key, key) for key in DataConfig.model_fields},
}
_FOR_ALL = ("order", "block_samples", "window_blocks", "prefetch", "timeout")


@contextmanager
def named_as_arguments() -> Iterator[None]:
    """Make an error that names keys of a recipe name the loader's arguments instead."""
    try:
        yield
    except UserError as error:
        text = str(error)
        for key, argument in _OF_KEYS.items():
            text = text.replace(key, argument)
        error.args = (text,)
        raise


def open_source(
    data: Any,
    split: str,
    trains: bool,
    seed: int,
    workers: int,
    device: torch.device,
    ranks: int,
    images: Mapping[str, Any],
    transform: Any,
    collate: Any,
    options: Mapping[str, Any],
) -> tuple[ImageSpec, Backend]:
    """Open the images at a path, or the user's own dataset; return the spec and the backend.

    Args:
        device, ranks: those of `ImageSpec`.
        images: the arguments that apply only to images.

    Raises:
        DataError, RecipeError: as `ExactLoader`.
    """
    image_size = images["image_size"]
    if image_size < 1:
        raise RecipeError(f"image_size = {image_size}: expected 1 or more")
    if not -(2**63) <= seed < 2**63:
        raise RecipeError(f"seed = {seed}: expected a number of 64 bits with sign; use seed % 2**63")
    if "batch_size" in options:
        arguments = "global_batch, of all ranks together, or micro_batch" if trains else "batch"
        raise RecipeError(f"batch_size: the argument is {arguments}")
    for key, argument in _ARGUMENTS.items():
        if key in options and (trains or key != "train_split"):
            raise RecipeError(f"{key} = {options[key]}: use the argument {argument} instead")
    is_own = not isinstance(data, str | Path)
    has_numbers = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    if is_own and (isinstance(data, IterableDataset) or not has_numbers):  # an iterable one has __getitem__, too
        raise RecipeError(
            f"data is a {type(data).__name__}: expected a path, or a dataset with __len__ and __getitem__; pass a "
            "DataLoader's dataset, not the loader; an iterable dataset cannot be used"
        )
    if is_own:
        defaults = inspect.signature(ExactLoader).parameters
        unused = [name for name, value in images.items() if value != defaults[name].default]
        unused += [key for key in options if key in DataConfig.model_fields and key not in _FOR_ALL]
        if unused:
            raise RecipeError(f"{unused[0]} is for images; with a dataset of your own, leave it out")
    path = "" if is_own else str(data)
    backend = options.get("backend") or ("synthetic" if is_own else _backend_of(path, split))
    settings = {**options, "backend": backend, "path": path, "workers": workers, "val_split": split}
    if trains:
        settings["train_split"] = split
    augment = images["augment"]
    if not isinstance(augment, AugmentConfig):
        if augment and not isinstance(augment, Mapping):
            fix = "use a dict of settings, such as {'randaugment': 'rand-m9-mstd0.5-inc1'}"
            raise RecipeError(f"augment = {augment!r}: {fix}")
        augment = section_of(AugmentConfig, {**PLAIN, **(augment or {})})
    given = images.get("num_classes")
    config, num_classes = section_of(DataConfig, settings), sys.maxsize if given is None else given
    if backend == "synthetic" and not is_own and num_classes == sys.maxsize:
        fix = "pass num_classes" if trains else "evaluate on a data set"
        raise RecipeError(f"backend = synthetic has no classes of its own; {fix}")
    spec = ImageSpec(config, augment, image_size, num_classes, seed, trains, device, ranks)
    if is_own:
        return spec, OwnSamples(data, spec, transform, collate)
    if transform is not None or collate is not None:
        raise RecipeError(
            "transform and collate are for a dataset of your own; for images, use `augment`, or pass "
            "SampleFiles(path, split) as the dataset"
        )
    return spec, open_backend(spec)


def _backend_of(path: str, split: str) -> str:
    folder = Path(path).expanduser()
    if is_url(path) or (folder / DATASET_FILE).is_file():
        return "webdataset"
    if beton_path(folder, split).is_file():
        return "ffcv"
    there = set() if (folder / split).is_dir() else {file.suffix for file in folder.glob("*.*")}
    # Tars that have no index, or betons of other splits: the backend says what is missing.
    return "webdataset" if ".tar" in there else "ffcv" if ".beton" in there else "folder"
