"""Means, intervals, tests and Holm's correction against numbers worked out by hand and by scipy."""

import math
from pathlib import Path

import pytest
from scipy import stats

from karat_scale.commands.compare.comparison import (
    Group,
    budget_differences,
    changes_text,
    compare,
    compare_groups,
    differing_settings,
    group_runs,
    holm,
    separating,
    spread,
)
from karat_scale.commands.compare.finished import Budget, FinishedRun, read_run
from karat_scale.recipe.loading import load_recipe
from tests.commands.compare.conftest import Copy


def test_the_spread_of_three_values_is_that_of_a_table() -> None:
    found = spread([70.0, 71.0, 72.0])
    assert (found.count, found.mean, found.deviation) == (3, 71.0, 1.0)
    margin = 4.302652729911275 / math.sqrt(3)  # the 97.5 % point of t with 2 degrees of freedom
    assert found.low == pytest.approx(71 - margin)
    assert found.high == pytest.approx(71 + margin)
    one = spread([70.0])
    assert (one.mean, one.deviation, one.low, one.high) == (70.0, None, None, None)


def test_only_common_seeds_are_paired() -> None:
    first = {0: 70.0, 1: 71.0, 2: 72.0, 7: 10.0}
    other = {2: 74.5, 1: 72.5, 0: 72.0, 9: 99.0}
    (found,) = compare(first, [other])
    assert found.seeds == (0, 1, 2)
    assert found.mean == pytest.approx(2.0)  # of 2, 1.5 and 2.5
    assert found.low == pytest.approx(2 - 4.302652729911275 * 0.5 / math.sqrt(3))
    assert found.high == pytest.approx(2 + 4.302652729911275 * 0.5 / math.sqrt(3))
    assert found.p == pytest.approx(stats.ttest_1samp([2.0, 1.5, 2.5], 0).pvalue)
    assert (found.adjusted, found.verdict, found.is_shown) == (found.p, "higher", True)


def test_holm_multiplies_step_by_step_and_never_falls() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_pair_that_holds_alone_may_not_hold_among_many() -> None:
    first = {0: 0.0, 1: 0.0, 2: 0.0}
    better = {0: 2.0, 1: 1.5, 2: 2.5}  # p = 0.0202
    worse = {0: -2.0, 1: -1.5, 2: -2.5}
    noise = {0: 1.0, 1: -1.0, 2: 0.5}
    alone, below = compare(first, [better])[0], compare(first, [worse])[0]
    assert (alone.verdict, below.verdict) == ("higher", "lower")
    among = compare(first, [better, noise, noise])
    assert [one.verdict for one in among] == ["not shown after Holm's correction", "not shown", "not shown"]
    assert among[0].adjusted == pytest.approx(3 * alone.p)
    assert not any(one.is_shown for one in among)


@pytest.mark.parametrize(
    ("first", "other", "verdict"),
    [
        ({0: 70.0}, {0: 90.0}, "one run each: no statement"),
        ({0: 70.0}, {1: 90.0}, "one run each: no statement"),
        ({0: 70.0, 1: 71.0}, {1: 90.0}, "one common seed: no statement"),
        ({0: 70.0, 1: 71.0}, {2: 90.0, 3: 91.0}, "no common seed: no statement"),
        ({0: 70.0, 1: 71.0}, {0: 72.1, 1: 73.1}, "no spread over seeds: no statement"),
        ({0: 70.0, 1: 71.0}, {0: 70.0, 1: 71.0}, "not shown"),
        ({0: 70.0, 1: 71.0}, {0: 72.0, 1: 74.0}, "not shown"),
        ({}, {0: 72.0}, "no common seed: no statement"),
    ],
)
def test_runs_that_support_nothing_get_no_statement(first: dict, other: dict, verdict: str) -> None:
    (found,) = compare(first, [other])
    assert (found.verdict, found.is_shown) == (verdict, False)
    assert found.p is None or verdict == "not shown"


def read(*paths: Path) -> list[FinishedRun]:
    return [read_run(str(path)) for path in paths]


def seeds_of(groups: list[Group]) -> list[tuple[int, ...]]:
    return [tuple(run.seed for run in group.runs) for group in groups]


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
    assert seeds_of(groups) == [(0, 1, 2)]
    assert repeated == []


def test_groups_keep_the_order_of_their_first_runs_and_are_named_by_what_differs(trained: Path, copy: Copy) -> None:
    wide = copy("wide", "optim.lr=0.002", "run.seed=1")
    groups, _ = group_runs(read(wide, trained / "seed0", trained / "seed1"))
    assert seeds_of(groups) == [(1,), (0, 1)]
    assert [group.label for group in groups] == ["optim.lr=0.002", "optim.lr=0.0005"]
    changes = differing_settings(*groups)
    assert changes == {"optim.lr": (0.002, 0.0005)}
    assert changes_text(changes) == "optim.lr: 0.002 -> 0.0005"
    assert changes_text({**changes, "a": (1, 2), "b": (1, 2)}, 1) == "optim.lr: 0.002 -> 0.0005; 2 more"


def test_a_name_that_differs_is_enough_and_many_keys_give_way_to_the_directory(trained: Path, copy: Copy) -> None:
    groups, _ = group_runs(read(trained / "seed0", copy("wide", "optim.lr=0.002", "run.name=wide")))
    assert [group.label for group in groups] == ["owls", "wide"]
    keys = ("optim.lr=0.002", "optim.eps=1e-7", "optim.weight_decay=0.1", "augment.hflip=0.25")
    groups, _ = group_runs(read(copy("plain-seed0"), copy("tuned_seed1", *keys, "run.seed=1")))
    assert [group.label for group in groups] == ["plain", "tuned"]


