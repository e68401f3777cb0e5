import copy

import pytest
import torch

from karat_scale.engine.deepspeed_internals import master_weights
from karat_scale.engine.engine import Engine
from karat_scale.engine.optimizers import build_optimizer
from karat_scale.models import create_model, no_weight_decay_names
from tests.compilers import needs_compiler
from tests.small_engines import CONFIGS, random_batch, train_once, weights

CLIPPED = [(config, 0.05) for config in (*CONFIGS, "zero3_large")]


@pytest.mark.parametrize(("config", "clip"), [*CLIPPED, ("zero0", 0.0), ("zero2", 0.0), ("zero3", 0.0)])
def test_steps_equal_plain_pytorch(small_recipe, make_engine, config, clip) -> None:
    recipe = small_recipe(f"deepspeed.config={config}", f"optim.clip_grad={clip}")
    engine = make_engine(recipe)
    torch.manual_seed(0)
    plain = create_model(recipe.model, recipe.attention)
    optimizer = build_optimizer(plain, recipe.optim, torch.device("cpu"))
    for seed in range(3):
        norm = train_once(engine, seed)
        images, labels = random_batch(seed)
        torch.nn.functional.cross_entropy(plain(images), labels).backward()
        expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), clip or float("inf"))
        for group in optimizer.param_groups:
            group["lr"] = 1e-2
        optimizer.step()
        optimizer.zero_grad()
        assert norm == pytest.approx(float(expected), rel=1e-5)
    for ours, theirs in zip(weights(engine), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-4, atol=1e-6)


def _mixed_precision_norms(recipe, clip: float) -> list[float]:
    """Return the gradient norms of plain mixed precision: a bf16 model, fp32 masters, and gradients cast to fp32."""
    torch.manual_seed(0)
    model = create_model(recipe.model, recipe.attention)
    optimizer = build_optimizer(model, recipe.optim, torch.device("cpu"))
    low = [p for group in optimizer.param_groups for p in group["params"]]
    masters = [torch.nn.Parameter(p.detach().clone()) for p in low]
    model.to(torch.bfloat16)
    remaining = iter(masters)
    for group in optimizer.param_groups:
        group["params"] = [next(remaining) for _ in group["params"]]
        group["lr"] = 1e-2
    norms = []
    for seed in range(3):
        images, labels = random_batch(seed)
        torch.nn.functional.cross_entropy(model(images.to(torch.bfloat16)).float(), labels).backward()
        for p, master in zip(low, masters, strict=True):
            master.grad, p.grad = p.grad.float(), None
        norms.append(float(torch.nn.utils.clip_grad_norm_(masters, clip)))
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(low, masters)
    return norms


# One file for each of DeepSpeed's optimizers is quick; the others are slow tests.
_OTHERS = (pytest.param(name, marks=pytest.mark.slow) for name in ("zero2", "zero3_offload", "zero3_offload_params"))


@pytest.mark.parametrize("config", ["zero1", "zero2_offload", "zero3", *_OTHERS])
def test_16_bit_weights_step_as_fp32_masters_do(small_recipe, make_engine, config) -> None:
    recipe = small_recipe(f"deepspeed.config={config}", "train.precision=bf16_weights", "optim.clip_grad=0.5")
    engine = make_engine(recipe)
    assert next(engine.module.parameters()).dtype == torch.bfloat16
    norms = [train_once(engine, seed) for seed in range(3)]
    assert norms == pytest.approx(_mixed_precision_norms(recipe, 0.5), rel=5e-3)


@pytest.mark.parametrize("config", [CONFIGS[1], *(pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS[2:])])
def test_bf16_gradients_add_up_in_fp32(small_recipe, world, make_engine, config) -> None:
    """One micro batch has a large gradient: in bf16, the sum would lose the small gradients of the others."""
    bf16 = (f"deepspeed.config={config}", "train.precision=bf16_weights", "optim.clip_grad=0")
    recipe = small_recipe(*bf16, "train.global_batch=64")
    torch.manual_seed(0)
    engine = Engine(create_model(recipe.model, recipe.attention), recipe, world, 1)
    image, label = torch.randn(1, 3, 16, 16), torch.tensor([1])
    for factor in [256.0] + [1.0] * 63:
        engine.backward(factor * torch.nn.functional.cross_entropy(engine.forward(image), label))
        norm = engine.step()
    single = make_engine(small_recipe(*bf16))
    single.backward(torch.nn.functional.cross_entropy(single.forward(image), label))
    assert float(norm) == pytest.approx(float(single.step()) * (256 + 63) / 64, rel=5e-3)


@pytest.mark.parametrize("mode", ["blockwise", "universal"])
@pytest.mark.parametrize(
    "config",
    [
        pytest.param("zero1", marks=pytest.mark.slow),
        "zero3",
        pytest.param("zero3_offload_params", marks=pytest.mark.slow),
    ],
)
def test_the_initial_weights_are_the_models_own(small_recipe, make_engine, config, mode) -> None:
    recipe = small_recipe(f"deepspeed.config={config}", f"attention.mode={mode}")
    torch.manual_seed(0)
    plain = create_model(recipe.model, recipe.attention)
    engine = make_engine(recipe)
    assert all(map(torch.equal, weights(engine), plain.parameters()))
    in_bf16 = make_engine(
        small_recipe(f"deepspeed.config={config}", f"attention.mode={mode}", "train.precision=bf16_weights")
    )
    pairs = zip(master_weights(engine.deepspeed), master_weights(in_bf16.deepspeed), strict=True)
    assert all(torch.equal(ours[: theirs.numel()], theirs[: ours.numel()]) for ours, theirs in pairs)
    names = [name for name, _ in engine.module.named_parameters()]
    qkv = weights(engine)[names.index("blocks.0.attn.qkv.weight")]
    assert float(qkv.std()) == pytest.approx(0.02, rel=0.1)  # timm's truncated normal
    assert engine.parameters == sum(parameter.numel() for parameter in plain.parameters())
    assert train_once(engine, 0) > 0


@needs_compiler
@pytest.mark.slow  # compiles for minutes where it is not in the cache
def test_deepspeeds_cpu_adam_steps_as_torchs(small_recipe, make_engine) -> None:
    norms = []
    for choice in ("torch", "deepspeed"):
        recipe = small_recipe("deepspeed.config=zero2_offload", f"deepspeed.cpu_adam={choice}")
        engine = make_engine(recipe)
        norms.append([train_once(engine, seed) for seed in range(3)])
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


def test_biases_norms_and_karat_parameters_get_no_decay_unless_asked(small_recipe) -> None:
    recipe = small_recipe()
    model = create_model(recipe.model, recipe.attention)
    exempt = no_weight_decay_names(model, decay_karat=False)
    assert {"pos_embed", "cls_token", "blocks.0.norm1.weight", "blocks.0.attn.operator.cos_coef"} <= exempt
    assert "blocks.0.attn.qkv.weight" not in exempt
    assert "blocks.0.attn.operator.cos_coef" not in no_weight_decay_names(model, decay_karat=True)
    optimizer = build_optimizer(model, recipe.optim, torch.device("cpu"))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]
    counted = sum(len(group["params"]) for group in optimizer.param_groups)
    assert counted == len(list(copy.copy(model).parameters()))
