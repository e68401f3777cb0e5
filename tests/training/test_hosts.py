"""Hosts that are no plain ViT, trained as a user starts them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from karat_scale.engine.engine import Engine
from karat_scale.recipe import Recipe
from tests.conftest import karat_done, summary
from tests.small_engines import equal
from tests.training.runs import STEPS, final_tensors, losses

CONVIT = ("model.name=convit_tiny", "model.depth=3", "attention.mode=universal")
SWIN = (
    "model.name=swin_mini_patch2_window4_32",
    "model.image_size=32",
    *(f"model.{size}=" for size in ("patch_size", "embed_dim", "depth", "num_heads")),
)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("host", "more"),
    [
        (CONVIT, ("deepspeed.config=zero1", "train.recompute.policy=attention", "optim.layer_decay=0.8")),
        (SWIN, ("deepspeed.config=zero3", "train.recompute.policy=every", "train.freeze=patch_embed.*")),
    ],
    ids=["convit", "swin"],
)
def test_a_run_that_lost_its_end_resumes_to_the_same_bits(
    recipe_file: Path, tmp_path: Path, host: tuple[str, ...], more: tuple[str, ...]
) -> None:
    overrides = (*host, *more, "model.drop_path=0.1", "checkpoint.every_steps=8")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    karat_done("train", str(recipe_file), f"run.dir={whole}", *overrides)
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / f"step-{STEPS:08d}")
    karat_done("train", str(recipe_file), f"run.dir={cut}", *overrides)
    assert summary(cut)["restarts"] == 1
    assert losses(cut) == losses(whole)
    assert equal(final_tensors(cut), final_tensors(whole))


@pytest.mark.multiprocess
@pytest.mark.parametrize(("kind", "config"), [("softmax", "zero1"), *(("karat", f"zero{stage}") for stage in range(4))])
@pytest.mark.parametrize("host", [CONVIT, SWIN], ids=["convit", "swin"])
def test_a_step_in_bf16_with_the_positions_and_masks_that_are_buffers(
    small_recipe: Callable[..., Recipe],
    make_engine: Callable[[Recipe], Engine],
    host: tuple[str, ...],
    kind: str,
    config: str,
) -> None:
    """DeepSpeed's own cast leaves buffers in float32."""
    settings = (f"attention.kind={kind}", f"deepspeed.config={config}", "train.precision=bf16")
    recipe = small_recipe(*host, *settings)
    engine = make_engine(recipe)
    logits = engine.forward(torch.randn(8, 3, recipe.model.image_size, recipe.model.image_size))
    engine.backward(torch.nn.functional.cross_entropy(logits, torch.arange(8) % 4))
    norm = engine.step()
    assert norm is not None
    assert norm > 0
