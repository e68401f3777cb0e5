import re

from tests.conftest import run_script


def test_the_example_runs_and_learns() -> None:
    output = run_script("examples/swap_into_timm.py").stdout
    assert "FourierKaratOperator(num_tokens=197, num_heads=3, rank=12, grid=3" in output
    losses = [float(number) for number in re.findall(r"loss ([\d.]+)", output)]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
