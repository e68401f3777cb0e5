import re

from tests.conftest import run_script


def test_the_example_changes_nothing_and_then_learns() -> None:
    output = run_script("examples/swap_into_timm.py", "--random").stdout
    assert "FourierKaratOperator(num_tokens=197, num_heads=3, rank=12, grid=3" in output
    assert "largest change of a logit: 0.0e+00" in output
    losses = [float(number) for number in re.findall(r"loss ([\d.]+)", output)]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
