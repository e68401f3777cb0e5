"""Tests of the loaders for any training loop: one order on any ranks and workers, from any step, and clear refusals."""

import gc
import random
import shutil
import sys
import traceback
import warnings
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import DataLoader, IterableDataset, default_collate

from karat_scale.data import EvalLoader, ExactLoader, SampleFiles
from karat_scale.data.backends.own import Collated
from karat_scale.data.loading.workers import OrderedResults
from karat_scale.data.shards.shards import LocalPlace
from karat_scale.foundation.errors import DataError, RecipeError
from karat_scale.recipe.loading import load_recipe
from tests.conftest import karat_done, make_image_folder, output_of, summary, wait_until
from tests.data.backends.helpers import all_ended_since, children, running
from tests.data.conftest import encode, photo
from tests.data.tars import write_tar

Make = Callable[..., Path]
GLOBAL, SEED = 8, 3


class Numbers:
    """Twenty samples. Each has its number, and a sum of random numbers of all global generators."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> dict[str, Any]:
        drawn = random.random() + np.random.rand() + torch.rand(()).item()
        return {"index": index, "drawn": drawn, "image": torch.full((2,), float(index))}


def shifted(sample: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    return {**sample, "shift": torch.rand((), generator=generator).item()}


def of_numbers(**options: Any) -> ExactLoader:
    settings: dict[str, Any] = {"global_batch": GLOBAL, "seed": SEED, "workers": 0, "transform": shifted}
    return ExactLoader(Numbers(), **{**settings, **options})


def indices(batches: Iterable[Any]) -> list[list[int]]:
    return [batch["index"].tolist() for batch in batches]


def of_images(path: Path, **options: Any) -> ExactLoader:
    settings: dict[str, Any] = {"global_batch": GLOBAL, "seed": SEED, "workers": 0, "image_size": 16}
    return ExactLoader(path, **{**settings, **options})


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_has_each_sample_once_and_the_next_is_in_another_order(workers: int) -> None:
    loader = of_numbers(global_batch=5, workers=workers, epochs=2)
    first, state = indices(loader), loader.state_dict()
    second, third = indices(loader), indices(loader)
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(20))
    assert first != second
    assert third == []
    assert len(loader) == len(first) == 4
    resumed = of_numbers(global_batch=5, workers=workers, epochs=2)
    resumed.load_state_dict(state)  # torchdata's loader gave an empty epoch first: meta-pytorch/data#1437
    assert indices(resumed) == second
    loader.close()
    resumed.close()


@pytest.mark.parametrize(("ranks", "workers", "micro_batch"), [(1, 2, 4), (2, 1, None), (4, 0, 1)])
def test_a_step_is_the_same_on_any_ranks_workers_and_micro_batches(ranks: int, workers: int, micro_batch: int | None):
    def drawn(batches: list[Any]) -> list[tuple[float, ...]]:
        columns = [torch.cat([b[key] for b in batches]).tolist() for key in ("index", "drawn", "shift")]
        return sorted(zip(*columns, strict=True))

    expected = [drawn([batch]) for batch in of_numbers(epochs=1)]
    several = [
        of_numbers(rank=rank, world_size=ranks, workers=workers, micro_batch=micro_batch, epochs=1)
        for rank in range(ranks)
    ]
    steps: list[list[Any]] = [[] for _ in expected]
    for loader in several:
        for number, batch in enumerate(loader):
            steps[number // loader.plan.accumulation].append(batch)
        loader.close()
    assert [drawn(step) for step in steps] == expected


@pytest.mark.parametrize("taken", [1, 2, 3])  # in the first epoch, at its end, and in the second
def test_a_state_goes_on_with_the_next_batch_on_other_ranks_and_workers(taken: int) -> None:
    # Other loaders began at 0 (mosaicml/streaming#880), or in the first epoch's order (huggingface/accelerate#2016).
    whole = of_numbers(epochs=3)
    expected = indices(batch for _ in range(3) for batch in whole)
    loader, seen = of_numbers(epochs=3), []
    while len(seen) < taken:
        for batch in loader:
            seen += indices([batch])
            if len(seen) == taken:
                state = loader.state_dict()
                break
    parts = [of_numbers(rank=rank, world_size=2, workers=1, epochs=3) for rank in range(2)]
    left = []
    for part in parts:
        part.load_state_dict(state)
        left.append([row for _ in range(3) for row in indices(part)])
        part.close()
    assert seen + [first + second for first, second in zip(*left, strict=True)] == expected


def test_a_resume_after_each_batch_gives_an_undisturbed_epoch() -> None:
    # DALI counted what it skipped at a resume, so the next state was wrong: NVIDIA/DALI#5378.
    expected = indices(of_numbers(epochs=1))
    seen: list[list[int]] = []
    state = of_numbers().state_dict()
    for _ in expected:
        loader = of_numbers(epochs=1)
        loader.load_state_dict(state)
        seen += indices([next(iter(loader))])
        state = loader.state_dict()
    assert seen == expected


def test_a_resume_gives_the_random_crops_of_an_undisturbed_epoch(make_shards: Make) -> None:
    # DALI could save nothing where a pipeline had a random resized crop: NVIDIA/DALI#5289.
    shards = make_shards()
    loader = of_images(shards, epochs=1)
    first = next(iter(loader))
    with of_images(shards, workers=1, epochs=1) as resumed:
        resumed.load_state_dict(loader.state_dict())
        batches = [first, *resumed]
    for found, expected in zip(batches, of_images(shards, epochs=1), strict=True):
        assert all(map(torch.equal, found, expected))


def test_a_loader_that_was_left_in_the_middle_goes_on_there() -> None:
    whole = indices(of_numbers(epochs=1))
    loader = of_numbers(epochs=1)
    for _ in loader:
        break
    assert indices(loader) == whole[1:]


def test_a_step_is_reached_without_reading_what_comes_before_it() -> None:
    class Counted(Numbers):
        read: ClassVar[list[int]] = []

        def __getitem__(self, index: int) -> dict[str, Any]:
            self.read.append(index)
            return super().__getitem__(index)

    loader = ExactLoader(Counted(), global_batch=GLOBAL, seed=SEED, workers=0)
    loader.set_step(2 * len(loader) + 1)
    assert next(iter(loader))["index"].tolist() == Counted.read
    assert (loader.epoch, loader.step) == (3, 6)  # the batch was the last of the third epoch
    for step in (-1, 2.5, 10**30):
        with pytest.raises(ValueError, match=f"step = {step}: expected a whole number"):
            loader.set_step(step)


def test_a_state_of_other_settings_images_or_augmentation_is_refused_by_name(make_shards: Make, tmp_path: Path) -> None:
    for changed, said in (
        ({"seed": 4}, "seed: the state is of a loader with 3, and this one has 4"),
        ({"global_batch": 10}, "global_batch: the state is of a loader with 8, and this one has 10"),
        ({"order": "block"}, "order: the state is of a loader with 'full'"),
    ):
        with pytest.raises(DataError, match=said):
            of_numbers(**changed).load_state_dict(of_numbers().state_dict())
    shards = make_shards()
    state = of_images(shards).state_dict()
    moved = shards.rename(tmp_path / "moved")
    of_images(moved, workers=1).load_state_dict(state)  # a copy is the same data
    folder = make_image_folder(tmp_path / "folder", {"train": 10, "val": 2})
    for path, changed, named in (
        (folder, {}, "data"),
        (moved, {"augment": {"hflip": 0.0}}, r"augment\.hflip"),
        (moved, {"image_size": 8}, "image_size"),
    ):
        with pytest.raises(DataError, match=f"^{named}: the state is of a loader with"):
            of_images(path, **changed).load_state_dict(state)


def test_of_a_folder_names_and_labels_count_and_neither_contents_nor_the_decoder(tmp_path: Path) -> None:
    folder = make_image_folder(tmp_path, {"train": 10, "val": 1})
    image = folder / "train/class0/000.jpg"
    state = of_images(folder).state_dict()
    image.write_bytes(encode(photo(1)))
    of_images(folder, decoder="pillow").load_state_dict(state)
    image.rename(image.with_stem("first"))
    with pytest.raises(DataError, match=r"^data: the state is of a loader with '\w{12}', and this one has '\w{12}';"):
        of_images(folder).load_state_dict(state)


def test_images_are_normalised_and_their_labels_are_numbers_or_mixed(make_shards: Make) -> None:
    shards = make_shards()
    images, labels = next(iter(of_images(shards)))
    assert (images.dtype, tuple(images.shape), labels.dtype) == (torch.float32, (8, 3, 16, 16), torch.int64)
    pixels, same = next(iter(of_images(shards, dtype=torch.uint8)))
    assert torch.equal(labels, same)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(images, (pixels / 255 - mean) / std, rtol=0, atol=1e-5)
    mixed, targets = next(iter(of_images(shards, augment={"mixup": 0.8, "label_smoothing": 0.1})))
    assert tuple(targets.shape) == (8, 3)
    torch.testing.assert_close(targets.sum(1), torch.ones(8))
    assert not torch.equal(mixed, images)


def test_a_digest_says_if_two_runs_saw_the_same(make_shards: Make) -> None:
    shards = make_shards()
    whole = of_images(shards, epochs=1)
    list(whole)
    ranks = [of_images(shards, rank=rank, world_size=2, micro_batch=2, workers=1, epochs=1) for rank in range(2)]
    for loader in ranks:
        list(loader)
        loader.close()
    assert sum(loader.digest for loader in ranks) % 2**40 == whole.digest
    other = of_images(shards, seed=4, epochs=1)
    list(other)
    assert other.digest != whole.digest


def test_the_digest_of_a_run_goes_on_after_a_resume_in_the_middle_of_a_step() -> None:
    whole = of_numbers(epochs=2)
    for _ in range(2):
        list(whole)
    loader = of_numbers(epochs=2, micro_batch=4, total_digest=True)
    for _ in zip(range(3), loader, strict=False):  # one step, and half of the next
        pass
    state = loader.state_dict()
    resumed = of_numbers(epochs=2, workers=1, total_digest=True)
    resumed.load_state_dict(state)
    assert state["step"] == resumed.step == 1
    for _ in range(2):
        list(resumed)
    resumed.close()
    assert resumed.run_digest() == whole.run_digest() == whole.digest != state["digest"]


def test_the_trainer_sees_what_the_loader_gives(shards: Path, tmp_path: Path, recipe_file: Path) -> None:
    run = tmp_path / "run"
    karat_done("train", str(recipe_file), f"data.path={shards}", f"run.dir={run}", "train.max_steps=3")
    recipe = load_recipe(run / "recipe.yaml")
    loader = ExactLoader(
        shards,
        global_batch=recipe.train.global_batch,
        seed=recipe.run.seed,
        image_size=recipe.model.image_size,
        augment=recipe.augment,
    )
    for _ in zip(range(3), loader, strict=False):
        pass
    assert loader.step == 3
    assert loader.digest == summary(run)["data_digest"]
    loader.close()


@pytest.mark.parametrize("ranks", [1, 3])
def test_an_evaluation_has_each_sample_once_with_its_id(make_shards: Make, ranks: int) -> None:
    shards = make_shards()
    found: list[tuple[int, int]] = []
    for rank in range(ranks):
        with EvalLoader(shards, batch=3, rank=rank, world_size=ranks, workers=1, image_size=16) as loader:
            batches = list(loader)
            assert len(loader) == len(batches)  # the last of three ranks has one batch, the others two
            for images, labels, ids in batches:
                assert len(images) == len(labels) == len(ids) > 0
                found += zip(ids.tolist(), labels.tolist(), strict=True)
    assert sorted(found) == [(number, (100 + number) % 3) for number in range(11)]


def test_an_evaluation_of_a_dataset_of_ones_own_has_each_sample_once() -> None:
    ids: list[int] = []
    batches = []
    for rank in range(8):  # up to three samples each, and none for the last rank
        loader = EvalLoader(Numbers(), batch=2, rank=rank, world_size=8, workers=0, drop_empty=False)
        found = list(loader)
        batches.append(len(found))
        assert len(loader) == len(found)
        for content, own in found:
            assert (content is None) == (len(own) == 0)
            ids += own.tolist()
    assert sorted(ids) == list(range(20))
    assert set(batches) == {2}


def test_labels_of_a_folder_are_those_of_its_training_split_also_where_a_class_is_not_evaluated(tmp_path: Path) -> None:
    folder = make_image_folder(tmp_path, {"train": 1, "val": 1})
    shutil.rmtree(folder / "val" / "class1")

    def labels(**options: Any) -> list[int]:
        loader = EvalLoader(folder, workers=0, image_size=16, **options)
        return sorted(label for _, labels, _ in loader for label in labels.tolist())

    assert labels() == [0, 2, 3]
    (folder / "train").rename(folder / "training")
    assert labels(train_split="training") == [0, 2, 3]
    assert labels() == [0, 1, 2]  # nothing shows that there is another class


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_a_sample_is_never_the_end_and_comes_again(workers: int) -> None:
    class Ending(Numbers):
        def __getitem__(self, index: int) -> Any:
            return next(iter(())) if index == 17 else super().__getitem__(index)

    with EvalLoader(Ending(), batch=4, workers=workers) as loader, pytest.raises(RuntimeError, match="StopIteration"):
        list(loader)
    with ExactLoader(Ending(), global_batch=5, workers=workers) as exact:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="transform or collate raised StopIteration"):
                list(exact)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have notes since Python 3.11")
@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_sample_says_which_one_it_was(workers: int) -> None:
    class Damaged(Numbers):
        def __getitem__(self, index: int) -> Any:
            if index == 17:
                raise OSError("image file is truncated")
            return super().__getitem__(index)

    with (
        ExactLoader(Damaged(), global_batch=5, workers=workers) as loader,
        pytest.raises(OSError, match="truncated") as raised,
    ):
        list(loader)
    assert "at sample 17" in "".join(traceback.format_exception(raised.value))


def test_a_loop_goes_on_with_the_batch_in_which_it_was_interrupted() -> None:
    class Interrupted(Numbers):
        left: ClassVar[list[int]] = [11]

        def __getitem__(self, index: int) -> dict[str, Any]:
            if index in self.left:
                self.left.remove(index)
                raise KeyboardInterrupt
            return super().__getitem__(index)

    loader = ExactLoader(Interrupted(), global_batch=5, seed=SEED, workers=0, epochs=1)
    seen: list[list[int]] = []
    with pytest.raises(KeyboardInterrupt):
        seen.extend(batch["index"].tolist() for batch in loader)
    assert seen + indices(loader) == indices(of_numbers(global_batch=5, epochs=1))


def test_a_batch_whose_finish_is_interrupted_comes_again(make_shards: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = make_shards()
    whole = of_images(shards, epochs=1)
    expected = list(whole)
    loader, left = of_images(shards, epochs=1), [2]
    finish = loader.finish

    def interrupted(batch: Any) -> Any:
        if batch.batch in left:
            left.remove(batch.batch)
            raise KeyboardInterrupt
        return finish(batch)

    monkeypatch.setattr(loader, "finish", interrupted)
    seen: list[Any] = []
    with pytest.raises(KeyboardInterrupt):
        seen.extend(loader)
    assert loader.step == 2
    for found, batch in zip([*seen, *loader], expected, strict=True):
        assert all(map(torch.equal, found, batch))
    assert loader.digest == whole.digest


def test_workers_end_with_a_loop_that_is_left_and_with_their_loader() -> None:
    before = children()
    gc.disable()
    try:
        evaluation = EvalLoader(Numbers(), batch=4, workers=2)
        for _ in evaluation:
            break
        wait_until(lambda: all_ended_since(before))
        loader = of_numbers(workers=2, epochs=1)
        list(loader)
        assert len(children() - before) == 2
        del loader
        wait_until(lambda: all_ended_since(before))
    finally:
        gc.enable()


def test_collate_and_a_module_draw_the_same_in_a_worker_and_in_the_trainer() -> None:
    class Shifted(torch.nn.Module):
        def forward(self, sample: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
            return shifted(sample, generator)

    def noisy(samples: list[Any]) -> Any:
        return {**default_collate(samples), "noise": random.random() + np.random.rand() + torch.rand(()).item()}

    def drawn(transform: Any, workers: int) -> list[tuple[Any, ...]]:
        with of_numbers(transform=transform, collate=noisy, workers=workers, epochs=1) as loader:
            return [(batch["noise"], batch["shift"].tolist()) for batch in loader]

    assert drawn(shifted, 0) == drawn(Shifted(), 0) == drawn(shifted, 1)


def test_what_collate_returns_is_of_the_same_type_on_a_device() -> None:
    @dataclass(frozen=True)
    class Pair:
        first: torch.Tensor
        number: int

    one = torch.ones(1)
    batch = Collated([UserDict(x=one), Pair(one, 3), ({"y": one},)], torch.zeros(1), 0)
    assert len(batch.tensors) == 3
    names, pair, (last,) = batch.to(torch.device("meta")).content
    assert (type(names), type(pair), pair.number) == (UserDict, Pair, 3)
    assert {names["x"].device.type, pair.first.device.type, last["y"].device.type} == {"meta"}
    assert batch.content[1].first is one


def test_batches_of_other_classes_move_by_their_own_methods() -> None:
    class Graph:
        def __init__(self, edges: torch.Tensor) -> None:
            self.edges = edges

        def to(self, device: torch.device) -> "Graph":
            return Graph(self.edges.to(device))

    rows = pack_sequence([torch.ones(3), torch.ones(2)])
    batch = Collated({"graph": Graph(torch.ones(1)), "rows": rows, "size": torch.Size([2])}, torch.zeros(1), 0)
    assert batch.tensors == []  # they are on the host
    moved = batch.to(torch.device("meta")).content
    assert {moved["graph"].edges.device.type, moved["rows"].data.device.type} == {"meta"}
    assert (type(moved["rows"]), moved["rows"].batch_sizes.device.type) == (PackedSequence, "cpu")
    assert moved["size"] == (2,)


def test_captions_and_labels_beside_images_come_through(tmp_path: Path) -> None:
    tars, members = tmp_path / "tars", []
    long = "a-key-longer-than-a-header-has-room-for-" * 4
    for number in range(6):
        key = f"{number}{long if number == 3 else ''}"
        parts = {"txt": f"caption {number}".encode(), "jpg": encode(photo(number)), "cls": b"%d" % (number % 2)}
        for suffix in sorted(parts, reverse=number % 2 == 0):  # what is beside it comes before or after the image
            members.append((f"{key}.{suffix}", parts[suffix]))
    write_tar(tars / "train-0.tar", members)
    karat_done("index", str(tars), "--label", "cls")
    samples = SampleFiles(tars)

    def caption(sample: dict[str, Any]) -> tuple[str, int, int]:
        return sample["txt"].decode(), sample["__label__"], int(sample["cls"])

    loader = ExactLoader(samples, global_batch=6, workers=1, epochs=1, transform=caption)
    [(texts, labels, classes)] = list(loader)
    loader.close()
    assert sorted(texts) == [f"caption {number}" for number in range(6)]
    assert labels.tolist() == classes.tolist() == [int(text[-1]) % 2 for text in texts]
    assert samples[3]["__key__"] == f"3{long}"
    before = len([*Path("/proc/self/fd").iterdir()])
    for _ in range(5):  # before the fix, the tars that each had read stayed open
        SampleFiles(tars)[0]
    assert len([*Path("/proc/self/fd").iterdir()]) == before


def test_the_members_of_a_sample_are_those_that_the_index_took_together(tmp_path: Path) -> None:
    """With the class in the path, a name may have dots, so cat/a.1 and cat/a.2 are two samples."""
    tars = tmp_path / "tars"
    for number, name in enumerate(("cat/a.1", "cat/a.2", "dog/b.1")):
        caption = (f"{name}.txt", name.encode())
        write_tar(tars / f"train-{number}.tar", [(f"{name}.jpg", encode(photo(number))), caption])
    karat_done("index", str(tars), "--label", "path")
    samples = SampleFiles(tars)
    captions = [b"cat/a.1", b"cat/a.2", b"dog/b.1"]
    assert [samples[number]["txt"] for number in range(3)] == captions
    assert [(one["txt"], one["__label__"]) for one in map(samples.__getitem__, (-3, -1))] == [
        (captions[0], 0),
        (captions[2], 1),
    ]
    with pytest.raises(IndexError, match="sample 3 of 3"):
        samples[3]


@pytest.mark.parametrize("order", ["cls txt jpg", "jpg cls txt", "cls jpg txt"])
def test_samples_in_a_row_with_the_same_key_keep_their_own_parts(order: str, tmp_path: Path) -> None:
    members = []
    for number in range(3):
        parts = {"cls": b"%d" % number, "txt": b"caption %d" % number, "jpg": encode(photo(number))}
        members += [(f"a.{suffix}", parts[suffix]) for suffix in order.split()]
    write_tar(tmp_path / "train-0.tar", members)
    karat_done("index", str(tmp_path))
    samples = SampleFiles(tmp_path)
    for number in range(3):
        sample = samples[number]
        assert (sample["__label__"], sample["cls"], sample["txt"]) == (number, b"%d" % number, b"caption %d" % number)


def test_samples_are_read_without_their_tars_whole_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each index is read once. Before the fix, it was hashed for each sample, which was ten times slower."""
    for tar in range(2):
        members = [
            (f"{n}.{suffix}", encode(photo(ord(n))) if suffix == "jpg" else b"0")
            for n in "abc"
            for suffix in ("cls", "jpg")
        ]
        write_tar(tmp_path / f"train-{tar}.tar", members)
    karat_done("index", str(tmp_path))
    samples, read = SampleFiles(tmp_path), []
    checked = LocalPlace.read_checked
    monkeypatch.setattr(
        LocalPlace, "read_checked", lambda place, record: read.append(record.name) or checked(place, record)
    )
    for number in [*range(6)] * 2:
        assert samples[number]["__key__"] == "abc"[number % 3]
    assert len(read) == 2


