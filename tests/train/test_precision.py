"""What `train.precision` means at each stage, and on CUDA, whose own autocast flag DeepSpeed asks."""

from types import SimpleNamespace

import pytest
import torch

from karat_scale.train.precision import PRECISIONS, allow_tf32, precision_refusal
from tests.train.conftest import train_once

FULL, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
STAGES = ("zero0", "zero1", "zero2", "zero3")


def test_the_table() -> None:
    held = {name: (precision.compute, precision.weights) for name, precision in PRECISIONS.items()}
    assert held == {"fp32": (FULL, FULL), "bf16": (BRAIN, FULL), "bf16_weights": (BRAIN, BRAIN), "fp16": (HALF, HALF)}
    assert [name for name, precision in PRECISIONS.items() if precision.autocasts] == ["bf16"]
    assert [name for name in PRECISIONS if precision_refusal(name, stage=0)] == ["bf16_weights", "fp16"]
    assert not any(precision_refusal(name, stage=1) for name in PRECISIONS)


@pytest.fixture
def cudas_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed asks for CUDA's autocast flag without naming a device; let it see this device's, as it would there."""
    import deepspeed.runtime.torch_autocast as theirs

    names = ("autocast", "float16", "bfloat16", "float32", "is_tensor")
    seen = SimpleNamespace(**{name: getattr(torch, name) for name in names})
    seen.is_autocast_enabled = lambda *_: torch.is_autocast_enabled("cpu")
    monkeypatch.setattr(theirs, "torch", seen)


@pytest.mark.parametrize("precision", ["bf16", "bf16_weights"])
@pytest.mark.parametrize("config", STAGES)
def test_the_module_computes_in_bf16_where_the_devices_flag_is_asked(
    small_recipe, make_engine, cudas_flag, config: str, precision: str
) -> None:
    if (config, precision) == ("zero0", "bf16_weights"):
        return  # refused, says the table
    engine = make_engine(small_recipe(f"deepspeed.config={config}", f"train.precision={precision}"))
    seen = []
    engine.module.blocks[0].mlp.fc1.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    assert train_once(engine, 0) > 0
    assert seen == [torch.bfloat16]
    held = {parameter.dtype for parameter in engine.module.parameters()}
    assert held == {PRECISIONS[precision].weights}
    assert not torch.is_autocast_enabled("cpu")


def test_tf32_is_torchs_own_switch(small_recipe, make_engine) -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed in (False, True):
            make_engine(small_recipe(f"train.tf32={str(allowed).lower()}"))
            assert torch.backends.cuda.matmul.allow_tf32 is allowed
            assert torch.backends.cudnn.allow_tf32 is allowed
    finally:
        allow_tf32(before)
