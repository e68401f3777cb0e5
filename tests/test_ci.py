"""Tests of `.ci/run`, in a clone where `make` and Python only write down how they were called.

The hooks of a commit are tested, too, and GitHub's workflows that run `.ci/run` and `.ci/newest`.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT

GIT = ("git", "-c", "user.name=a", "-c", "user.email=a@b")
# The CI service's number of this run, by several services.
NUMBERS = ("CI_RUN_NUMBER", "GITHUB_RUN_NUMBER", "CI_PIPELINE_IID", "BUILD_NUMBER")
STUB = '#!/bin/sh\necho "$(basename "$0") $*" >> "$CALLS"\n'


@pytest.fixture
def ci(tmp_path: Path):
    """Return a function that runs the script and returns the calls that it made."""
    clone, calls = tmp_path / "clone", tmp_path / "calls"
    for name in ("bin/make", ".venv/bin/python"):
        stub = clone / name
        stub.parent.mkdir(parents=True)
        stub.write_text(STUB)
        stub.chmod(0o755)
    (clone / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", clone / ".ci")
    path = f"{clone / 'bin'}:{os.environ['PATH']}"

    def run(**variables: str) -> list[str]:
        calls.unlink(missing_ok=True)
        kept = {name: value for name, value in os.environ.items() if name not in NUMBERS}
        own = {"PATH": path, "CALLS": str(calls), "GIT_CEILING_DIRECTORIES": str(tmp_path)}
        environment = {**kept, **own, **variables}
        subprocess.run([clone / ".ci" / "run"], env=environment, check=True)
        return calls.read_text().splitlines()

    return run


def turn(calls: list[str]) -> int:
    (call,) = [call for call in calls if call.startswith("make test-turn ")]
    return int(call.split("TURN=")[1].split()[0])


def test_ci_runs_the_quick_tests_a_turn_of_the_slow_ones_and_the_demo(ci) -> None:
    called = [line.split()[1] for line in ci() if line.startswith("make ")]
    assert called == ["extras", "test", "test-aarch64", "test-turn", "demo"]


@pytest.mark.parametrize("name", NUMBERS)
def test_a_turn_is_the_number_of_the_ci_run(ci, name: str) -> None:
    assert [turn(ci(**{name: str(number)})) for number in (17, 18)] == [17, 18]


def test_without_a_number_a_turn_is_the_count_of_commits_or_else_the_hour(ci, tmp_path: Path) -> None:
    assert turn(ci()) > 400_000  # hours since 1970: this is no repository
    clone = tmp_path / "clone"
    subprocess.run([*GIT, "init", "-q"], cwd=clone, check=True)
    for commits in (1, 2):
        subprocess.run([*GIT, "commit", "-q", "--allow-empty", "-m", "x"], cwd=clone, check=True)
        assert turn(ci()) == commits
    subprocess.run([*GIT, "clone", "-q", "--depth=1", f"file://{clone}", tmp_path / "shallow"], check=True)
    shutil.rmtree(clone / ".git")
    (tmp_path / "shallow" / ".git").rename(clone / ".git")
    assert turn(ci()) > 400_000


def test_the_hooks_of_a_commit_are_programs_that_make_installs() -> None:
    pytest.importorskip("pre_commit_hooks", reason="`make hooks` installs it")
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    programs = {Path(hook["entry"].split()[0]) for hook in repo["hooks"]}
    assert {program.parent for program in programs} == {Path(".venv/bin")}
    installed = Path(sys.executable).parent
    assert [program.name for program in programs if not (installed / program.name).is_file()] == []


def test_the_workflows_fit_the_schema_and_run_our_scripts() -> None:
    pytest.importorskip("check_jsonschema", reason="needs the extra dev")
    files = sorted((ROOT / ".github" / "workflows").iterdir())
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", *files]
    subprocess.run(check, check=True)
    workflows = {file.stem: yaml.safe_load(file.read_text())["jobs"] for file in files}
    scripts = {name: next(iter(jobs.values()))["steps"][-1]["run"] for name, jobs in workflows.items()}
    assert scripts == {"ci": ".ci/run", "newest": ".ci/newest"}
    assert all(os.access(ROOT / script, os.X_OK) for script in scripts.values())
    badges = re.findall(r"actions/workflows/(\w+)\.yml/badge", (ROOT / "README.md").read_text())
    assert sorted(badges) == sorted(scripts)
