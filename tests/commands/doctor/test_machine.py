"""What `karat doctor` says of a machine, on this one and on ones that lack something."""

import os
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from karat_scale.commands.doctor import machine as machine_checks
from karat_scale.commands.doctor.machine import examine_cache, examine_machine, nearest_existing, usable_cores
from karat_scale.commands.doctor.report import Finding, examine
from karat_scale.foundation import native_build
from karat_scale.foundation.errors import DataError, RecipeError
from karat_scale.foundation.tables import EXTRAS, Extra
from tests.conftest import ROOT, run_to_end


@pytest.fixture(scope="module")
def machine() -> dict[str, Finding]:
    return {finding.name: finding for finding in examine_machine()}


def test_this_machine_can_train(machine: dict[str, Finding]) -> None:
    assert not [finding for finding in machine.values() if finding.level == "problem"]
    assert machine["torch"].figures["version"] == machine_checks.installed_version("torch")
    assert machine["cores"].figures["usable"] == usable_cores() >= 1
    assert machine["RAM"].figures["usable_bytes"] > 0
    assert {"python", "driver", "GPU", "/dev/shm", "open files", "cache", "C++ compiler"} <= machine.keys()


def test_each_implementation_and_decoder_either_runs_or_says_why_not(machine: dict[str, Finding]) -> None:
    for kind, always, others in (
        ("attention", ("reference", "streaming"), ("cpu", "triton", "flex")),
        ("decoder", ("pillow", "torchvision"), ("native",)),
    ):
        assert all(machine[f"{kind} {name}"].figures["runs"] for name in always)
        assert machine[f"{kind} {machine[f'{kind} auto'].figures['chosen']}"].figures["runs"]
        for finding in (machine[f"{kind} {name}"] for name in others):
            assert finding.figures["runs"] != finding.value.startswith("cannot run")


def test_missing_extras_are_notes_and_the_command_that_installs_them_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hidden_library.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "hidden_library", None)  # hidden, as W&B is from timm
    rows = {"wandb": "hidden_library", "ffcv": "no_such_library", "dali": "nor_this"}
    monkeypatch.setattr(machine_checks, "EXTRAS", {name: Extra(module, (), name) for name, module in rows.items()})
    wandb, ffcv, dali, how, _ = machine_checks.examine_extras()
    assert (wandb.level, wandb.figures["present"]) == ("ok", True)
    assert [(one.level, one.value, one.fix) for one in (ffcv, dali)] == [
        ("note", "not installed", "needed for ffcv"),
        ("note", "not installed", "needed for dali"),
    ]
    assert how.value == "2 not installed"
    assert "libopencv-dev libturbojpeg0-dev pkg-config g++, then in the clone: pip install -e '.[ffcv]'" in how.fix


def test_the_pages_name_the_packages_that_ffcv_is_compiled_with() -> None:
    for page in ("docs/data.md", "Makefile"):
        words = (ROOT / page).read_text().replace("`", " ").replace(".", " ").split()
        assert set(EXTRAS["ffcv"].debian.split()) <= set(words)


def test_without_a_compiler_the_fix_names_the_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    compiler = list(machine_checks.examine_extras())[-1]
    assert compiler.level == "note"
    assert "g++ libjpeg-dev" in compiler.fix


def test_a_wheel_with_compiled_kernels_needs_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(native_build, "__file__", str(tmp_path / "foundation" / "native_build.py"))
    (tmp_path / "randaugment-plain.so").touch()
    compiler = list(machine_checks.examine_extras())[-1]
    assert (compiler.level, compiler.value) == ("ok", "not needed: the compiled kernels came with the package")


def test_a_library_that_is_missing_or_of_the_wrong_version_is_a_problem() -> None:
    missing = machine_checks.examine_library("karat-no-such-library", ">=1")
    assert (missing.level, missing.fix) == ("problem", "pip install 'karat-no-such-library>=1'")
    old = machine_checks.examine_library("numpy", ">=999")
    assert old.level == "problem"
    assert ">=999" in old.value


def test_the_wanted_versions_are_those_of_the_package() -> None:
    wanted = machine_checks.wanted_versions()
    assert wanted["timm"]
    assert set(machine_checks.LIBRARIES) <= wanted.keys()
    assert {finding.name for finding in machine_checks.examine_libraries()} == {*wanted, "python", "triton"}


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["torch", "psutil", "packaging", "pydantic", "rich"])
def test_no_missing_library_makes_it_crash(missing: str) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from karat_scale.commands.doctor.checkup import doctor\n"
        "sys.exit(doctor(None, [], 1.0, None))"
    )
    done = run_to_end(sys.executable, "-c", code)
    assert done.returncode == (0 if missing == "rich" else 1), done.stderr
    assert done.stderr == ""
    assert "C++ compiler" in done.stdout
    assert "cache" in done.stdout or missing == "psutil"


def test_a_failed_examination_is_a_finding_but_a_wrong_recipe_is_the_callers() -> None:
    def fail(error: Exception) -> list[Finding]:
        raise error

    (crashed,) = examine("part", lambda: fail(OSError("the driver\nis gone")))
    assert (crashed.level, crashed.name) == ("problem", "part")
    assert "OSError: the driver is gone" in crashed.value
    (data,) = examine("part", lambda: fail(DataError("no shards")))
    assert data.value == "no shards"
    with pytest.raises(RecipeError):
        examine("part", lambda: fail(RecipeError("wrong")))


def test_the_cache_must_be_a_directory(tmp_path: Path) -> None:
    assert examine_cache(tmp_path / "not" / "yet").level == "ok"
    assert not (tmp_path / "not").exists()
    (tmp_path / "file").touch()
    assert "KARAT_CACHE_DIR" in examine_cache(tmp_path / "file" / "cache").fix
    assert nearest_existing(tmp_path / "a" / "b") == tmp_path


def test_a_driver_that_does_not_answer_has_no_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(machine_checks, "DRIVER_FILE", tmp_path / "none")
    monkeypatch.setattr(machine_checks, "SMI_SECONDS", 0.1)
    assert machine_checks.driver_version() is None


TOO_OLD = "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver"
NONE = "No CUDA GPUs are available"


@pytest.mark.parametrize(
    ("driver", "cuda", "error", "shown", "value", "fix"),
    [
        (None, "13.0", "", None, "there is no NVIDIA driver", ""),
        ("580.65", None, "", None, "this torch is for CPUs only", "install torch for CUDA"),
        ("470.82", "13.0", TOO_OLD, None, "the driver 470.82 is too old for this torch", "update the driver"),
        ("470.82", "13.0", TOO_OLD, "0", "the driver 470.82 is too old for this torch", "update the driver"),
        ("580.65", "13.0", NONE, "", "CUDA_VISIBLE_DEVICES='' shows torch no GPU", "unset it"),
        ("580.65", "13.0", NONE, "7", "CUDA_VISIBLE_DEVICES='7' shows", "unset it"),
        ("580.65", "13.0", f"{NONE}\nmore", None, f"no GPU: {NONE}", "nvidia-smi"),
    ],
)
def test_each_reason_why_torch_sees_no_gpu_has_its_own_words(monkeypatch, driver, cuda, error, shown, value, fix):
    monkeypatch.setattr(torch.cuda, "init", Mock(side_effect=RuntimeError(error)))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    finding = machine_checks.no_gpu(driver, cuda)
    assert value in finding.value
    assert fix in finding.fix
    assert (finding.level == "problem") == bool(driver)
    assert len(f"{finding.value}{finding.fix}".splitlines()) == 1