def test_files_that_are_left_out_are_a_warning(tmp_path: Path) -> None:
    folder = make_image_folder(tmp_path, {"train": 4})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        of_images(folder).close()
    next(folder.rglob("train/*/*.jpg")).with_suffix(".gif").touch()
    with pytest.warns(UserWarning, match=r"1 file left out, .*\.gif: no suffix of"):
        of_images(folder).close()
    with pytest.warns(UserWarning, match="1 file left out"):
        EvalLoader(folder, "train", batch=4, image_size=16, workers=0).close()


@pytest.mark.parametrize("names", ["a.cls b.jpg b.cls a.jpg", "a.cls b.cls c.cls c.jpg b.jpg a.jpg"])
def test_samples_whose_members_stand_apart_are_read_in_each_order(names: str, tmp_path: Path) -> None:
    """Samples are read even if the image of the first one lies behind that of the last one."""
    label = {"a": b"0", "b": b"1", "c": b"2"}
    members = [(name, encode(photo(1)) if "jpg" in name else label[name[0]]) for name in names.split()]
    write_tar(tmp_path / "train-0.tar", members)
    karat_done("index", str(tmp_path), "--label", "cls")
    count, batches = len(members) // 2, {}
    for order in ("full", "block"):
        loader = ExactLoader(tmp_path, global_batch=count, image_size=16, workers=0, epochs=1, order=order)
        batches[order] = sorted(label for _, labels in loader for label in labels.tolist())
        loader.close()
    assert batches["full"] == batches["block"] == list(range(count))
    with pytest.raises(DataError, match=r"the members of \d samples? do not follow each other; make shards of them"):
        SampleFiles(tmp_path)