def test_another_budget_is_another_group(trained: Path, copy: Copy) -> None:
    short = copy("short", "run.seed=1", "train.max_steps=16", steps=16, samples=128)
    other_data = copy("data", "run.seed=2", train_images=80)
    groups, _ = group_runs(read(trained / "seed0", short, other_data))
    assert seeds_of(groups) == [(0,), (1,), (2,)]
    assert len({group.label for group in groups}) == 3
    assert budget_differences(groups[0], groups[1]) == ["steps differ: 24 and 16", "epochs differ: 3 and 2"]
    assert budget_differences(groups[0], groups[2]) == ["epochs differ: 3 and 2.4", "training images differ: 64 and 80"]


def test_a_second_run_of_a_seed_is_left_out(trained: Path, copy: Copy) -> None:
    groups, repeated = group_runs(read(trained / "seed0", copy("again")))
    assert seeds_of(groups) == [(0,)]
    assert "again: has the recipe and the seed of" in repeated[0]


@pytest.mark.parametrize("key", ["data.path", "resume.from"])
def test_a_path_separates_only_where_one_seed_has_several(trained: Path, copy: Copy, key: str) -> None:
    moved = copy("moved", "run.seed=2", f"{key}=elsewhere")
    groups, repeated = group_runs(read(trained / "seed0", moved))
    assert (seeds_of(groups), repeated) == ([(0, 2)], [])
    other = copy("other", f"{key}=others")  # as a sweep over the key leaves
    groups, repeated = group_runs(read(trained / "seed0", other, copy("other1", f"{key}=others", "run.seed=1")))
    assert (seeds_of(groups), repeated) == ([(0,), (0, 1)], [])
    assert differing_settings(*groups).keys() == {key}
    assert groups[1].label == f"{key}=others"


def made_up(name: str, lr: float, scores: list[float], images: int | None = 10000, steps: int = 9) -> list[FinishedRun]:
    """Return runs of one recipe with these scores in the last evaluation."""
    recipes = [
        load_recipe("cifar10_vit_nano_32px", [f"optim.lr={lr}", f"run.name={name}", f"run.seed={seed}"])
        for seed in range(len(scores))
    ]
    budget = Budget(steps, 1.0, 64, images, 10, "")
    return [
        FinishedRun(Path(name), recipe, budget, {"last_top1": score}, (), "CPU")
        for recipe, score in zip(recipes, scores, strict=True)
    ]


@pytest.mark.parametrize(
    ("scores", "lines"),
    [
        ([[70.0]], ["Last top-1: a 70.00 %.", "It is one run: the spread over seeds is unknown."]),
        ([[83.0, 99.0]], ["Last top-1: a 91.00 %.", "The 95 % interval over 2 seeds is 0.00 to 100.00."]),
        ([[70.0], [70.0]], ["Last top-1: a 70.00 %, b 70.00 %.", "a and b are equal."]),
        # 1.96 sqrt((70 x 30 + 71.29 x 28.71) / 10000) = 1.262
        (
            [[70.0], [71.26]],
            [
                "b leads by 1.26 points; what another seed would change is unknown (one run each).",
                "That is not more than the error of a test set of 10,000 images (+-1.26).",
            ],
        ),
        ([[70.0], [71.27]], ["That is more than the error of a test set"]),
        (
            [[70.0, 71.0, 72.0], [72.0, 72.5, 74.5]],
            [
                "b leads by 2.00 points, more than the spread over 3 seeds explains (",
                "95 % interval 0.76 to 3.24, p 0.020",
            ],
        ),
        (
            [[70.0, 71.0, 72.0], [72.0, 72.5, 74.5], [50.0, 51.0, 52.0]],
            [
                "b leads by 2.00 points, not more than the spread over 3 seeds explains (",
                "95 % interval 0.76 to 3.24, p 0.061",
            ],
        ),
        (  # the seeds that only one group has decide the order of the means
            [[50.0, 50.0, 90.0, 90.0], [60.0, 60.1]],
            [
                "a leads by 9.95 points (-10.05 over 2 seeds of both), not more than the spread over 2 seeds explains",
                "95 % interval -10.69 to -9.41, p 0.003",
            ],
        ),
        (
            [[50.0, 90.0], [60.0]],
            ["a leads by 10.00 points (-10.00 over 1 seed of both); what another seed would change is unknown (one c"],
        ),
    ],
)
def test_the_summary_says_who_leads_and_whether_that_is_noise(scores: list[list[float]], lines: list[str]) -> None:
    runs = [run for number, own in enumerate(scores) for run in made_up("abc"[number], 0.001 * (number + 1), own)]
    said = " ".join(compare_groups(runs, None)[0].summary)
    assert all(line in said for line in lines), said
    assert "budgets differ" not in said


def test_the_summary_says_what_is_not_comparable() -> None:
    first, other = made_up("a", 1e-3, [70.0]), made_up("b", 2e-3, [75.0], images=None, steps=12)
    compared = compare_groups([*first, *other], None)[0]
    said = " ".join(compared.summary)
    assert "Their budgets differ, which alone may be the reason." in said
    (warning,) = compared.warnings
    assert warning.startswith("a and b: steps differ: 9 and 12; test images differ")
    assert "error of a test set" not in said
