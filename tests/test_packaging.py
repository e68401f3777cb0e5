"""A wheel installed outside the clone finds its recipes, DeepSpeed configurations and compiled kernels."""

import ast
import functools
import importlib.metadata
import os
import platform
import re
import shutil
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from karat_scale.foundation.tables import EXTRAS
from tests.conftest import ROOT, SMALL, make_image_folder, output_of, run_to_end


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
    """Return the modules that the package imports, without its own and those of the standard library."""
    found = set()
    for path in (ROOT / "karat_scale").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module)
    return {name.partition(".")[0] for name in found} - sys.stdlib_module_names - {"karat_scale"}


def installed_by(requirements: list[str], seen: set[str] | None = None) -> Iterator[str]:
    """Yield the distributions that a list of requirements installs here, and those that these need in turn."""
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
    output_of(*build, env=os.environ | made_for)
    (wheel,) = tmp_path.glob("*.whl")
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    # The dependencies are this environment's; what is under test is our wheel, which is not in it.
    (site,) = home.glob("lib/python*/site-packages")
    here = [path for path in sys.path if path.endswith("site-packages")]
    python = str(home / "bin" / "python")
    output_of(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, env=None)
    # Not a .pth file: that would also bring in an editable install of the clone.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *here]), "OMP_NUM_THREADS": "1"}
    # Without a compiler on PATH, and with a cache that shows what was compiled.
    environment |= {"PATH": str(home / "bin"), "KARAT_CACHE_DIR": str(tmp_path / "cache")}
    in_it = functools.partial(run_to_end, cwd=tmp_path, env=environment)
    karat = home / "bin" / "karat"
    overrides = [*SMALL, "schedule.warmup_epochs=0", "data.backend=synthetic", "data.synthetic_samples=16"]
    overrides += ["run.dir=run", "train.max_steps=1", "deepspeed.config=zero1"]
    done = in_it(karat, "train", "imagenet_vit_tiny_g3b", *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("is not available" in done.stdout + done.stderr) != compiled
    assert not list(tmp_path.glob("cache/*.so"))
    assert str(home) in in_it(python, "-c", "import karat_scale; print(karat_scale.__file__)").stdout
    assert (tmp_path / "run" / "summary.json").is_file()
    images = make_image_folder(tmp_path / "images", {"train": 4, "val": 2})
    for command in (
        ("prepare", "webdataset", "--src", images, "--out", "shards"),
        ("prepare", "verify", "--src", "shards"),
        ("predict", "cifar10_karat", images / "val"),
    ):
        done = in_it(karat, *command)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "shards" / "dataset.json").is_file()
