import re

import pytest

from tests.conftest import run_script


@pytest.mark.slow
def test_the_example_matches_four_blocks() -> None:
    output = run_script("examples/convert_timm.py", "--random").stdout
    missed = [[float(number) for number in re.findall(r"block \d+ ([\d.]+)", line)] for line in output.splitlines()]
    at_once, solved, descended = missed[:3]
    assert len(at_once) == 4
    assert all(0.5 * first > second >= third for first, second, third in zip(at_once, solved, descended, strict=True))
    change, largest = map(float, re.findall(r"[\d.e+-]+", output.splitlines()[-1])[-2:])
    assert change < 0.5 * largest
