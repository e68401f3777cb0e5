"""Tests of each sentence of the summary on made-up figures, on both sides of each threshold."""

import pytest

from karat_scale.commands.analyze.command import linked
from karat_scale.commands.analyze.summary import (
    accuracy_sentence,
    constant_sentence,
    content_sentence,
    functions_sentence,
    lost_points,
    not_shown,
)


def test_a_score_is_above_chance_only_where_its_interval_is() -> None:
    chance, above = accuracy_sentence(15.0, 100, 10), accuracy_sentence(16.0, 100, 10)
    assert "(95 % interval for all such images: 9.3 to 23.3 %). That is not shown to be more than chance" in chance
    assert above.endswith("10.1 to 24.4 %). A guess between 10 classes is right on 10 %.")
    assert "best of 3 evaluations" in accuracy_sentence(16.0, 100, 10, 3)


@pytest.mark.parametrize(("share", "degree"), [(0.099, "little"), (0.1, "partly"), (0.499, "partly"), (0.5, "mostly")])
def test_s_depends_little_partly_or_mostly(share: float, degree: str) -> None:
    assert content_sentence([share, share], [0.0]).startswith(f"S depends {degree} on the query (")
    assert f"and {degree} on the image (" in content_sentence([0.0], [share - 0.01, share + 0.01])


def right(images: int, lost: int, gained: int) -> tuple[list[bool], list[bool]]:
    """Return for each image whether a model is right, and whether it is after a change that loses and gains some."""
    same = [True] * (images - lost - gained)
    return [True] * lost + [False] * gained + same, [False] * lost + [True] * gained + same


def test_a_constant_matrix_does_as_well_only_where_the_images_can_tell() -> None:
    assert lost_points(*right(1000, 14, 5)) == pytest.approx((0.9, 0.025, 1.771), abs=1e-3)
    said = {pair: constant_sentence(*right(1000, *pair), 0.1) for pair in ((14, 5), (13, 5), (6, 3), (7, 3), (5, 20))}
    assert said[14, 5].startswith("With a constant matrix in place of each S, the trained model loses 0.9 points")
    assert said[13, 5].startswith("These 1,000 images cannot tell whether a constant matrix")
    assert "does as well in the trained model: on 1,000 images, top-1 changes by -0.3 points (-0.9 to" in said[6, 3]
    assert said[7, 3].startswith("These 1,000 images cannot tell")
    assert said[7, 3].endswith("; --images takes more of them.")
    assert constant_sentence(*right(60, 1, 0), 0.1, is_all=True).endswith("; the split has no more.")
    assert "top-1 changes by +1.5 points" in said[5, 20]
    assert constant_sentence(*right(64, 0, 0), 0.1).startswith("These 64 images cannot tell")  # although none changes
    assert constant_sentence(*right(64, 0, 0), 0.0).startswith("Each S is a constant matrix already")
    assert constant_sentence(*right(1, 0, 0), 0.0).startswith("These 1 images cannot tell")


@pytest.mark.parametrize(
    ("parts", "judged"),
    [
        ((9.01, 0.99, 0.0), "they hardly read the scores."),
        ((8.99, 1.01, 0.0), "they read the scores nearly as straight lines would."),
        ((0.5, 0.376, 0.124), "they read the scores nearly as straight lines would."),
        ((0.5, 0.374, 0.126), "they do more with the scores than a straight line could."),
    ],
)
def test_functions_are_constants_lines_or_more(parts: tuple[float, float, float], judged: str) -> None:
    assert functions_sentence(*parts).endswith(judged)
    assert "50 % of the functions' energy is a constant, 45 % a straight line and 5 % a curve" in (
        functions_sentence(5.0, 4.5, 0.5)
    )


def test_only_what_is_absent_is_not_shown() -> None:
    (said,) = not_shown({"karat"}, repeats_seeds=False, has_other_tests=False)
    assert all(part in said for part in ("another seed", "softmax", "constant matrix", "other test sets"))
    (said,) = not_shown({"karat", "softmax"}, repeats_seeds=True, has_other_tests=True)
    assert "constant matrix" in said
    assert not any(part in said for part in ("another seed", "softmax", "other test sets"))
    assert not_shown({"static", "softmax"}, repeats_seeds=True, has_other_tests=True) == []


def test_the_first_mention_of_a_term_leads_to_the_glossary() -> None:
    terms = {"S": "<weights>", "query": "asks", "rank": "r", "effective rank": "e"}
    shown = str(linked("<b>S: queries ask, Queries and S. An effective rank of SS; ranks", terms))
    assert shown.startswith(
        '&lt;b&gt;<a class="term" href="#term-S" title="&lt;weights&gt;">S</a>: <a class="term" href'
    )
    assert [shown.count(f">{form}</a>") for form in ("S", "queries", "Queries", "effective rank", "ranks")] == [
        1,
        1,
        0,
        1,
        1,
    ]
    assert shown.count("<a ") == 4
