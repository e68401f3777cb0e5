"""What a recipe may say about a stream."""

from pathlib import Path

import pytest

from karat_scale.foundation.errors import RecipeError
from karat_scale.recipe import Recipe
from karat_scale.recipe.loading import load_recipe

STREAM = ("data.path=somewhere", "data.order=stream", "data.stream_samples=10")


@pytest.fixture
def load(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text("{}\n")

    def recipe(*overrides: str) -> Recipe:
        return load_recipe(path, overrides)

    return recipe


def message(load, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load(*overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "spelled",
    [
        "data/train-{000..146}.tar",
        "https://host/train-{000..146}.tar::https://other/a.tar",
        "pipe:aws s3 cp s3://bucket/token-lists/train-{000..146}.tar -",
        "'pipe:curl -H \"Authorization: Bearer $TOKEN\" https://host/{0..9}.tar'",
        "pipe:TOKEN=$MINE curl https://$USER:$PASSWORD@host/a.tar",
        "pipe:curl --oauth2-bearer-token $T -u me:$PASSWORD https://host/{0..9}.tar?$QUERY",
    ],
)
def test_a_stream_as_webdataset_spells_it(load, spelled: str) -> None:
    recipe = load(*STREAM, f"data.stream={spelled}", "data.stream_label=json:meta.label", "data.workers=3")
    assert (recipe.data.is_stream, recipe.data.lanes) == (True, 3)
    assert recipe.data.stream == spelled.strip("'")
    assert load(*STREAM, "data.stream=a.tar", "data.workers=0").data.lanes == 1  # the trainer itself
    assert load("data.path=somewhere").data.lanes == 0


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (STREAM, ["data.stream is empty", "pipe:cat"]),
        (
            ("data.order=stream", "data.stream=a.tar", "data.path=x"),
            ["data.stream_samples is not set; set it to the number of images"],
        ),
        ((*STREAM, "data.stream=a.tar", "data.path="), ["data.path is empty"]),
        (("data.path=x", "data.stream=a.tar"), ["data.stream is set", "data.order = full", "data.order=stream"]),
        (("data.path=x", "data.stream_samples=3", "data.order=block"), ["data.stream_samples is set", "= block"]),
        ((*STREAM, "data.stream=a.tar", "data.backend=dali"), ["data.backend=webdataset, not dali"]),
        ((*STREAM, "data.stream=a.tar", "data.backend=folder"), ["data.backend=webdataset, not folder"]),
        ((*STREAM, "data.stream=a.tar", "data.backend=synthetic"), ["data.backend=webdataset, not synthetic"]),
        ((*STREAM, "data.stream=a.tar", "data.stream_samples=0"), ["data.stream_samples = 0"]),
        ((*STREAM, "data.stream=a.tar", "data.stream_label=json"), ["data.stream_label = json", "json:FIELD"]),
        ((*STREAM, "data.stream=a.tar", "data.stream_label=auto"), ["data.stream_label = auto", "cls"]),
    ],
)
def test_what_cannot_be_is_one_line(load, overrides: tuple[str, ...], parts: list[str]) -> None:
    text = message(load, *overrides)
    assert [part for part in parts if part not in text] == []


@pytest.mark.parametrize(
    "spelled",
    [
        "https://me:s3cr@host/a.tar",
        "https://host/a.tar?X-Amz-Signature=s3cr",
        "pipe:curl https://host/a.tar?sig=s3cr",
        "pipe:AWS_SECRET_ACCESS_KEY=s3cr aws s3 cp s3://b/a.tar -",
        "pipe:get --api-key s3cr a.tar",
        "'pipe:curl -H \"Authorization: Bearer s3cr\" https://host/a.tar'",
        "pipe:curl -u me:s3cr https://host/a.tar",
    ],
)
def test_a_credential_is_refused_and_not_repeated(load, spelled: str) -> None:
    text = message(load, *STREAM, f"data.stream={spelled}")
    assert "data.stream has a user, a query or a secret in it" in text
    assert "s3cr" not in text
