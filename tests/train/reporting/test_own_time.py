import time

import torch

from karat_scale.train.reporting.own_time import OwnTime


def test_data_and_forward_passes_add_up_until_they_are_taken() -> None:
    own_time = OwnTime(torch.device("cpu"))
    with own_time.data():
        time.sleep(0.02)
    time.sleep(0.5)  # waiting for others is not its own
    with own_time.forward():
        time.sleep(0.02)
    assert 0.04 <= own_time.take() < 0.5
    assert own_time.take() == 0.0
