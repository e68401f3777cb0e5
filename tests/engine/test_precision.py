"""Tests of train.precision at each stage. On a CPU, they emulate fp16 and CUDA's autocast flag."""

import json
import math
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from karat_scale.engine.deepspeed_config import load_ds_config
from karat_scale.engine.deepspeed_internals import master_weights, shard_layout
from karat_scale.engine.engine import PRECISIONS, allow_tf32, forward_for_evaluation, pixel_dtype
from karat_scale.foundation.errors import RecipeError
from karat_scale.models import create_model
from karat_scale.recipe import TrainConfig
from karat_scale.training.tasks.classification.task import TrainState
from tests.engine.fp16_on_cpu import allow_fp16
from tests.small_engines import CONFIGS, CONVIT, SWIN, equal, train_once, train_steps, weights

FULL, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
STAGES = ("zero0", "zero1", "zero2", "zero3")


def test_the_table_and_what_images_are_made_in():
    held = {name: (precision.compute, precision.weights) for name, precision in PRECISIONS.items()}
    assert held == {"fp32": (FULL, FULL), "bf16": (BRAIN, FULL), "bf16_weights": (BRAIN, BRAIN), "fp16": (HALF, HALF)}
    assert [name for name, precision in PRECISIONS.items() if precision.autocasts] == ["bf16"]
    for name, precision in PRECISIONS.items():
        assert TrainConfig(precision=name).holds_16_bits == (precision.weights != FULL)
        assert TrainConfig(precision=name).is_16_bit == (precision.compute != FULL)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    made = {name: pixel_dtype(TrainConfig(precision=name), gpu) for name in PRECISIONS}
    assert made == {"fp32": FULL, "bf16": BRAIN, "bf16_weights": BRAIN, "fp16": HALF}
    assert {pixel_dtype(TrainConfig(precision=name), cpu) for name in PRECISIONS} == {FULL}


@pytest.fixture
def cudas_flag(monkeypatch) -> None:
    """Let DeepSpeed see the CPU's autocast flag: it asks without naming a device, which means CUDA's flag."""
    import deepspeed.runtime.torch_autocast as theirs

    names = ("autocast", "float16", "bfloat16", "float32", "is_tensor")
    seen = SimpleNamespace(**{name: getattr(torch, name) for name in names})
    seen.is_autocast_enabled = lambda *_: torch.is_autocast_enabled("cpu")
    monkeypatch.setattr(theirs, "torch", seen)


@pytest.mark.parametrize(
    ("config", "precision"),
    [*((stage, "bf16") for stage in STAGES), ("zero1", "bf16_weights"), ("zero3", "bf16_weights")],
)
def test_the_module_computes_in_bf16_by_the_devices_flag(small_recipe, make_engine, cudas_flag, config, precision):
    engine = make_engine(small_recipe(f"deepspeed.config={config}", f"train.precision={precision}"))
    seen = []
    engine.module.blocks[0].mlp.fc1.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    assert train_once(engine, 0) > 0
    assert seen == [torch.bfloat16]
    held = {parameter.dtype for parameter in engine.module.parameters()}
    assert held == {PRECISIONS[precision].weights}
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("config", ["zero0", "zero3"])
def test_images_in_the_dtype_of_autocast_give_the_same_bits(small_recipe, make_engine, config):
    engine = make_engine(small_recipe(f"deepspeed.config={config}", "train.precision=bf16"))
    engine.module.eval()
    seen = []
    engine.module.patch_embed.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(engine.forward(images), engine.forward(images.bfloat16()))
    assert seen == [FULL, BRAIN]


