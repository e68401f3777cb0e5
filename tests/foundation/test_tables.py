"""The tables of parts: a row leads to its code, a part is one module and one row, and foreign parts need trust."""

import importlib
import inspect
import os
import re
import sys
from pathlib import Path

import pytest

from karat_scale.commands.plan.memory import Subject
from karat_scale.commands.plan.zero import Case, kept
from karat_scale.data.prepare import SCRIPTS
from karat_scale.engine.deepspeed_config import load_ds_config
from karat_scale.foundation import tables
from karat_scale.foundation.tables import VARIABLE
from karat_scale.recipe.loading import load_recipe
from tests.conftest import ROOT, SMALL, karat_here, karat_run_here, summary

MODULE = '''
import torch
from karat_scale.engine.optimizers import parameter_groups


def build_sgd(model, optim, device, groups=None):
    """SGD with momentum."""
    return torch.optim.SGD(groups or parameter_groups(model, optim), lr=optim.lr, momentum=0.9)
'''


def test_a_row_leads_to_its_code() -> None:
    images = tables.BACKENDS, tables.DECODERS
    for row in (
        row
        for table in (*images, tables.BASES, tables.OPTIMIZERS, tables.EXPORT_FORMATS, tables.TRACKERS)
        for row in table.values()
    ):
        assert callable(tables.load(row if isinstance(row, str) else row.place)), row


def test_a_bases_row_names_the_keys_that_its_constructor_takes() -> None:
    keys = {"grid", "degree", "range", "orders"}
    for row in tables.BASES.values():
        assert set(row.keys) == keys.intersection(inspect.signature(tables.load(row.place)).parameters)


def test_extras_are_those_of_the_project(tmp_path, monkeypatch) -> None:
    wanted = {row.extra for row in (*tables.BACKENDS.values(), *tables.TRACKERS.values()) if row.extra}
    named = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    assert wanted <= set(tables.EXTRAS) <= named
    assert tables.how_to_install("dali") == "in the clone: pip install -e '.[dali]'"
    assert tables.how_to_install("ffcv").startswith("apt-get install libopencv-dev ")
    for extra in tables.EXTRAS.values():
        for script in re.findall(r"karat prepare (\S+)", extra.needed_for):
            assert script in SCRIPTS
    monkeypatch.setattr(tables, "__file__", str(tmp_path / "site-packages/karat_scale/foundation/tables.py"))
    assert tables.how_to_install("dali").startswith("pip install 'WHEEL[dali]'")


def test_libraries_do_not_find_trackers_while_a_command_runs_but_we_do(monkeypatch) -> None:
    # timm imports W&B and DeepSpeed MLflow where they find them, which took a third of a start.
    for module in ("mlflow", "wandb"):
        monkeypatch.delitem(sys.modules, module, raising=False)
        installed = tables.is_installed(module)
        with tables.trackers_hidden():
            with pytest.raises(ModuleNotFoundError):
                importlib.import_module(module)
            assert tables.is_installed(module) == installed
        assert module not in sys.modules


@pytest.fixture
def with_sgd(tmp_path, monkeypatch) -> list[str]:
    """Add an optimizer's module and row; return a recipe's path that names it, and overrides that make it small."""
    (tmp_path / "parts_of_mine.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "parts_of_mine", raising=False)
    row = tables.OptimizerRow("parts_of_mine:build_sgd", states=("momentum_buffer",))
    monkeypatch.setitem(tables.OPTIMIZERS, "sgd", row)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "data: {backend: synthetic, synthetic_samples: 32}\nattention: {kind: karat}\noptim: {name: sgd, lr: 0.01}\n"
    )
    return [str(recipe), *SMALL, "schedule.warmup_epochs=0", "run.device=cpu", f"run.dir={tmp_path / 'run'}"]


@pytest.mark.slow
@pytest.mark.parametrize("config", ["zero0", "zero2", "zero3"])
def test_a_run_trains_and_resumes_with_an_optimizer_that_is_one_module_and_one_row(tmp_path, with_sgd, config) -> None:
    """An added optimizer trains and resumes; tests/test_contributing.py has the other kinds of parts."""
    for steps in (2, 4):
        done = karat_run_here("train", *with_sgd, f"train.max_steps={steps}", f"deepspeed.config={config}")
        assert done.returncode == 0, done.stderr
    assert (summary(tmp_path / "run")["steps"], summary(tmp_path / "run")["restarts"]) == (4, 1)


