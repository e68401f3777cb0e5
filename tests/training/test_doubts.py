"""The warnings, at the start of training, of settings that are allowed but that hardly anybody means."""

from pathlib import Path

import pytest

from karat_scale.training.run import doubts
from tests.conftest import SMALL, karat_says
from tests.small_engines import make_trainer

SIZES = ("model.patch_size=", "model.embed_dim=", "model.depth=", "model.num_heads=")
MOBILEVIT = ("model.name=mobilevit_xxs", "model.image_size=64", *SIZES)
RATE = (
    "schedule.min_lr = 1e-05 is above the peak learning rate, 7.81e-06, so the rate rises to the end; "
    "set schedule.min_lr=0, or optim.lr_batch=null, which uses optim.lr as it is"
)
AVERAGE = (
    "train.ema_decay = 0.9: the averaged weights are evaluated with the BatchNorm statistics of the raw ones; "
    "set train.eval_weights=raw or train.ema_decay=0"
)


def test_each_is_one_line_at_the_start(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("data: {backend: synthetic, synthetic_samples: 32}\n")
    own = (f"run.dir={tmp_path / 'run'}", "schedule.warmup_epochs=0", "train.max_steps=1")
    lines = karat_says("train", str(recipe), *SMALL, *MOBILEVIT, *own).splitlines()
    warned = [line.partition("warning: ")[2] for line in lines if "warning: " in line]
    assert warned == [RATE, AVERAGE]


@pytest.mark.parametrize(
    ("fixes", "left"),
    [
        (("schedule.min_lr=0",), [AVERAGE]),
        (("optim.lr_batch=null",), [AVERAGE]),
        (("train.eval_weights=raw",), [RATE]),
        (("train.ema_decay=0",), [RATE]),
    ],
)
def test_what_they_advise_ends_them(small_recipe, world, fixes: tuple[str, ...], left: list[str]) -> None:
    trainer = make_trainer(small_recipe(*MOBILEVIT, "data.workers=0", *fixes), world)
    assert list(doubts(trainer)) == left
    trainer.task.close()


@pytest.mark.parametrize(("steps", "left"), [(8, True), (9, False)])
def test_an_end_before_the_last_image_size_is_said(small_recipe, world, steps: int, left: bool) -> None:
    grows = ("schedule.image_sizes=[[0, 8], [2, 16]]", "train.epochs=3", f"train.max_steps={steps}")
    trainer = make_trainer(small_recipe("data.workers=0", "schedule.min_lr=0", *grows), world)
    said = "train.max_steps = 8 ends training before the images have 16 px, from step 8 on (schedule.image_sizes)"
    assert list(doubts(trainer)) == ([said] if left else [])
    trainer.task.close()


def test_a_model_without_batch_norm_may_be_averaged(small_recipe, world) -> None:
    trainer = make_trainer(small_recipe("data.workers=0", "schedule.min_lr=0"), world)
    assert list(doubts(trainer)) == []
    trainer.task.close()
