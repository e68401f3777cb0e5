"""DeepSpeed's private attributes are where we expect them: a new release that moves one fails here first."""

import pytest
import torch

from karat_scale.engine import distributed
from karat_scale.engine.deepspeed_internals import (
    load_optimizer_states,
    master_weights,
    refresh_module,
    shard_layout,
)
from karat_scale.engine.shards import Fragment, Pieces
from tests.small_engines import CELLS, train_once, weights


def test_an_engine_is_built_without_a_word_or_the_shared_memory_build(small_recipe, make_engine, capfd) -> None:
    from deepspeed.ops import __compatible_ops__

    make_engine(small_recipe("deepspeed.config=zero1", "train.precision=bf16"))
    make_engine(small_recipe("deepspeed.config=zero3", "train.precision=bf16"))
    assert capfd.readouterr().out == ""
    assert __compatible_ops__["deepspeed_shm_comm"] is False


@pytest.mark.parametrize(("config", "precision"), CELLS)
def test_a_layout_covers_each_weight_once_and_states_and_masters_go_in_and_out(
    small_recipe, make_engine, config, precision
):
    engine = make_engine(small_recipe(f"deepspeed.config={config}", f"train.precision={precision}"))
    layout = shard_layout(engine.deepspeed)
    pieces = Pieces()
    for fragments, master in zip(layout, master_weights(engine.deepspeed), strict=True):
        pieces.add(fragments, master)
    assert sorted(f.name for fragments in layout for f in fragments) == sorted(engine.shapes)
    for (name, shape), weight in zip(engine.shapes.items(), weights(engine), strict=True):
        whole = torch.empty(shape)
        pieces.fill([Fragment(name, 0, 0, whole.numel())], whole)
        assert torch.equal(whole, weight)
    train_once(engine, 0)
    states = [{"step": 7.0, "exp_avg": m.detach() + 1, "exp_avg_sq": m.detach() ** 2} for m in _masters(engine)]
    load_optimizer_states(engine.deepspeed, states)
    base = engine.deepspeed.basic_optimizer
    for master, state in zip(_masters(engine), states, strict=True):
        assert torch.equal(base.state[master]["exp_avg_sq"], state["exp_avg_sq"])
    train_once(engine, 1)
    assert [float(base.state[master]["step"]) for master in _masters(engine)] == [8.0] * len(states)
    assert all(master.dtype == torch.float32 for master in _masters(engine))
    for master in _masters(engine):
        master.data.fill_(0.5)
    refresh_module(engine.deepspeed)
    assert all(bool((tensor == 0.5).all()) for tensor in weights(engine))


def _masters(engine) -> list[torch.Tensor]:
    return master_weights(engine.deepspeed)


def test_an_engine_does_not_depend_on_those_built_before(small_recipe, make_engine) -> None:
    """A stage 3 engine replaces torch.nn.functional.linear, which the next engine or `stop` must undo."""
    make_engine(small_recipe())
    own = torch.nn.functional.linear
    make_engine(small_recipe("deepspeed.config=zero3"))
    assert torch.nn.functional.linear is not own
    make_engine(small_recipe("deepspeed.config=zero1"))
    assert torch.nn.functional.linear is own
    make_engine(small_recipe("deepspeed.config=zero3"))
    distributed.stop()  # what is counted or traced later would otherwise see DeepSpeed's product and sum
    assert torch.nn.functional.linear is own


@pytest.mark.parametrize("config", ["zero0", "zero1", "zero3"])
def test_a_second_run_may_start_in_one_process(small_recipe, make_engine, config) -> None:
    for _ in range(2):
        train_once(make_engine(small_recipe(f"deepspeed.config={config}")), seed=1)
        distributed.stop()
        distributed.start("cpu")
