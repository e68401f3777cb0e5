import os
from collections import OrderedDict

import pytest
import torch

from karat_scale.checkpoint.tensor_storage import host_copy, load_tensors, read_metadata, save_tensors
from karat_scale.foundation.files import file_sha256


def test_tensors_survive_the_round_trip(tmp_path) -> None:
    value = {"ema": [torch.arange(5.0)], "rng": torch.get_rng_state(), "none": None}
    written = save_tensors(value, tmp_path / "t.pt")
    assert written == ((tmp_path / "t.pt").stat().st_size, file_sha256(tmp_path / "t.pt"))
    again = load_tensors(tmp_path / "t.pt")
    assert torch.equal(again["ema"][0], value["ema"][0])
    assert again["none"] is None


def test_a_host_copy_keeps_what_was_there_and_what_belongs_together() -> None:
    weight = torch.arange(6.0)
    state = OrderedDict(a=weight, b=weight, part=weight[2:4], nested={"list": [weight[2:4], (1, "x")], "none": None})
    state._metadata = {"version": 1}  # type: ignore[attr-defined]  # as torch's state_dict has it
    twin = host_copy(state)
    weight.zero_()
    assert type(twin) is OrderedDict
    assert twin._metadata == {"version": 1}
    assert twin["a"] is twin["b"]
    assert torch.equal(twin["a"], torch.arange(6.0))
    assert twin["part"] is twin["nested"]["list"][0]
    assert twin["part"].untyped_storage().nbytes() == 2 * 4  # a view's copy is no larger than the view
    assert twin["nested"]["list"][1] == (1, "x")


@pytest.mark.parametrize("read", [load_tensors, read_metadata, file_sha256])
def test_nobody_waits_at_a_pipe_in_place_of_tensors(read, tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        read(tmp_path / "pipe")
