"""Tests of what S depends on, with matrices of known shares."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from karat_scale.commands.analyze.trained_run import ValidationImages, open_run
from karat_scale.commands.cli import main
from karat_scale.models import create_model
from karat_scale.models.attention_matrices import Content, beyond_reach, content_of, reaches, watched
from karat_scale.models.layers import attention_layers
from karat_scale.models.transfer import Teacher, give_teacher
from karat_scale.recipe import AttentionConfig, ModelConfig
from tests.compilers import needs_kernels
from tests.conftest import SMALL, events
from tests.models.test_attention_matrices import SIZE


def measured(*batches):
    content = Content(1)
    for raw, learned in batches:
        content.add(0, raw, learned)
    return content


def test_a_constant_row_depends_on_nothing_and_noise_on_all():
    row = torch.randn(1, 2, 1, 9).expand(6, 2, 9, 9)
    assert measured((row, row)).figures()[0, :2] == pytest.approx([0, 0], abs=1e-12)
    matrix = torch.randn(1, 2, 9, 9).expand(6, 2, 9, 9)
    by_query, by_image, *_ = measured((matrix, matrix)).figures()[0]
    assert by_query > 0.5
    assert by_image == pytest.approx(0, abs=1e-12)
    noise = torch.randn(4000, 1, 9, 9)
    assert measured((noise, noise)).figures()[0, :2] == pytest.approx([8 / 9, 1], abs=0.01)


def test_batches_make_no_difference():
    raw, learned = torch.randn(6, 2, 9, 9), torch.randn(6, 2, 9, 9)
    whole, parts = measured((raw, learned)), measured(*zip(raw.split(4), learned.split(4), strict=True))
    np.testing.assert_allclose(parts.figures(), whole.figures())
    norms = torch.linalg.matrix_norm(learned).mean()
    np.testing.assert_allclose(parts.figures()[0, 3], norms, rtol=1e-6)


def test_scores_beyond_pi_are_counted():
    raw = torch.full((1, 1, 2, 2), math.pi)
    raw[0, 0, 0] = torch.tensor([4.0, -4.0])
    assert measured((raw, raw)).figures()[0, 2] == 0.5


CONVIT = SIZE.model_copy(update={"name": "convit_tiny", "depth": 4})
SWIN = ModelConfig(name="swin_mini_patch2_window4_32", image_size=32, num_classes=3)


def test_masked_pairs_do_not_lower_the_share_beyond_pi():
    torch.manual_seed(0)
    model = create_model(SWIN, AttentionConfig()).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=1.0 if "qkv.weight" in name else 0.3)
    images, expected, masked = torch.randn(2, 3, 32, 32), [], []

    def count(block: int, raw: torch.Tensor, _: torch.Tensor) -> None:
        mask = attention_layers(model)[block].block.attn_mask
        kept = raw if mask is None else raw[(mask == 0).repeat(len(images), 1, 1).unsqueeze(1).expand_as(raw)]
        expected.append(float((kept.abs() > math.pi).float().mean()))
        masked.append(kept.numel() < raw.numel())

    with watched(model, count), torch.no_grad():
        model(images)
    assert any(masked)
    assert content_of(model, model, images)["beyond_pi"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("host", [SIZE, CONVIT, SWIN], ids=["vit", "convit", "swin"])
@pytest.mark.parametrize(
    "section",
    [{"form": "content"}, {"form": "smooth", "modes": 4}, {"basis": "bspline", "range": 2.0}, {"softmax_heads": 1}],
    ids=["content", "smooth", "splines", "hybrid"],
)
def test_the_scores_beyond_what_the_functions_tell_apart_are_those_of_the_learned_heads(host, section) -> None:
    torch.manual_seed(0)
    model = create_model(host, AttentionConfig(kind="karat", rank=3, **section)).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=3.0 if "qkv.weight" in name else 0.3)
    images = torch.randn(2, 3, host.image_size, host.image_size)
    learned = {n for n, layer in enumerate(attention_layers(model)) if hasattr(layer.attention, "operator")}
    reach, first = 2.0 if "range" in section else math.pi, int("softmax_heads" in section)
    expected = []

    def count(block: int, raw: torch.Tensor, matrix: torch.Tensor) -> None:
        if block in learned:
            kept = raw[:, first:][raw[:, first:] != 0]  # masked pairs are 0
            expected.append(float((kept.abs() > reach).float().mean()))

    with watched(model, count), torch.no_grad():
        model(images)
    assert reaches(model) == dict.fromkeys(sorted(learned), reach)
    assert beyond_reach(model, model, images).tolist() == pytest.approx(expected, abs=1e-6)
    assert max(expected) > 0.05


@pytest.mark.parametrize(
    "section",
    [
        {},
        {"kind": "static"},
        {"kind": "karat", "scores": False},
        {"kind": "karat", "basis": "rational"},
        {"kind": "karat", "form": "project_first"},
    ],
)
def test_where_no_function_of_the_scores_ends_there_is_no_reach(section: dict[str, object]) -> None:
    assert reaches(create_model(SIZE, AttentionConfig(rank=3, **section))) == {}


@pytest.mark.parametrize(
    ("section", "expected"),
    [({"kind": "static"}, [True, False]), ({"kind": "karat", "scores": False}, [False, False]), ({}, [True, True])],
    ids=["static", "without scores", "softmax"],
)
def test_controls_depend_on_what_they_see(section, expected):
    torch.manual_seed(0)
    model = create_model(SIZE, AttentionConfig(rank=3, **section)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    content = Content(3)
    with watched(model, content.add), torch.no_grad():
        model(torch.randn(4, 3, 16, 16))
    assert ((content.figures()[:, :2] > 1e-6) == expected).all()


@needs_kernels
@pytest.mark.parametrize("transferred", [False, True], ids=["own", "transferred"])
@pytest.mark.parametrize("form", ["modular", "content", "smooth"])
def test_a_kernel_that_cannot_give_s_leaves_it_to_another(form: str, transferred: bool) -> None:
    """Another implementation gives S where the CPU kernel cannot: S needs values of width N, wider than the heads."""
    figures = []
    for implementation in ("cpu", "streaming"):
        torch.manual_seed(0)
        attention = AttentionConfig(kind="karat", form=form, rank=3, modes=4, implementation=implementation)
        model, images = create_model(SIZE, attention).eval(), torch.randn(2, 3, 16, 16)
        if transferred:
            teacher = Teacher(model)
            model = create_model(SIZE, AttentionConfig(transfer_from="there")).eval()
            give_teacher(model, teacher, "there")
        figures.append(content_of(model, model, images))
    assert figures[0] == {name: pytest.approx(values, abs=1e-4) for name, values in figures[1].items()}


def test_a_matrix_of_zeros_depends_on_nothing() -> None:
    model = create_model(SIZE, AttentionConfig(kind="static")).eval()
    for name, parameter in model.named_parameters():
        if "operator" in name:
            torch.nn.init.zeros_(parameter)
    figures = content_of(model, model, torch.randn(2, 3, 16, 16))
    assert figures["by_query"] == figures["by_image"] == figures["frobenius_norm"] == [0] * len(figures["by_query"])


def test_windows_that_see_unlike_parts_do_not_make_s_depend_on_the_image() -> None:
    """A static S does not depend on the image, although in a shifted block windows at the edge mask more pairs."""
    torch.manual_seed(0)
    model = create_model(SWIN, AttentionConfig(kind="static")).eval()
    figures = content_of(model, model, torch.randn(3, 3, 32, 32))
    assert figures["by_image"] == pytest.approx([0, 0, 0, 0], abs=1e-6)
    assert min(figures["by_query"]) > 0.5
    softmax = create_model(SWIN, AttentionConfig()).eval()
    for parameter in softmax.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    assert max(content_of(softmax, softmax, torch.randn(3, 3, 32, 32))["by_image"]) > 0.01


@pytest.mark.parametrize("stage", [pytest.param("zero0", marks=pytest.mark.slow), "zero3"])
def test_an_evaluation_in_training_reports_it(tmp_path: Path, stage: str) -> None:
    """An evaluation reports the figures of the evaluated weights on the first images, and TensorBoard shows them."""
    recipe, run = tmp_path / "r.yaml", tmp_path / "run"
    recipe.write_text(
        "data: {backend: synthetic, synthetic_samples: 32}\nattention: {kind: karat}\nschedule: {warmup_epochs: 0}\n"
    )
    own = (f"run.dir={run}", f"deepspeed.config={stage}", "train.eval_batch=16", "log.trackers=[tensorboard]")
    assert main(["train", str(recipe), *SMALL, *own]) == 0
    trained = open_run(run, checkpoint="latest")
    chosen = ValidationImages(trained.recipe, 16, tuple(range(16)))
    images, _ = next(chosen.batches(chosen.raw(16), torch.device("cpu")))
    model = trained.model()
    expected = content_of(model, model, images)
    found = events(run, "eval")[-1]["content"]
    assert found == {name: pytest.approx(values, rel=1e-4, abs=2e-6) for name, values in expected.items()}
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    for name, values in found.items():
        shown = [board.Scalars(f"content, {name}/block {block}")[-1].value for block in range(len(values))]
        assert shown == pytest.approx(values, rel=1e-6)