def test_a_feed_that_begins_elsewhere_ends_the_workers_of_the_one_before(make_shards: Make) -> None:
    before = children()
    loader = of_images(make_shards(), workers=1)
    first = loader.feed(loader.plan.slices(0, 5))
    (worker,) = children() - before
    second = loader.feed(loader.plan.slices(2, 5))
    wait_until(lambda: not running(worker))
    assert len([*filter(running, children() - before)]) == 1
    assert len(next(second).labels) == GLOBAL
    del first
    loader.close()


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    plain, numpys = of_numbers(epochs=1), of_numbers(global_batch=np.int64(GLOBAL), seed=np.int64(SEED), epochs=1)
    numpys.set_step(np.int64(0))
    assert indices(plain) == indices(numpys)
    assert plain.digest == numpys.digest
    torch.save(numpys.state_dict(), tmp_path / "state.pt")
    plain.load_state_dict(torch.load(tmp_path / "state.pt"))
    with pytest.raises(DataError, match="the state has digest = None"):
        plain.load_state_dict({**plain.state_dict(), "digest": None})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes = 0: expected 1 or more"),
        ({"num_classes": "10"}, "num_classes = '10': expected a whole number"),
        ({"num_classes": 2}, r"but num_classes = 2; use other data, or train with num_classes=3"),
        ({"dtype": torch.int32}, r"dtype = torch.int32: use a floating point type .*, or torch.uint8"),
        ({"split": "trian"}, "did you mean split=train"),
    ],
)
def test_what_images_cannot_be_is_one_line(options: dict[str, Any], message: str, make_shards: Make) -> None:
    with pytest.raises((RecipeError, DataError), match=message):
        of_images(make_shards(), **options)


