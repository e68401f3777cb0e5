"""An export gives the logits of the trained model when it is loaded again, and says what it is."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from torch import nn

import karat_scale.timm_models  # noqa: F401
from karat_scale.checkpoint.weights import load_weights
from karat_scale.commands.cli import main
from karat_scale.commands.export.command import Source, check_likeness, model_card
from karat_scale.foundation.errors import RunDirectoryError
from karat_scale.recipe import AttentionConfig, ModelConfig
from karat_scale.recipe.loading import text_digest
from karat_scale.training.run_directory import OpenRun, RunDirectory
from karat_scale.training.tasks.classification.distillation_teacher import build_model
from tests.commands.export.conftest import CLASSES
from tests.conftest import SMALL, karat_done, output_of
from tests.small_engines import SWIN, VARIANTS

MODELS = {
    "softmax": ("attention.kind=softmax",),
    "fourier": (),
    "universal": ("attention.mode=universal", "attention.softmax_heads=1"),
    "residual": ("attention.residual=true",),
    "convit": ("model.name=convit_tiny", "model.depth=3", "attention.mode=universal"),
    "swin": SWIN,
    "simplex": ("attention.simplex=true", "attention.base=gelu"),
    "hidden simplex": ("attention.simplex=hidden", "attention.gains=true"),
    "shannon": ("attention.basis=shannon",),
    "bspline": ("attention.basis=bspline", "attention.form=full_rank"),
    "two_operators": ("attention.form=two_operators", "attention.basis=rational"),
    "project_first": ("attention.form=project_first", "attention.basis=chebyshev"),
    **VARIANTS,
    "content swin": (*SWIN, "attention.form=content"),
}


def mostly_slow(*quick: str) -> list[Any]:
    """Return all models, with all but the `quick` ones marked as slow tests."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]


@pytest.fixture
def exported(small_recipe, make_run, tmp_path: Path):
    """Return a function that exports a run in a format.

    It returns the file or folder, the run with its averaged weights, and the logits of the model and of its traceable
    form.
    """

    def export(name: str, path: str, *overrides: str):
        run, *_ = make_run(small_recipe(*overrides))
        out = tmp_path / path
        assert main(["export", str(run), "--format", name, "--weights", "ema", "--out", str(out)]) == 0
        recipe = RunDirectory(run).recipe()
        source = Source(OpenRun(run, recipe, checkpoint="step-00000003"), "ema")
        with torch.no_grad():
            return out, source, source.model(images(source)), source.traceable_model()(images(source))

    return export


def images(source: Source, batch: int = 5) -> torch.Tensor:
    size = source.run.recipe.model.image_size
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def scalars(model: torch.nn.Module) -> int:
    """Return the number of values in parameters and buffers, where shared ones count once."""
    return sum(tensor.numel() for tensor in [*model.parameters(), *model.buffers()])


def check_facts(facts: dict[str, str], source: Source) -> None:
    assert facts == source.facts
    assert json.loads(facts["classes"]) == list(CLASSES)
    assert facts["recipe_sha256"] == text_digest(facts["recipe"])
    assert (facts["weights"], facts["step"], facts["top1"]) == ("ema", "3", "62.5")
    assert json.loads(facts["preprocessing"])["crop_pct"] == source.run.recipe.augment.eval_crop
    assert str(source.run.path.parent) not in json.dumps(facts)  # a path of this machine


