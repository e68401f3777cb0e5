"""What `key=a,b,c` and `run.seed=0..4` name."""

import pytest

from karat_scale.errors import UserError
from karat_scale.sweep.grid import read_grid
from karat_scale.sweep.slurm import ranges


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


def test_one_list_is_one_value() -> None:
    shared, _ = read_grid(["augment.scale=[0.5, 1.0]", "run.seed=0,1", "init_from="])
    assert shared == ["augment.scale=[0.5, 1.0]", "init_from="]


def test_the_last_value_of_a_key_counts() -> None:
    shared, points = read_grid(["optim.lr=1,2", "run.seed=5", "optim.lr=3", "run.seed=0,1"])
    assert (shared, [point.name for point in points]) == (["optim.lr=3"], ["seed-0", "seed-1"])


def test_keys_with_the_same_last_part_have_their_whole_names_in_the_directories() -> None:
    _, points = read_grid(["optim.name=adamw,muon", "model.name=a,b"])
    assert points[0].name == "optim.name-adamw_model.name-a"


def test_directories_whose_names_would_be_the_same_are_numbered() -> None:
    _, points = read_grid(["augment.scale=[0.5,1],[0.5 1]", "run.seed=0,1"])
    assert [point.name for point in points] == [f"run-000{number}" for number in range(4)]


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
