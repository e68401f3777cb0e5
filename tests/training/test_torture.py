import json
from pathlib import Path

import pytest

from tests.conftest import run_script


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_run_that_is_killed_again_and_again_ends_in_the_same_bits(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = run_script(
        "tests/torture.py", "--kills", "3", "--seed", "1", "--json", str(out), "train.epochs=2", check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    outcome = json.loads(out.read_text())
    assert outcome["kills"] == 3
    assert outcome["rounds"] >= 1
    assert outcome["problems"] == []