def test_tars_without_an_index_are_told_as_such(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0.tar", [("a.jpg", encode(photo(1))), ("a.cls", b"0")])
    fix = "has no dataset.json; index its tars with karat index or correct the path"
    with pytest.raises(DataError, match=rf"^data = \S+ {fix}"):
        of_images(tmp_path)
    with pytest.raises(DataError, match=rf"^path = \S+ {fix}"):
        SampleFiles(tmp_path)


def test_a_folder_of_images_is_no_sample_files(tmp_path: Path) -> None:
    (tmp_path / "train" / "ant").mkdir(parents=True)
    with pytest.raises(DataError, match=r"has no dataset\.json; make it with karat prepare webdataset or correct"):
        SampleFiles(tmp_path)


def test_workers_that_cannot_begin_are_told_in_the_loaders_words(make_shards: Make, monkeypatch) -> None:
    def refuse(*_: Any) -> None:
        raise RecipeError("data.prefetch = 7 is too much; lower data.prefetch or data.workers")

    shards = make_shards()
    monkeypatch.setattr(OrderedResults, "__init__", refuse)
    for loader in (of_images(shards, workers=1), EvalLoader(shards, "train", batch=4, image_size=16, workers=1)):
        with pytest.raises(RecipeError, match=r"^prefetch = 7 is too much; lower prefetch or workers$"):
            next(iter(loader))


def test_shards_that_are_not_finished_are_not_indexed(make_shards: Make) -> None:
    shards = make_shards()
    with pytest.raises(DataError, match=r"^\S+ has no samples of split 'test'; .*; set split="):
        SampleFiles(shards, "test")
    (shards / "dataset.json").unlink()
    with pytest.raises(DataError, match=r"has no dataset\.json; finish it with the command that began it or correct"):
        SampleFiles(shards)


def test_an_evaluation_mixes_nothing(make_shards: Make) -> None:
    loader = EvalLoader(make_shards(), augment={"mix_prob": 1.0, "mixup": 0.8}, dtype=torch.uint8, image_size=16)
    assert next(iter(loader))[0].dtype == torch.uint8
    loader.close()


def test_a_method_is_no_identity_of_data() -> None:
    class Named(Numbers):
        def identity(self) -> str:
            return "numbers"

    with pytest.raises(RecipeError, match="the dataset's identity is a method; make it a property"):
        ExactLoader(Named(), global_batch=2)
    with pytest.raises(RecipeError, match="backend is for images; with a dataset of your own, leave it out"):
        of_numbers(backend="folder")


def test_labels_are_float32_whatever_torchs_default_is(make_shards: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        loader = of_images(make_shards(), augment={"label_smoothing": 0.1})
        assert next(iter(loader))[1].dtype == torch.float32
        loader.close()
    finally:
        torch.set_default_dtype(torch.float32)


def test_synthetic_images_need_a_number_of_classes() -> None:
    with pytest.raises(RecipeError, match="backend = synthetic has no classes of its own; pass num_classes"):
        ExactLoader("any", backend="synthetic", global_batch=2)
    with pytest.raises(RecipeError, match="backend = synthetic has no classes of its own; evaluate on a data set"):
        EvalLoader("any", backend="synthetic", batch=2)


def test_a_bad_image_is_told_of_in_the_loaders_words(make_shards: Make, make_sample: Callable[..., Any]) -> None:
    """Errors and warnings use the loader's own argument. Before the fix, skipped images were not reported."""
    samples = [make_sample(number) for number in range(12)]
    samples[5] = replace(samples[5], data=b"no image")
    shards = make_shards(samples, samples[:6])
    said = rf"sample {samples[5].key} in .* cannot be decoded: not an image"
    for loader in (of_images(shards, global_batch=12), EvalLoader(shards, image_size=16, workers=0)):
        with pytest.raises(DataError, match=rf"{said}.*, or skip such images: add on_bad_sample=skip$"):
            list(loader)
    with pytest.warns(UserWarning, match=f"{said}.*; the next one takes its place") as told:
        batches = list(of_images(shards, global_batch=12, on_bad_sample="skip"))
    assert (len(told), len(batches[0][1])) == (1, 12)
    with pytest.warns(UserWarning, match=f"{said}.*; it is left out"):
        batches = list(EvalLoader(shards, image_size=16, workers=0, on_bad_sample="skip"))
    assert [ids.tolist() for _, _, ids in batches] == [[0, 1, 2, 3, 4]]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"augment": {"hflp": 0.5}}, "hflp: unknown key; did you mean hflip?"),
    ({"prefetsh": 2}, "prefetsh: unknown key; did you mean prefetch?"),
    ({"global_batch": 9, "world_size": 2, "rank": 0}, "does not divide over 2 ranks"),
    ({"global_batch": 400}, "has 40 samples, fewer than global_batch = 400; set global_batch to at most 40"),
    ({"batch_size": 8}, "batch_size: the argument is global_batch"),
    ({"rank": 2, "world_size": 2}, "rank = 2 and world_size = 2"),
    ({"transform": str}, "transform and collate are for a dataset of your own"),
    ({"dtype": torch.uint8, "augment": {"mixup": 0.8}}, "dtype = torch.uint8: augment mixes images"),
    ({"split": "test"}, "no samples of split 'test'"),
    ({"train_split": "val"}, "train_split = val: use the argument split instead"),
    ({"image_size": 0}, "image_size = 0: expected 1 or more"),
    ({"image_size": 32.0}, "image_size = 32.0: expected a whole number"),
    ({"global_batch": "4"}, "global_batch = '4': expected a whole number"),
    ({"rank": "0", "world_size": "1"}, "rank = '0': expected a whole number"),
    ({"seed": 2**63}, "seed = 9223372036854775808: expected"),
    ({"epochs": -3}, "epochs = -3: expected 0 or more"),
    ({"device": "mps"}, "device = mps: "),
    ({"device": "gpu"}, "device = gpu: use cpu, or cuda where torch finds a GPU"),
    ({"dtype": "float16"}, "dtype = 'float16': use a floating point type of torch, such as torch.float16"),
    ({"augment": "rand-m9"}, "augment = 'rand-m9': use a dict of settings, such as {'randaugment': 'rand-m9"),
    ({"order": "stream"}, "order = stream: only `karat train`"),
    ({"stream": "a.tar"}, "stream: only `karat train` reads a stream; remove it"),
]
REFUSED_OF_ONES_OWN: list[tuple[dict[str, Any], str]] = [
    ({"augment": {"mixup": 0.8}}, "augment is for images"),
    ({"dtype": torch.float16}, "dtype is for images"),
    ({"on_bad_sample": "skip"}, "on_bad_sample is for images; with a dataset of your own, leave it out"),
    ({"prefetsh": 2}, "prefetsh: unknown key; did you mean prefetch?"),
]
REFUSED_OF_AN_EVALUATION: list[tuple[dict[str, Any], str]] = [
    ({"val_split": "test"}, "val_split = test: use the argument split instead"),
    ({"batch": 0}, "batch = 0: expected 1 or more"),
    ({"batch": "4"}, "batch = '4': expected a whole number"),
    ({"batch_size": 8}, "batch_size: the argument is batch"),
]


