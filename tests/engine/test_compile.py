"""torch.compile changes only the speed: training is the same at every ZeRO stage, or is refused in one line."""

from typing import Any

import pytest
import torch

from karat_scale.engine.deepspeed_config import load_ds_config
from karat_scale.foundation.errors import RecipeError
from tests.compilers import needs_compiler, needs_kernels
from tests.small_engines import train_once, weights


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "attention"),
    [
        ("zero0", "implementation=streaming"),
        ("zero1", "implementation=reference"),
        *(
            pytest.param(config, "implementation=cpu", marks=needs_kernels)
            for config in ("zero0", "zero2", "zero3", "zero3_offload_params")
        ),
        ("zero3", "form=content"),
        ("zero0", "bound=3.0"),
        *(
            ("zero0", f"kind={kind}")
            for kind in ("sigmoid", "polynomial", "gated", "differential", "softmax_bias", "query_only", "centred")
        ),
    ],
)
def test_a_compiled_model_trains_as_one_that_is_not(small_recipe, make_engine, config, attention) -> None:
    outcomes = []
    for compiled in ("false", "true"):
        own = (f"deepspeed.config={config}", "deepspeed.cpu_adam=torch", f"train.compile={compiled}")
        engine = make_engine(small_recipe(*own, f"attention.{attention}"))
        norms = [train_once(engine, seed) for seed in range(3)]
        outcomes.append((norms, torch.cat([weight.flatten() for weight in weights(engine)])))
    (norms, plain), (compiled_norms, compiled_weights) = outcomes
    assert compiled_norms == pytest.approx(norms, rel=1e-4)
    near = 1e-4 if attention == "kind=polynomial" else 1e-5  # its gradients are almost 0, and Adam scales them up
    torch.testing.assert_close(compiled_weights, plain, rtol=1e-4, atol=near)


@needs_compiler
@pytest.mark.slow
def test_models_of_growing_images_do_not_use_up_the_compilers_limit(small_recipe, make_engine) -> None:
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for size in (8, 16):
            engine = make_engine(small_recipe("train.compile=true", f"model.image_size={size}"))
            train_once(engine, 0, size=size)
            engine.release()


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "precision", "mode"),
    [("zero0", "bf16", "true"), ("zero0", "bf16", "reduce-overhead"), ("zero1", "bf16_weights", "default")],
)
def test_bf16_compiles_in_each_mode(small_recipe, make_engine, config, precision, mode) -> None:
    norms = []
    for compiled in ("false", mode):
        own = (f"deepspeed.config={config}", f"train.precision={precision}", f"train.compile={compiled}")
        engine = make_engine(small_recipe(*own))
        norms.append([train_once(engine, seed) for seed in range(3)])
    assert norms[1] == pytest.approx(norms[0], rel=2e-2)  # fused operations round less often


@pytest.mark.parametrize("config", ["zero0", "zero1"])
def test_the_model_with_its_autocast_is_one_graph(small_recipe, make_engine, config) -> None:
    engine = make_engine(small_recipe(f"deepspeed.config={config}", "train.precision=bf16"))
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.utils.counters.clear()
    engine.deepspeed.compile(backend=backend)
    for seed in range(3):
        train_once(engine, seed)
    assert len(graphs) == 1
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.fixture
def quick_compiler(monkeypatch) -> None:
    """Let `compile` trace a module but run its operations eagerly, which is quick."""

    def compile_quickly(module: torch.nn.Module, **_: Any) -> None:
        module._compiled_call_impl = torch.compile(module._call_impl, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_quickly)


def _compiled_parts(module: torch.nn.Module) -> list[str]:
    return [name for name, part in module.named_modules() if part._compiled_call_impl is not None]


@pytest.mark.parametrize(
    "own",
    [
        ("deepspeed.config=zero0", "train.precision=bf16"),
        ("deepspeed.config=zero1", "attention.mode=universal"),
        ("deepspeed.config=zero2", "train.recompute.policy=all"),
        ("deepspeed.config=zero2_offload", "deepspeed.cpu_adam=torch", "attention.kind=softmax"),
    ],
)
def test_one_block_is_compiled_for_all(small_recipe, make_engine, quick_compiler, own) -> None:
    compiled, eager = (
        make_engine(small_recipe(*own, "model.depth=4", f"train.compile={mode}")) for mode in ("true", "false")
    )
    assert _compiled_parts(compiled.module) == [f"blocks.{number}" for number in range(4)]
    assert compiled.module.state_dict().keys() == eager.module.state_dict().keys()
    torch._dynamo.utils.counters.clear()
    for seed in range(3):
        assert train_once(compiled, seed) == pytest.approx(train_once(eager, seed), rel=1e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    close = {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(weights(compiled), weights(eager), **close)
    for engine in (compiled, eager):
        engine.module.eval()
    images = torch.randn(5, 3, 16, 16)  # the rest of a test set
    with torch.no_grad():
        torch.testing.assert_close(compiled.forward(images), eager.forward(images), **close)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_the_whole_model_is_compiled_where_blocks_differ(small_recipe, make_engine, quick_compiler):
    for own in (
        ("train.compile=reduce-overhead",),  # CUDA graphs are of the whole model
        ("deepspeed.config=zero3",),
        ("model.drop_path=0.1", "model.depth=3"),  # a rate for each block
    ):
        engine = make_engine(small_recipe("train.compile=true", *own))
        assert _compiled_parts(engine.module) == [""], own


def test_cuda_graphs_are_refused_where_memory_moves_and_deepspeeds_checkpoint_always(small_recipe) -> None:
    for compiled in ("train.compile=reduce-overhead", "train.compile=max-autotune"):
        with pytest.raises(RecipeError, match=r"and ZeRO stage 3 moves the weights; use deepspeed\.config=zero0"):
            load_ds_config(small_recipe(compiled, "deepspeed.config=zero3"), 1, 8)
        with pytest.raises(RecipeError, match=r"the gradients of 2 micro batches; use train\.compile=default"):
            load_ds_config(small_recipe(compiled), 1, 4)
        load_ds_config(small_recipe(compiled), 1, 8)
    load_ds_config(small_recipe("train.compile=default", "deepspeed.config=zero3"), 1, 4)
    with pytest.raises(RecipeError, match=r"use train\.recompute\.method=torch"):
        small_recipe("train.compile=true", "train.recompute.policy=all", "train.recompute.method=deepspeed")
