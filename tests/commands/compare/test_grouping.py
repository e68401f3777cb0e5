"""Which runs differ by their seed alone."""

from pathlib import Path

from karat_scale.commands.compare.comparison import (
    budget_differences,
    changes_text,
    differing_settings,
    group_runs,
    separating,
)
from karat_scale.commands.compare.finished import FinishedRun, read_run
from karat_scale.recipe.loading import load_recipe
from tests.commands.compare.conftest import Copy


def read(*paths: Path) -> list[FinishedRun]:
    return [read_run(str(path)) for path in paths]


def test_seeds_names_and_speed_do_not_separate_shipped_recipes() -> None:
    data = "data.path=/data"
    base = separating(load_recipe("imagenet_vit_tiny_g3b", [data]))
    same = ["run.seed=5", "run.name=x", "run.dir=/y", "data.workers=9", "train.eval_batch=7", "log.every_steps=1"]
    assert separating(load_recipe("imagenet_vit_tiny_g3b", ["data.path=/elsewhere", *same])) == base
    for other in ("optim.lr=0.1", "attention.grid=5", "train.tf32=false", "train.epochs=7", "augment.hflip=0.1"):
        assert separating(load_recipe("imagenet_vit_tiny_g3b", [data, other])) != base
    assert "attention.kind" in {
        key for key, value in separating(load_recipe("imagenet_vit_tiny", [data])).items() if base[key] != value
    }


def test_runs_that_differ_by_seed_alone_are_one_group(trained: Path, copy: Copy) -> None:
    faster = copy("other", "run.seed=2", "run.name=another", "data.workers=0")
    groups, repeated = group_runs(read(trained / "seed1", trained / "seed0", faster))
    assert [group.seeds for group in groups] == [(0, 1, 2)]
    assert repeated == []


def test_groups_keep_the_order_of_their_first_runs_and_are_named_by_what_differs(trained: Path, copy: Copy) -> None:
    wide = copy("wide", "optim.lr=0.002", "run.seed=1")
    groups, _ = group_runs(read(wide, trained / "seed0", trained / "seed1"))
    assert [group.seeds for group in groups] == [(1,), (0, 1)]
    assert [group.label for group in groups] == ["optim.lr=0.002", "optim.lr=0.0005"]
    changes = differing_settings(*groups)
    assert changes == {"optim.lr": (0.002, 0.0005)}
    assert changes_text(changes) == "optim.lr: 0.002 -> 0.0005"
    assert changes_text({**changes, "a": (1, 2), "b": (1, 2)}, 1) == "optim.lr: 0.002 -> 0.0005; 2 more"


def test_the_name_is_enough_where_it_differs(trained: Path, copy: Copy) -> None:
    groups, _ = group_runs(read(trained / "seed0", copy("wide", "optim.lr=0.002", "run.name=wide")))
    assert [group.label for group in groups] == ["owls", "wide"]


def test_many_keys_give_way_to_the_directory_without_its_seed(trained: Path, copy: Copy) -> None:
    keys = ("optim.lr=0.002", "optim.eps=1e-7", "optim.weight_decay=0.1", "augment.hflip=0.25")
    groups, _ = group_runs(read(copy("plain-seed0"), copy("tuned_seed1", *keys, "run.seed=1")))
    assert [group.label for group in groups] == ["plain", "tuned"]


def test_another_budget_is_another_group(trained: Path, copy: Copy) -> None:
    short = copy("short", "run.seed=1", "train.max_steps=16", steps=16, samples=128)
    other_data = copy("data", "run.seed=2", train_images=80)
    groups, _ = group_runs(read(trained / "seed0", short, other_data))
    assert [group.seeds for group in groups] == [(0,), (1,), (2,)]
    assert len({group.label for group in groups}) == 3
    assert budget_differences(groups[0], groups[1]) == ["steps differ: 24 and 16", "epochs differ: 3 and 2"]
    assert budget_differences(groups[0], groups[2]) == [
        "epochs differ: 3 and 2.4",
        "training images differ: 64 and 80",
    ]


def test_a_second_run_of_a_seed_is_left_out(trained: Path, copy: Copy) -> None:
    groups, repeated = group_runs(read(trained / "seed0", copy("again")))
    assert [group.seeds for group in groups] == [(0,)]
    assert "again: has the recipe and the seed of" in repeated[0]