class Iterated(IterableDataset[int]):
    """It has a length; torch gives it a `__getitem__` that raises."""

    def __len__(self) -> int:
        return 20

    def __iter__(self) -> Iterator[int]:
        return iter(range(20))


def test_a_mistake_is_one_line(make_shards: Make) -> None:
    shards = make_shards()
    cases = [
        *((lambda changed: of_images(shards, **changed), *row) for row in REFUSED),
        (lambda changed: of_images(Path("photoss")), {}, f"data = photoss is not a directory in {Path.cwd()}; "),
        (lambda changed: of_images(DataLoader(Numbers())), {}, "data is a DataLoader: expected a path, or a dataset"),
        (lambda changed: ExactLoader(Iterated(), global_batch=8), {}, "data is a Iterated: expected a path"),
        (lambda changed: ExactLoader([], global_batch=8), {}, "the dataset has no samples"),
        *((lambda changed: of_numbers(**changed), *row) for row in REFUSED_OF_ONES_OWN),
        *((lambda changed: EvalLoader(shards, workers=0, **changed), *row) for row in REFUSED_OF_AN_EVALUATION),
    ]
    for make, changed, said in cases:
        with pytest.raises((DataError, RecipeError)) as raised:
            make(changed)
        assert said in str(raised.value)
        assert "\n" not in str(raised.value)


