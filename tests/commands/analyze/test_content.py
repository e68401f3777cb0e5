from karat_scale.commands.analyze.matrices import analyze_content
from karat_scale.commands.analyze.result import Settings
from karat_scale.commands.analyze.trained_run import TrainedRun


def test_of_a_real_run(any_run: TrainedRun) -> None:
    result = analyze_content(any_run, Settings(images=6, batch=4))
    assert result.numbers["images"] == 6
    assert len(result.numbers["blocks"]) == 2
    for block in result.numbers["blocks"]:
        assert 0 <= block["by_query"] <= 1
        assert block["frobenius_norm"] > 0
