"""What `key=a,b,c` and `run.seed=0..4` name."""

import re

import pytest

from karat_scale.commands.sweep.command import ranges, read_grid
from karat_scale.foundation.errors import UserError


def test_the_grid_is_every_combination_and_seeds_vary_fastest() -> None:
    shared, points = read_grid(["run.seed=0..1", "optim.lr=1e-3,2e-3", "train.epochs=5"])
    assert shared == ["train.epochs=5"]
    assert [point.name for point in points] == [f"lr-{lr}_seed-{seed}" for lr in ("1e-3", "2e-3") for seed in (0, 1)]
    assert points[1].settings == ("optim.lr=1e-3", "run.seed=1")


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("[0.5,1.0],[0.2,1.0]", ["[0.5,1.0]", "[0.2,1.0]"]),
        ("'a,b',c", ["'a,b'", "c"]),
        ("0..2,7", ["0", "1", "2", "7"]),
        ("-1..1", ["-1", "0", "1"]),
        ("{a: [1,2], b: 3}, null", ["{a: [1,2], b: 3}", "null"]),
        ("[[1,2],[3,4]],[]", ["[[1,2],[3,4]]", "[]"]),
    ],
)
def test_commas_in_brackets_and_quotes_do_not_separate(text: str, values: list[str]) -> None:
    _, points = read_grid([f"a.b={text}"])
    assert [point.settings for point in points] == [(f"a.b={value}",) for value in values]


@pytest.mark.parametrize(
    ("overrides", "shared", "first"),
    [
        (
            ["augment.scale=[0.5, 1.0]", "run.seed=0,1", "init_from="],
            ["augment.scale=[0.5, 1.0]", "init_from="],
            "seed-0",
        ),
        (["optim.lr=1,2", "run.seed=5", "optim.lr=3", "run.seed=0,1"], ["optim.lr=3"], "seed-0"),  # the last one counts
        (["optim.name=adamw,muon", "model.name=a,b"], [], "optim.name-adamw_model.name-a"),  # both keys end in `name`
    ],
)
def test_what_does_not_vary_is_shared(overrides: list[str], shared: list[str], first: str) -> None:
    found, points = read_grid(overrides)
    assert (found, points[0].name) == (shared, first)


def names(*overrides: str) -> list[str]:
    return [point.name for point in read_grid(overrides)[1]]


def test_the_second_of_two_same_names_ends_with_a_hash_of_its_settings() -> None:
    found = names("augment.scale=[0.5,1],[0.5 1]", "run.seed=0,1")
    assert found[:2] == ["scale-0.5-1_seed-0", "scale-0.5-1_seed-1"]
    assert all(re.fullmatch(rf"scale-0.5-1_seed-{seed}_[0-9a-f]{{8}}", found[2 + seed]) for seed in (0, 1))
    assert len(set(found)) == 4


def test_only_a_name_that_is_too_long_is_cut() -> None:
    longest = "b" * (120 - len("init_from-_seed-0"))
    fits, _, cut, other = names(f"init_from={longest},{longest}b", "run.seed=0,1")
    assert (len(fits), fits) == (120, f"init_from-{longest}_seed-0")
    assert cut != other
    for name in (cut, other):
        assert len(name) == 120
        assert re.fullmatch(r"init_from-b+_[0-9a-f]{8}", name)


@pytest.mark.parametrize("scales", ["[0.5,1],[0.5 1]", "0.5," + "1" * 120])
def test_more_values_change_no_name(scales: str) -> None:
    _, before = read_grid([f"augment.scale={scales}", "run.seed=0..1"])
    _, after = read_grid([f"augment.scale={scales},[0.5;1],0.7", "run.seed=0..3"])
    assert set(before) < set(after)  # with their settings
    assert len({point.name for point in after}) == 16


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["optim.lr=1e-3"], "no key has several values"),
        (["run.seed=4..0"], "run.seed=4..0: 4..0 should count up"),
        (["run.seed=0..99999"], "over at most 10,000 integers"),
        (["run.seed=0..99", "optim.lr=1,2", "a=0..99"], "the grid has 20,000 runs"),
        (["optim.lr=1,,2"], "optim.lr=1,,2: a value is empty"),
        (["optim.lr=1,1"], "1 is there twice"),
        (["augment.scale=[1,2"], "'[1,2': ] is missing at the end"),
        (["optim.lr"], "'optim.lr': should be key=value"),
    ],
)
def test_a_mistake_is_one_line(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError) as error:
        read_grid(overrides)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_elements_of_an_array_are_written_as_ranges() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
