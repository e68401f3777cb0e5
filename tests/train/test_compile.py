"""torch.compile is a switch for speed: the same training at every ZeRO stage, or a refusal in one line."""

import pytest
import torch

from karat_scale.errors import RecipeError
from tests.train.conftest import train_once, weights


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "implementation"),
    [
        ("zero0", "streaming"),
        ("zero0", "reference"),
        *((config, "cpu") for config in ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload_params")),
    ],
)
def test_a_compiled_model_trains_as_one_that_is_not(
    small_recipe, make_engine, config: str, implementation: str
) -> None:
    outcomes = []
    for compiled in ("false", "true"):
        own = (f"deepspeed.config={config}", "deepspeed.cpu_adam=torch", f"train.compile={compiled}")
        engine = make_engine(small_recipe(*own, f"attention.implementation={implementation}"))
        norms = [train_once(engine, seed) for seed in range(3)]
        outcomes.append((norms, torch.cat([weight.flatten() for weight in weights(engine)])))
    (norms, plain), (compiled_norms, compiled_weights) = outcomes
    assert compiled_norms == pytest.approx(norms, rel=1e-4)
    torch.testing.assert_close(compiled_weights, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_bf16_compiles(small_recipe, make_engine) -> None:
    norms = []
    for compiled in ("false", "true"):
        own = ("deepspeed.config=zero1", "train.precision=bf16", f"train.compile={compiled}")
        engine = make_engine(small_recipe(*own))
        norms.append([train_once(engine, seed) for seed in range(3)])
    assert norms[1] == pytest.approx(norms[0], rel=2e-2)  # fused operations round less often


def test_deepspeeds_checkpoint_cannot_be_traced(small_recipe) -> None:
    with pytest.raises(RecipeError, match=r"use train\.recompute\.method=torch"):
        small_recipe("train.compile=true", "train.recompute.policy=all", "train.recompute.method=deepspeed")