@pytest.mark.parametrize(
    "model", mostly_slow("universal", "convit", "swin", "two_operators", "gated", "content", "smooth", "hidden simplex")
)
def test_timm_loads_a_folder(exported, model: str) -> None:
    folder, source, expected, _ = exported("hub-folder", "out/owls", *MODELS[model])
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(loaded(images(source)), expected)
    kinds = [[type(part).__name__ for part in model.modules()] for model in (loaded, source.model)]
    assert kinds[0] == kinds[1]  # and a shared module is there once
    with safe_open(folder / "model.safetensors", "pt") as file:
        check_facts(file.metadata(), source)
        assert sum(file.get_tensor(key).numel() for key in file.keys()) <= scalars(source.model)  # noqa: SIM118
    config = json.loads((folder / "config.json").read_text())
    check_facts(config["karat_scale"], source)
    assert loaded.pretrained_cfg["label_names"] == list(CLASSES)
    data = timm.data.resolve_model_data_config(loaded)
    assert (list(data["input_size"]), data["crop_pct"]) == (
        list(images(source).shape[1:]),
        source.run.recipe.augment.eval_crop,
    )
    assert (folder / "recipe.yaml").read_text() == source.facts["recipe"]
    sums = dict(line.split()[::-1] for line in (folder / "SHA256SUMS").read_text().splitlines())
    assert sums.keys() == {path.name for path in folder.iterdir()} - {"SHA256SUMS"}
    assert all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == sums[name] for name in sums)
    card = (folder / "README.md").read_text()
    assert "62.50 %" in card
    assert 'image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")' in card  # as karat predict does
    assert source.facts["weights_sha256"] in card


def test_timm_adapts_a_folder(exported) -> None:
    folder, source, *_ = exported("timm", "out", "attention.mode=universal")
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    name = f"local-dir:{folder}"
    larger = timm.create_model(name, pretrained=True, img_size=24, num_classes=7).eval()
    assert larger(torch.zeros(1, 3, 24, 24)).shape == (1, 7)
    assert torch.equal(larger.norm.weight, source.model.norm.weight)
    features = timm.create_model(name, pretrained=True, features_only=True, out_indices=(0, 1))
    assert [x.shape[-1] for x in features(images(source))] == [4, 4]
    assert timm.create_model(name, pretrained=True, num_classes=0)(images(source)).shape == (5, 32)
    with pytest.raises(ValueError, match="no argument window_size"):
        timm.create_model(name, window_size=7)
    with pytest.raises(ValueError, match="local-dir:FOLDER"):
        timm.create_model("karat")