def test_plan_counts_what_the_row_of_an_optimizer_says(with_sgd) -> None:
    source, *overrides = with_sgd
    bytes_of = {}
    for name in ("sgd", "adamw"):
        recipe = load_recipe(source, [*overrides, f"optim.name={name}"])
        sizes = Subject(recipe, True).sizes
        bytes_of[name] = kept(Case(sizes, load_ds_config(recipe, 1, 8), recipe, 1, 1, True)).moments / sizes.total
    assert bytes_of == {"sgd": 4, "adamw": 8}


BASIS = """
from pathlib import Path
import karat_scale.attention.bases.fourier as fourier

Path(__file__).with_name("it_ran").touch()


class Foreign(fourier.Fourier):
    pass
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Return a run with a basis from a module beside it, as if the run had been downloaded."""
    folder = tmp_path_factory.mktemp("foreign")
    (folder / "foreign_basis.py").write_text(BASIS)
    data = "data: {backend: synthetic, synthetic_samples: 16}\nschedule: {warmup_epochs: 0}\n"
    (folder / "plain.yaml").write_text(data)
    (folder / "mine.yaml").write_text(f"{data}attention: {{kind: karat, basis: foreign_basis:Foreign}}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        own = (*SMALL, f"run.dir={folder / 'run'}", "train.max_steps=1")
        assert karat_here("train", str(folder / "mine.yaml"), *own) == 0
    return folder / "run"


@pytest.fixture
def foreign_run(trained, monkeypatch) -> Path:
    """Return the trained run, with its module on the path and not loaded."""
    monkeypatch.syspath_prepend(str(trained.parent))
    monkeypatch.delenv(VARIABLE, raising=False)
    forget(trained.parent)
    return trained


def forget(folder: Path) -> None:
    sys.modules.pop("foreign_basis", None)
    (folder / "it_ran").unlink(missing_ok=True)


LOOKS = [
    ("eval",),
    ("export",),
    ("analyze", "--only", "maps"),
    ("predict", "*.jpg"),
    ("train", "init_from"),
    ("train", "attention.transfer_from"),
    ("plan", "distill.from"),
]


@pytest.mark.parametrize("command", LOOKS, ids=" ".join)
def test_a_class_that_a_run_names_needs_trust(command, foreign_run, capsys) -> None:
    name, *more = command
    if name in ("train", "plan"):
        folder, start = foreign_run.parent, f"{more[0]}={foreign_run}"
        arguments = [name, str(folder / "plain.yaml"), *SMALL, start, f"run.dir={folder / 'other'}"]
    else:
        arguments = [name, str(foreign_run), *more]
    assert karat_here(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{foreign_run}/recipe.yaml: attention.basis = foreign_basis:Foreign runs the code" in line
    assert "add --trust or set KARAT_TRUST=1" in line
    assert not (foreign_run.parent / "it_ran").exists()


@pytest.mark.parametrize("by", ["option", "variable"])
def test_with_trust_it_runs(by, foreign_run, monkeypatch) -> None:
    monkeypatch.setitem(os.environ, VARIABLE, "1" if by == "variable" else "")
    assert karat_here("eval", str(foreign_run), *(["--trust"] if by == "option" else [])) == 0
    assert (foreign_run.parent / "it_ran").exists()


def test_an_exported_folder_needs_trust_too(foreign_run, monkeypatch, capsys) -> None:
    import timm

    import karat_scale.timm_models  # noqa: F401

    folder = foreign_run.parent / "folder"
    monkeypatch.setenv(VARIABLE, "1")
    assert karat_here("export", str(foreign_run), "--format", "timm", "--weights", "raw", "--out", str(folder)) == 0
    forget(foreign_run.parent)
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(Exception, match="foreign_basis:Foreign runs the code of the module foreign_basis"):
        timm.create_model(f"local-dir:{folder}", pretrained=True)
    capsys.readouterr()
    assert karat_here("predict", str(folder), "*.jpg") == 2
    refused = f"{folder}/model.safetensors: attention.basis = foreign_basis:Foreign runs the code"
    assert refused in capsys.readouterr().err
    assert not (foreign_run.parent / "it_ran").exists()