def test_a_state_of_nothing_and_a_digest_without_a_group_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    state = of_numbers().state_dict()
    for nothing in ({}, None, {**state, "identity": None}):
        with pytest.raises(DataError, match="the state has no identity or no step"):
            of_numbers().load_state_dict(nothing)
    for step in (-1, 2.7, 10**30, None):
        with pytest.raises(DataError, match=f"the state has step = {step}: expected a whole number"):
            of_numbers().load_state_dict({**state, "step": step})
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)  # an earlier test may have joined a group
    with pytest.raises(RecipeError, match=r"world_size = 2: .* needs torch.distributed; call"):
        of_numbers(rank=0, world_size=2, total_digest=True).state_dict()


def test_a_rank_is_the_launchers_also_under_srun_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # Before the fix, each task took itself for rank 0 of 1, and so had all samples.
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)  # an earlier test may have joined a group
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"PROCID": 1, "STEP_NUM_TASKS": 2, "LOCALID": 1}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    assert indices(of_numbers(epochs=1)) == indices(of_numbers(rank=1, world_size=2, epochs=1))


def test_the_random_numbers_of_the_training_process_stay_its_own() -> None:
    torch.manual_seed(0)
    random.seed(0)
    expected = torch.rand(2), random.random()
    torch.manual_seed(0)
    random.seed(0)
    loader = iter(of_numbers())
    first = torch.rand(1)
    next(loader)
    assert torch.equal(torch.cat((first, torch.rand(1))), expected[0])
    assert random.random() == expected[1]


