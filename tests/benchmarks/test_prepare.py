import json

import pytest

from benchmarks.prepare import main
from karat_scale.foundation.errors import UserError


def test_the_ratios_are_measured(tmp_path):
    file = tmp_path / "figures.json"
    command = ["--images", "4", "--rounds", "1", "--resize", "64", "--json", str(file)]
    main(command)
    result = json.loads(file.read_text())
    assert (result["images"], result["resize"]) == (4, 64)
    assert min(result["resize_ratio"], result["copy_ratio"], result["check_ratio"]) > 0
    measured = {
        "make_webdataset --resize",
        "copy of tar members",
        "whole decode, Pillow",
        "make_webdataset --check decode",
    }
    assert {result["base"], *measured} <= set(result["milliseconds_an_image"])


@pytest.mark.parametrize("option", [["--quality", "101"], ["--tar", "nowhere.tar"]])
def test_what_cannot_be_measured_is_an_error_that_names_the_option(option):
    with pytest.raises(UserError, match=option[0]):
        main(option)