@pytest.mark.slow
@pytest.mark.parametrize("model", mostly_slow("universal"))
def test_torch_export_needs_nothing_of_ours(exported, model: str, tmp_path: Path) -> None:
    file, source, _, expected = exported("torch-export", "owls.pt2", *MODELS[model])
    extra = {"karat_scale.json": ""}
    loaded = torch.export.load(file, extra_files=extra).module()
    assert (loaded(images(source)) - expected).abs().max() < 1e-5
    assert "karat_scale" not in loaded.code
    check_facts(json.loads(extra["karat_scale.json"]), source)
    if model == "universal":
        code = f"import sys, torch; m = torch.export.load({str(file)!r}).module(); x = torch.zeros(7, 3, 16, 16)\n"
        code += "print(m(x).shape, m(x[:1]).shape)\nassert not {'timm', 'karat_scale'} & set(sys.modules)"
        assert "[7, 4]) torch.Size([1, 4])" in output_of(sys.executable, "-c", code, cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("model", mostly_slow("universal"))
def test_onnxruntime_gives_the_logits(exported, model: str, capsys) -> None:
    onnx = pytest.importorskip("onnx", reason="needs the extra `export`")
    from karat_scale.commands.export.command import onnx_session

    file, source, expected, _ = exported("onnx", "owls.onnx", *MODELS[model])
    assert "logits within" in capsys.readouterr().out
    assert (onnx_session(str(file))(images(source)) - expected).abs().max() < 1e-4
    proto = onnx.load(file)
    check_facts({entry.key: entry.value for entry in proto.metadata_props}, source)
    onnx.checker.check_model(proto, full_check=True)
    own = sum(torch.Size(tensor.dims).numel() for tensor in proto.graph.initializer)
    assert own < 1.1 * scalars(source.model) + 1000  # what blocks share is there once


def test_a_difference_or_a_failure_is_one_line() -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    assert check_likeness(model, model, 2) == 0
    assert 0 < check_likeness(model, lambda images: model(images) + 1e-5, 2) < 2e-5
    for wrong in (lambda images: model(images) + 1e-2, lambda images: model(images) * float("nan")):
        with pytest.raises(RunDirectoryError, match=r"logits differ by .*; it is not written"):
            check_likeness(model, wrong, 2)
    with pytest.raises(RunDirectoryError, match=r"fails on a batch of 3: .*; it is not written"):
        check_likeness(model, lambda images: model(images.view(1, 12).view(1, 3, 2, 2)), 2)


FACTS = {
    "model": ModelConfig().model_dump_json(),
    "preprocessing": json.dumps(
        {"input_size": [3, 16, 16], "crop_pct": 1, "interpolation": "bicubic", "mean": 0, "std": 1}
    ),
    "recipe_sha256": "0",
    "weights_sha256": "1",
    "karat_scale": "2",
    "weights": "ema",
    "step": "3",
}
KARAT = "[Kolmogorov-Arnold attention](https://arxiv.org/abs/2503.10632)"


@pytest.mark.parametrize(
    ("attention", "said"),
    [
        ({}, "softmax attention"),
        (
            {"kind": "karat", "simplex": True, "residual": True, "softmax_heads": 2},
            f"{KARAT} (fourier, modular, blockwise, grid 3, rank 12, on the simplex, residual, 2 softmax heads)",
        ),
        (
            {"kind": "karat", "scores": False},
            f"a variant of {KARAT} (fourier, modular, blockwise, grid 3, rank 12, without scores)",
        ),
        ({"kind": "static", "mode": "universal"}, "a learned constant matrix as attention (universal)"),
        ({"kind": "softmax_bias"}, "softmax attention with a learned position bias (blockwise)"),
        (
            {"kind": "query_only", "grid": 2},
            "learned functions of the query alone as attention (blockwise, grid 2, rank 12)",
        ),
        ({"kind": "mine:Mean"}, "attention of the class mine:Mean (blockwise)"),
    ],
)
def test_the_attention_is_that_of_the_recipe(attention: dict[str, object], said: str) -> None:
    facts = {**FACTS, "attention": AttentionConfig(**attention).model_dump_json()}
    model = "vit_tiny_patch16_224, 224 px"
    assert f"A model ({model}) with {said}, 6 parameters and " in model_card(facts, nn.Linear(2, 2), "owls")


QUICK = ("train.max_steps=1", "schedule.warmup_epochs=0", "checkpoint.every_minutes=null", "data.backend=synthetic")


@pytest.mark.slow
def test_a_student_takes_its_teacher_along(tmp_path: Path, capsys) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text("{}")
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    kinds = {teacher: "attention.kind=karat", student: f"attention.transfer_from={teacher}"}
    for run, kind in kinds.items():
        karat_done("train", str(recipe), *SMALL, *QUICK, kind, f"run.dir={run}")
    directory = RunDirectory(student)
    name = directory.store.names()[0]
    model = build_model(directory.recipe(), student)
    load_weights(model, directory.store.root / name, directory.store.state(name), ema=True)
    images = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        expected = model.eval()(images)
    options = ["export", str(student), "--checkpoint", "latest", "--weights", "ema", "--format"]
    assert main([*options, "torch-export", "--out", str(tmp_path / "own.pt2")]) == 0
    torch.testing.assert_close(torch.export.load(tmp_path / "own.pt2").module()(images), expected)
    pytest.importorskip("onnx", reason="needs the extra `export`")
    from karat_scale.commands.export.command import onnx_session

    assert main([*options, "onnx", "--out", str(tmp_path / "own.onnx")]) == 0
    torch.testing.assert_close(onnx_session(str(tmp_path / "own.onnx"))(images), expected)
    assert main([*options, "hub-folder", "--out", str(tmp_path / "own")]) == 2
    assert "it uses its teacher's attention matrices" in capsys.readouterr().err
    assert not (tmp_path / "own").exists()
