"""What `train.precision` means at each stage, and on CUDA, whose own autocast flag DeepSpeed asks."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from karat_scale.engine.deepspeed_internals import master_weights, shard_layout
from karat_scale.engine.engine import PRECISIONS, allow_tf32, pixel_dtype
from karat_scale.models import create_model
from karat_scale.recipe import TrainConfig
from karat_scale.recipe.loading import load_recipe
from karat_scale.training.tasks.classification.task import TrainState
from tests.small_engines import train_once, train_steps

FULL, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
STAGES = ("zero0", "zero1", "zero2", "zero3")


def test_the_table() -> None:
    held = {name: (precision.compute, precision.weights) for name, precision in PRECISIONS.items()}
    assert held == {"fp32": (FULL, FULL), "bf16": (BRAIN, FULL), "bf16_weights": (BRAIN, BRAIN), "fp16": (HALF, HALF)}
    assert [name for name, precision in PRECISIONS.items() if precision.autocasts] == ["bf16"]
    for name, precision in PRECISIONS.items():
        assert TrainConfig(precision=name).holds_16_bits == (precision.weights != FULL)
        assert TrainConfig(precision=name).is_16_bit == (precision.compute != FULL)


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


@pytest.mark.parametrize("config", ["zero0", "zero3"])
def test_images_in_the_dtype_of_autocast_give_the_same_bits_and_are_not_cast_back(
    small_recipe, make_engine, config: str
) -> None:
    engine = make_engine(small_recipe(f"deepspeed.config={config}", "train.precision=bf16"))
    engine.module.eval()
    seen = []
    engine.module.patch_embed.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(engine.forward(images), engine.forward(images.bfloat16()))
    assert seen == [FULL, BRAIN]


def test_images_are_made_in_what_a_gpu_computes_in() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    made = {name: pixel_dtype(TrainConfig(precision=name), gpu) for name in PRECISIONS}
    assert made == {"fp32": FULL, "bf16": BRAIN, "bf16_weights": BRAIN, "fp16": HALF}
    assert {pixel_dtype(TrainConfig(precision=name), cpu) for name in PRECISIONS} == {FULL}


def test_tf32_is_torchs_own_switch(small_recipe, make_engine) -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed in (False, True):
            make_engine(small_recipe(f"train.tf32={str(allowed).lower()}"))
            assert torch.backends.cuda.matmul.allow_tf32 is allowed
            assert torch.backends.cudnn.allow_tf32 is allowed
    finally:
        allow_tf32(before)


@pytest.mark.parametrize("config", ["zero1", "zero3"])
def test_a_run_with_16_bit_weights_resumes_under_autocast(
    small_recipe, make_checkpoints, tmp_path: Path, config: str
) -> None:
    """So do runs that began when `bf16` meant 16-bit weights."""
    before = make_checkpoints(small_recipe(f"deepspeed.config={config}", "train.precision=bf16_weights"), tmp_path)
    train_steps(before, 1, 2)
    assert before.save(TrainState(step=2, samples=16))
    after = make_checkpoints(small_recipe(f"deepspeed.config={config}", "train.precision=bf16"), tmp_path)
    assert after.load().step == 2
    assert _by_name(after.engine.deepspeed) == _by_name(before.engine.deepspeed)
    norms = [train_once(run.engine, 3) for run in (before, after)]
    assert norms[1] == pytest.approx(norms[0], rel=5e-2)


def _by_name(engine: Any) -> dict[str, list[float]]:
    """Masters by parameter: the two lay them out with other padding."""
    flat = {}
    for fragments, master in zip(shard_layout(engine), master_weights(engine), strict=True):
        for name, _, start, length in fragments:
            flat[name] = master.detach().view(-1)[start : start + length].tolist()
    return flat


@pytest.mark.parametrize(
    "name", ["imagenet_vit_base_g1b", "cifar10_vit_tiny", "imagenet_vit_small_bv", "fashion_mnist_demo"]
)
def test_the_shipped_recipes_hold_fp32_weights_at_the_lowest_stage(name: str) -> None:
    recipe = load_recipe(name)
    assert PRECISIONS[recipe.train.precision].weights == torch.float32
    assert recipe.deepspeed.config == "zero0"


# From the documentation of torch.use_deterministic_algorithms: on CUDA they add in no fixed order. Convolutions do
# without `cudnn.deterministic`.
IN_NO_ORDER = re.compile(
    r"aten\.(upsample_(linear|bilinear|bicubic|trilinear).*backward|adaptive_.*pool.*backward|avg_pool3d_backward|"
    r"max_pool3d.*backward|max_unpool.*|fractional_.*backward|reflection_pad.*backward|replication_pad.*backward|"
    r"nll_loss2d.*|_ctc_loss_backward|_embedding_bag.*backward|put_?|histc|bincount|median|grid_sampler.*backward|"
    r"cumsum|scatter.*|index_add_?|index_copy_?|gather)\."
)


class Operations(TorchDispatchMode):
    """Collects the names of what runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(f"{func}.")
        return func(*args, **(kwargs or {}))


HOSTS = {
    "ViT": (),
    "softmax": ("attention.kind=softmax",),
    "content": ("attention.form=content",),
    "Swin": ("model.name=swin_tiny_patch4_window7_224", "model.image_size=56"),
    "ConViT": ("model.name=convit_tiny", "model.image_size=32", "model.patch_size=16", "model.depth=3"),
    "DeiT": ("model.name=deit_tiny_distilled_patch16_224", "model.image_size=32", "model.depth=1"),
}
OF_THE_MODEL = tuple(f"model.{key}=null" for key in ("patch_size", "embed_dim", "depth", "num_heads"))


@pytest.mark.parametrize("host", HOSTS)
def test_on_a_gpu_a_step_adds_in_a_fixed_order(small_recipe, make_engine, host: str) -> None:
    own = HOSTS[host]
    recipe = small_recipe(*(OF_THE_MODEL if any(one.startswith("model.name") for one in own) else ()), *own)
    with torch.device("meta"):
        model = create_model(recipe.model, recipe.attention).train()
        images = torch.empty(2, 3, recipe.model.image_size, recipe.model.image_size)
        targets = torch.empty(2, recipe.model.num_classes)
    with Operations() as operations:
        logits = model(images)
        logits = sum(logits) if isinstance(logits, tuple) else logits
        torch.nn.functional.cross_entropy(logits, targets).backward()
    assert any("convolution_backward" in name for name in operations.names)
    assert not [name for name in operations.names if IN_NO_ORDER.match(name)]


def test_an_engine_keeps_cudnn_to_a_fixed_order(small_recipe, make_engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    make_engine(small_recipe())
    assert torch.backends.cudnn.deterministic