def test_tf32_is_torchs_own_switch_and_cudnn_keeps_to_a_fixed_order(small_recipe, make_engine, monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed in (False, True):
            make_engine(small_recipe(f"train.tf32={str(allowed).lower()}"))
            assert torch.backends.cuda.matmul.allow_tf32 is allowed
            assert torch.backends.cudnn.allow_tf32 is allowed
        assert torch.backends.cudnn.deterministic
    finally:
        allow_tf32(before)


def test_an_evaluation_leaves_torchs_switches_as_they_were(small_recipe) -> None:
    """An evaluation restores the switches, so that later figures do not depend on whether predictions existed."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    seen = []

    class Model(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append([switch.allow_tf32 for switch in switches])
            return images

    for allowed in ("true", "false"):
        train = small_recipe(f"train.tf32={allowed}").train
        forward_for_evaluation(Model(), train, torch.device("cpu"))(torch.zeros(1, 3, 2, 2))
    assert seen == [[True, True], [False, False]]
    assert [switch.allow_tf32 for switch in switches] == before


@pytest.mark.parametrize("config", ["zero1", "zero3"])
def test_a_run_with_16_bit_weights_resumes_under_autocast(small_recipe, make_checkpoints, tmp_path, config) -> None:
    """A run with 16-bit weights resumes as `bf16`. Runs from before `bf16` meant autocast have such weights, too."""
    before = make_checkpoints(small_recipe(f"deepspeed.config={config}", "train.precision=bf16_weights"), tmp_path)
    train_steps(before, 1, 2)
    assert before.save(TrainState(step=2, samples=16))
    after = make_checkpoints(small_recipe(f"deepspeed.config={config}", "train.precision=bf16"), tmp_path)
    assert after.load().step == 2
    assert _by_name(after.engine.deepspeed) == _by_name(before.engine.deepspeed)
    norms = [train_once(run.engine, 3) for run in (before, after)]
    assert norms[1] == pytest.approx(norms[0], rel=5e-2)


def _by_name(engine: Any) -> dict[str, list[float]]:
    """Return the master weights by parameter, because the two precisions lay them out with different padding."""
    flat = {}
    for fragments, master in zip(shard_layout(engine), master_weights(engine), strict=True):
        for name, _, start, length in fragments:
            flat[name] = master.detach().view(-1)[start : start + length].tolist()
    return flat


# From the documentation of torch.use_deterministic_algorithms: on CUDA these add in no fixed order. So do convolutions
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
    "Swin": SWIN,
    "ConViT": CONVIT,
    "DeiT": ("model.name=deit_tiny_distilled_patch16_224", "model.image_size=32", "model.depth=1"),
}


@pytest.mark.parametrize("host", HOSTS)
def test_on_a_gpu_a_step_adds_in_a_fixed_order(small_recipe, make_engine, host) -> None:
    recipe = small_recipe(*HOSTS[host])
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


@pytest.mark.parametrize(("kind", "config"), [("softmax", "zero1"), ("karat", "zero0"), ("karat", "zero3")])
@pytest.mark.parametrize("host", ["ConViT", "Swin"])
def test_a_step_in_bf16_where_positions_and_masks_are_buffers(small_recipe, make_engine, host, kind, config) -> None:
    """A step under autocast to bf16 also takes float32 buffers, such as ConViT's positions and Swin's masks."""
    settings = (f"attention.kind={kind}", f"deepspeed.config={config}", "train.precision=bf16")
    recipe = small_recipe(*HOSTS[host], *settings)
    assert train_once(make_engine(recipe), 0, size=recipe.model.image_size) > 0


FP16 = ("train.precision=fp16", "deepspeed.cpu_adam=torch")
# Stages 1 and 2 share one optimizer; the other files are slow tests.
FP16_STAGES = ["zero1", *(pytest.param(config, marks=pytest.mark.slow) for config in CONFIGS[2:])]


@pytest.fixture
def allowed(monkeypatch) -> None:
    allow_fp16(monkeypatch.setattr)


def test_where_fp16_cannot_be_is_one_line_and_a_users_loss_scale_is_kept(small_recipe, make_engine, tmp_path) -> None:
    with pytest.raises(RecipeError, match="fp16 needs a GPU; on a CPU use fp32 or bf16"):
        make_engine(small_recipe(*FP16, "deepspeed.config=zero1"))
    with pytest.raises(RecipeError, match=r"fp16 needs ZeRO stage 1 or higher; use deepspeed\.config=zero1"):
        load_ds_config(small_recipe(*FP16), 1, 8)
    with pytest.raises(RecipeError, match=r"train\.on_nonfinite = stop .* use skip"):
        small_recipe(*FP16, "train.on_nonfinite=stop")
    for name in CONFIGS[1:]:
        config = load_ds_config(small_recipe(*FP16, f"deepspeed.config={name}"), 1, 8)
        assert (config["fp16"]["enabled"], config["bf16"]["enabled"]) == (True, False)
        assert config["data_types"]["grad_accum_dtype"] == "fp32"
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"zero_optimization": {"stage": 1}, "fp16": {"initial_scale_power": 12}}))
    config = load_ds_config(small_recipe(*FP16, f"deepspeed.config={own}"), 1, 8)
    assert config["fp16"] == {"initial_scale_power": 12, "enabled": True}
    for key in ("auto_cast", "fp16_master_weights_and_grads"):
        own.write_text(json.dumps({"zero_optimization": {"stage": 1}, "fp16": {key: True}}))
        with pytest.raises(RecipeError, match=rf"fp16\.{key} = true"):
            load_ds_config(small_recipe(*FP16, f"deepspeed.config={own}"), 1, 8)


@pytest.mark.parametrize("config", FP16_STAGES)
def test_steps_are_close_to_fp32s_from_the_same_masters(small_recipe, make_engine, allowed, config) -> None:
    half = make_engine(small_recipe(*FP16, f"deepspeed.config={config}"))
    full = make_engine(small_recipe(f"deepspeed.config={config}", "deepspeed.cpu_adam=torch"))
    assert next(half.module.parameters()).dtype == torch.float16
    assert half.loss_scale == 2**16
    assert full.loss_scale is None
    norms = [[train_once(engine, seed) for seed in range(3)] for engine in (half, full)]
    assert norms[0] == pytest.approx(norms[1], rel=2e-2)


@pytest.mark.parametrize("config", FP16_STAGES)
def test_overflows_are_skipped_lower_the_scale_and_resume_with_it(
    small_recipe, make_checkpoints, allowed, tmp_path, config
) -> None:
    recipe = small_recipe(*FP16, f"deepspeed.config={config}")
    run = make_checkpoints(recipe, tmp_path / "checkpoints")
    train_steps(run, 1)
    before = [master.detach().clone() for master in master_weights(run.engine.deepspeed)]
    for _ in range(2):  # the second lowers it: DeepSpeed's hysteresis
        run.engine.backward(run.engine.forward(torch.randn(8, 3, 16, 16)).sum() * 3e4)
        assert not math.isfinite(run.engine.step())
    assert run.engine.loss_scale == 2**15
    assert run.engine.take_skipped_steps() == 2
    assert all(map(torch.equal, before, master_weights(run.engine.deepspeed)))
    assert run.save(TrainState(step=3, samples=24), wait=True)
    again = make_checkpoints(recipe, tmp_path / "checkpoints")
    assert again.load() is not None
    assert again.engine.loss_scale == 2**15
    for one in (run, again):
        train_steps(one, 4, 5)
    assert equal(weights(run.engine), weights(again.engine))


@pytest.mark.parametrize("stage", [1, 3])
def test_a_step_at_which_the_loss_scale_grows_takes_the_whole_gradient(
    small_recipe, make_engine, allowed, tmp_path, stage
) -> None:
    own = tmp_path / "own.json"
    scale = {"initial_scale_power": 4, "loss_scale_window": 2}
    own.write_text(
        json.dumps({"zero_optimization": {"stage": stage}, "fp16": scale, "zero_allow_untested_optimizer": True})
    )
    engine = make_engine(small_recipe(*FP16, f"deepspeed.config={own}", "optim.clip_grad=0"))
    squares: list[float] = []

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        squares.extend(float(p.grad.double().square().sum()) for p in parameters if p.grad is not None)

    engine.deepspeed.basic_optimizer.register_step_pre_hook(note)
    scales = []
    for seed in range(5):
        squares.clear()
        norm = train_once(engine, seed)
        assert math.sqrt(math.fsum(squares)) == pytest.approx(norm, rel=1e-3)
        scales.append(engine.loss_scale)
    assert scales[-1] == 16 * 4
    assert scales == sorted(scales)


def test_overflows_at_the_least_scale_are_skipped_too(small_recipe, make_engine, allowed, tmp_path) -> None:
    own = tmp_path / "own.json"
    scale = {"initial_scale_power": 0, "hysteresis": 1}
    own.write_text(
        json.dumps({"zero_optimization": {"stage": 1}, "fp16": scale, "zero_allow_untested_optimizer": True})
    )
    engine = make_engine(small_recipe(*FP16, f"deepspeed.config={own}"))
    for _ in range(3):
        engine.backward(engine.forward(torch.randn(8, 3, 16, 16)).sum() * math.inf)
        assert not math.isfinite(engine.step())
    assert engine.loss_scale == 1
    assert train_once(engine, 1) > 0
