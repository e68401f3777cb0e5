from hypothesis import given
from hypothesis import strategies as st

from karat_scale.commands.doctor.timed_run import timed_batch


@given(
    micro=st.integers(1, 64),
    accumulation=st.integers(1, 8),
    world=st.integers(1, 8),
    image_seconds=st.floats(1e-6, 10),
    seconds=st.floats(0.1, 100),
)
def test_the_timed_batch_divides_and_never_grows(
    micro: int, accumulation: int, world: int, image_seconds: float, seconds: float
) -> None:
    wanted = micro * accumulation * world
    batch, smaller = timed_batch(wanted, micro, world, image_seconds, seconds)
    assert 1 <= smaller <= micro
    assert batch <= wanted
    assert batch % (smaller * world) == 0
    if smaller < micro:
        assert smaller % 2 == 0


def test_a_step_that_fits_stays_and_one_that_does_not_shrinks() -> None:
    assert timed_batch(256, 64, 2, image_seconds=0.001, seconds=12) == (256, 64)
    assert timed_batch(256, 32, 1, image_seconds=0.01, seconds=12) == (96, 32)
    assert timed_batch(256, 128, 1, image_seconds=0.1, seconds=12) == (10, 10)
    assert timed_batch(256, 128, 2, image_seconds=10, seconds=12) == (4, 2)
