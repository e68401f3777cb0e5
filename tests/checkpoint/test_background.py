import threading

import pytest

from karat_scale.checkpoint.checkpoints import Background


def test_work_in_the_background_returns_its_result() -> None:
    go_on = threading.Event()
    task = Background(lambda: go_on.wait(60) and "done")
    assert not task.wait(0)
    go_on.set()
    assert task.wait(60)
    assert task.result() == "done"


def test_what_the_work_raises_is_raised_where_its_result_is_asked_for() -> None:
    task = Background(lambda: 1 // 0)
    assert task.wait(60)
    with pytest.raises(ZeroDivisionError):
        task.result()
