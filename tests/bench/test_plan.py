"""Three cheap cases of `karat bench plan`; the rest are slow. The plan is within a tenth of what is measured."""

import pytest

from karat_scale.bench.plan import CASES, Case, compare

CHEAP = (0, 1, 6)
OTHERS = [case for number, case in enumerate(CASES) if number not in CHEAP]


@pytest.mark.parametrize("case", [CASES[number] for number in CHEAP], ids=lambda case: case.name)
def test_live_tensors_peak_where_the_plan_says(case: Case) -> None:
    assert abs(compare(case)["error"]) < 0.1


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("case", OTHERS, ids=lambda case: case.name)
def test_so_they_do_in_every_other_case(case: Case) -> None:
    assert abs(compare(case)["error"]) < 0.1
