"""Which ranks are called slow."""

from karat_scale.engine.heartbeat import Sign, Stragglers, slow_ranks


def signs(*own_seconds: float) -> list[Sign]:
    """Signs of ranks 0, 1, ..., each on a node of its own."""
    return [Sign(rank, f"node{rank}", 1, "", own_seconds=s) for rank, s in enumerate(own_seconds)]


def test_a_rank_far_above_the_others_is_named_with_its_host() -> None:
    (line,) = slow_ranks(signs(0.2, 0.21, 0.5, 0.19))
    assert line == "rank 2 on node2 takes 0.5 s of its own per step (data and forward pass), 2.5 times the others"


def test_of_two_ranks_the_other_is_the_measure() -> None:
    assert [line[:6] for line in slow_ranks(signs(0.4, 0.2))] == ["rank 0"]


def test_alike_alone_unknown_or_tiny_is_not_slow() -> None:
    for own_seconds in ([0.2, 0.29], [0.5], [0.5, 0.0], [0.001, 0.009]):
        assert slow_ranks(signs(*own_seconds)) == []


def test_one_slow_report_may_be_chance_and_two_are_told_once() -> None:
    stragglers = Stragglers()
    assert stragglers.look(signs(0.2, 0.5)) == []
    assert stragglers.look(signs(0.2, 0.5)) == []  # the same report, seen again
    (line,) = stragglers.look(signs(0.2, 0.51))
    assert line.startswith("rank 1 on node1")
    assert stragglers.look(signs(0.2, 0.52)) == []


def test_a_rank_that_was_slow_between_is_not_told() -> None:
    stragglers = Stragglers()
    for own_seconds in (0.5, 0.21, 0.51, 0.22):
        assert stragglers.look(signs(0.2, own_seconds)) == []