IMPORTS = """
import sys
import karat_scale.recipe.loading
print([name for name in ("torch", "ffcv", "nvidia") if name in sys.modules])
from karat_scale.data import EvalLoader, ExactLoader, SampleFiles
print([name for name in ("deepspeed", "timm", "torchvision", "webdataset", "triton") if name in sys.modules])
"""


def test_reading_a_recipe_needs_no_torch_and_importing_the_loaders_neither_deepspeed_nor_timm() -> None:
    assert output_of(sys.executable, "-c", IMPORTS) == "[]\n[]\n"


# With the argument "alone", Python finds nothing but what docs/loader.md names, and what that needs.
ALONE = """
import sys
from hashlib import sha256
from importlib.machinery import PathFinder

NAMED = {"karat_scale", "torch", "numpy", "PIL", "pydantic", "yaml"}
OF_TORCH = {"torchgen", "functorch", "typing_extensions", "sympy", "mpmath", "networkx", "filelock", "fsspec", "jinja2"}
OF_PYDANTIC = {"pydantic_core", "annotated_types", "typing_inspection"}
FOUND = NAMED | OF_TORCH | OF_PYDANTIC | {"markupsafe", *sys.stdlib_module_names}
path, how = sys.argv[1:]
if how == "alone":
    find = PathFinder.find_spec
    is_found = lambda top: top in FOUND or top.startswith("_sysconfigdata")
    PathFinder.find_spec = lambda name, *rest: find(name, *rest) if is_found(name.partition(".")[0]) else None

from karat_scale.data import EvalLoader, ExactLoader, SampleFiles
from karat_scale.foundation.errors import RecipeError

def show(loader):
    with loader:
        batches = [[part.numpy().tobytes() for part in batch] for batch in loader]
    print(len(batches), sha256(repr(batches).encode()).hexdigest())

given = {"global_batch": 8, "image_size": 16, "epochs": 1}
show(ExactLoader(path, **given))
show(ExactLoader(path, **given, order="block", block_samples=4, window_blocks=2, decoder="pillow"))
show(ExactLoader(path, **given, augment={"mixup": 0.8, "mix_prob": 1.0, "label_smoothing": 0.1, "color_jitter": 0.4}))
show(ExactLoader(path, **given, augment={"run_on": "device", "erasing": 0.5, "cutmix": 1.0, "mix_prob": 1.0}))
show(EvalLoader(path, batch=8, workers=1, image_size=16))
show(ExactLoader(SampleFiles(path), global_batch=8, epochs=1, transform=lambda sample: (len(sample["jpg"]),)))
if how == "alone":
    try:
        ExactLoader(path, **given, augment={"randaugment": "rand-m9"})
    except RecipeError as error:
        assert "RandAugment needs timm" in str(error)
    else:
        sys.exit("no error")
assert how != "alone" or not {"deepspeed", "timm", "torchvision", "psutil", "triton"} & {*sys.modules}
"""


def test_the_loaders_give_the_same_batches_without_deepspeed_timm_and_all_else(make_shards: Make) -> None:
    shards = make_shards()
    alone, beside = (output_of(sys.executable, "-c", ALONE, shards, how) for how in ("alone", "beside"))
    assert [line.split()[0] for line in alone.splitlines()] == ["5", "5", "5", "5", "2", "5"]
    assert alone == beside
