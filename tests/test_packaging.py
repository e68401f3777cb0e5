"""A wheel installed outside the clone finds its recipes, DeepSpeed configurations and compiled kernels."""

import ast
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from karat_scale.foundation.tables import EXTRAS
from tests.conftest import ROOT, SMALL, make_image_folder


def test_every_package_it_imports_is_installed_with_it_or_by_an_extra_for_users() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    listed = dict(re.findall(r"^([a-z-]+) = \[(.*?)\]$", project, flags=re.MULTILINE | re.DOTALL))
    names = ["dependencies", *EXTRAS]
    installed = set(installed_by([line for name in names for line in re.findall(r'"(.+?)"', listed[name])]))
    providers = importlib.metadata.packages_distributions()
    missing = {
        module
        for module in imported_modules()
        if module in providers and not installed & {canonical(name) for name in providers[module]}
    }
    assert missing <= {"triton"}  # only torch for CUDA brings it; without it the kernels are not offered


def imported_modules() -> set[str]:
    """The modules outside of the standard library and of the package that its code imports."""
    found = set()
    for path in (ROOT / "karat_scale").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module)
    return {name.partition(".")[0] for name in found} - sys.stdlib_module_names - {"karat_scale"}


def installed_by(requirements: list[str], seen: set[str] | None = None) -> Iterator[str]:
    """The distributions that a list of requirements installs here, with those that these need."""
    seen = set() if seen is None else seen
    for requirement in map(Requirement, requirements):
        name = canonical(requirement.name)
        if name not in seen and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            seen.add(name)
            yield name
            try:
                yield from installed_by(importlib.metadata.requires(name) or [], seen)
            except importlib.metadata.PackageNotFoundError:  # an extra that is not installed here
                continue


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.slow
def test_a_wheel_trains_outside_the_clone(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    machine = platform.machine()
    compiled = bool(shutil.which(f"{machine}-linux-gnu-g++")) and Path("/usr/include/jpeglib.h").is_file()
    made_for = {"KARAT_WHEEL": machine} if compiled else {}
    subprocess.run(build, env=os.environ | made_for, check=True, capture_output=True, timeout=500)
    (wheel,) = tmp_path.glob("*.whl")
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    # The dependencies are this environment's; what is under test is our wheel, which is not in it.
    (site,) = home.glob("lib/python*/site-packages")
    here = [path for path in sys.path if path.endswith("site-packages")]
    python = str(home / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True, timeout=300)
    # Not a .pth file: that would also bring in an editable install of the clone.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *here]), "OMP_NUM_THREADS": "1"}
    # Without a compiler on PATH, and with a cache that shows what was compiled.
    environment |= {"PATH": str(home / "bin"), "KARAT_CACHE_DIR": str(tmp_path / "cache")}
    karat = [str(home / "bin" / "karat"), "train", "imagenet_vit_tiny_g3b"]
    overrides = [*SMALL, "schedule.warmup_epochs=0", "data.backend=synthetic", "data.synthetic_samples=16"]
    overrides += ["run.dir=run", "train.max_steps=1", "deepspeed.config=zero1"]
    done = subprocess.run(
        [*karat, *overrides], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("is not available" in done.stdout + done.stderr) != compiled
    assert not list(tmp_path.glob("cache/*.so"))
    where = subprocess.run(
        [python, "-c", "import karat_scale; print(karat_scale.__file__)"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(home) in where.stdout
    assert (tmp_path / "run" / "summary.json").is_file()
    images = make_image_folder(tmp_path / "images", {"train": 4, "val": 2})
    options = ["--src", str(images), "--out", str(tmp_path / "shards")]
    made = subprocess.run(
        [karat[0], "prepare", "webdataset", *options], cwd=tmp_path, env=environment, check=False, timeout=300
    )
    assert made.returncode == 0
    assert (tmp_path / "shards" / "dataset.json").is_file()
    checked = subprocess.run(
        [karat[0], "prepare", "verify", "--src", str(tmp_path / "shards")], env=environment, check=False
    )
    assert checked.returncode == 0
    predicted = subprocess.run(
        [karat[0], "predict", "cifar10_karat", str(images / "val")], cwd=tmp_path, env=environment, check=False
    )
    assert predicted.returncode == 0
