"""`karat verify` finds what differs from a run's training, and distinguishes it from rounding."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from karat_scale.checkpoint.store import MANIFEST, CheckpointStore, checkpoint_name, manifest_text, read_manifest
from karat_scale.checkpoint.tensor_storage import load_tensors, save_tensors
from karat_scale.commands.replay.command import _other_machine
from karat_scale.foundation.tables import VARIABLE
from karat_scale.recipe import AttentionConfig, DataConfig, ModelConfig, Recipe
from tests.conftest import SMALL, karat, karat_done, karat_here

QUICK = ("schedule.warmup_epochs=0", "data.workers=0", "log.every_steps=2", "model.drop_path=0.3", "train.max_steps=8")


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run with checkpoints after 3, 6 and 8 steps."""
    root = tmp_path_factory.mktemp("verify")
    (root / "small.yaml").write_text(f"data: {{path: {shards}}}\nattention: {{kind: karat}}\n")
    kept = ("checkpoint.every_steps=3", "checkpoint.keep_last=9", f"run.dir={root / 'run'}")
    assert karat_here("train", str(root / "small.yaml"), *SMALL, *QUICK, *kept) == 0
    return root / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """Return a copy of the run, which a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


Verify = Callable[..., tuple[int, str, dict[str, dict[str, object]]]]


@pytest.fixture
def verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Verify:
    """Return a function that runs `karat verify` and returns its exit code, output and figures."""

    def call(run: Path, *arguments: str) -> tuple[int, str, dict[str, dict[str, object]]]:
        file = tmp_path / "found.json"
        code = karat_here("verify", str(run), *arguments, "--json", str(file))
        return code, capsys.readouterr().out, json.loads(file.read_text())

    return call


@pytest.mark.parametrize(
    ("arguments", "segment", "lines"),
    [
        ((), "from step-00000006 to step-00000008", 1),
        (("--from", "3", "--to", "8"), "from step-00000003 to step-00000008", 2),
        (("--from", "0", "--to", "6"), "from the start to step-00000006", 4),
    ],
)
def test_an_honest_run_has_the_same_bits(trained, verify, arguments, segment, lines) -> None:
    code, said, found = verify(trained, *arguments)
    assert (code, found["verified"]) == (0, True)
    assert segment in said
    assert f"losses: the same bits in {lines} line" in said
    assert said.endswith("verified: the same bits\n")
    assert "note:" not in said
    assert {"data", "losses", "weights", "averages", "optimizer, exp_avg"} <= found.keys()


def test_a_branch_is_verified_from_where_it_began(trained, shards, tmp_path, monkeypatch, verify) -> None:
    """Before the fix, this trained all steps again and then ended for want of step 0."""
    branch, trunk = tmp_path / "branch", trained / "checkpoints" / "step-00000003"
    own = (f"run.dir={branch}", f"resume.from={trunk}", "train.max_steps=6", "checkpoint.every_minutes=null")
    assert karat_here("train", str(trained.parent / "small.yaml"), *SMALL, *QUICK, *own) == 0
    monkeypatch.setenv(VARIABLE, "1")
    code, printed, _ = verify(branch, "--from", "0")
    assert code == 0, printed
    assert "from the start to step-00000006" in printed


def test_a_step_without_a_checkpoint_and_data_that_have_moved_are_told(trained, run, capsys) -> None:
    for option in ("--from", "--to"):
        assert karat_here("verify", str(trained), option, "4") == 2
        assert f"error: {option} 4: no checkpoint has this step; choose 3, 6, 8\n" in capsys.readouterr().err
    recipe = run / "recipe.yaml"
    recipe.write_text(re.sub(r" path: \S+,", " path: /nowhere,", recipe.read_text(), count=1))
    assert karat_here("verify", str(run)) == 2
    said = "error: data.path = /nowhere is not a directory; put the data, or a link to them, there\n"
    assert said in capsys.readouterr().err


def test_a_machine_with_less_memory_is_told_in_one_line(trained, monkeypatch, capsys) -> None:
    def too_large(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1")

    monkeypatch.setattr("karat_scale.training.trainer.Trainer.resume", too_large)
    assert karat_here("verify", str(trained)) == 2
    assert "Tried to allocate 2.00 GiB; use as many ranks as the run had (karat launch" in capsys.readouterr().err


def test_a_changed_recipe_is_found(run, verify) -> None:
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("drop_path: 0.3", "drop_path: 0.2"))
    code, said, _ = verify(run)
    assert code == 1
    assert "note: recipe.yaml is not the one that the checkpoint was trained with" in said
    assert "NOT verified" in said


def change(run: Path, step: int, how: Callable[[dict[str, Any]], object]) -> None:
    """Change the content of a checkpoint, and write the hashes that fit it."""
    checkpoint = run / "checkpoints" / checkpoint_name(step)
    (file,) = checkpoint.glob("*model_states.pt")
    content = load_tensors(file)
    how(content)
    written = {**read_manifest(checkpoint), file.name: save_tensors(content, file)}
    (checkpoint / MANIFEST).write_text(manifest_text(written))
    assert CheckpointStore(checkpoint.parent).damage(checkpoint.name) is None


def claim_another_processor(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "processor": "another"}))


def test_a_line_of_the_log_at_another_step_is_found(run, verify) -> None:
    log = run / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    (last,) = [line for line in lines if (line["event"], line.get("step")) == ("train", 8)]
    last |= {"step": 7, "loss": 1e-4}
    log.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    code, said, _ = verify(run)
    assert code == 1
    assert "losses: metrics.jsonl has a line of step 7, which was not written again\n" in said


def test_the_states_of_the_optimizer_are_near_also_on_another_machine(run, verify) -> None:
    def forget(content: dict[str, Any]) -> None:
        for state in content["optimizer"]["state"].values():
            state["exp_avg"].zero_()

    change(run, 8, forget)
    claim_another_processor(run)
    code, said, found = verify(run)
    assert code == 1
    assert found["optimizer, exp_avg_sq"]["is_same"]
    assert "optimizer, exp_avg: " in said


def test_what_a_network_keeps_beside_its_weights_is_found(shards, tmp_path, verify) -> None:
    (tmp_path / "small.yaml").write_text(f"data: {{path: {shards}}}\nattention: {{kind: softmax}}\n")
    size = dict.fromkeys(("patch_size", "embed_dim", "depth", "num_heads"), "null")
    own = [f"model.{key}={value}" for key, value in (size | {"name": "mobilevit_xs", "image_size": "64"}).items()]
    own += [f"run.dir={tmp_path / 'run'}", "checkpoint.every_steps=1", "train.max_steps=2", "model.drop_path=0"]
    assert karat_here("train", str(tmp_path / "small.yaml"), *SMALL, *QUICK, *own) == 0
    assert verify(tmp_path / "run")[2]["buffers"]["is_same"]

    def forge(content: dict[str, Any]) -> None:
        for name, value in content["module"].items():
            if "running_mean" in name:
                value += 1.0

    change(tmp_path / "run", 2, forge)
    claim_another_processor(tmp_path / "run")
    code, _, found = verify(tmp_path / "run")
    assert code == 1
    assert found["weights"]["is_same"]
    assert not found["buffers"]["is_close"]


def test_a_manipulated_step_is_found_even_where_hashes_are_right_and_the_machine_is_another(run, verify) -> None:
    changed = []

    def push(content: dict[str, Any]) -> None:
        name, weight = next(iter(content["module"].items()))
        weight += 1e-3 * torch.sign(weight)
        changed.append(name)

    change(run, 6, push)
    claim_another_processor(run)
    code, said, found = verify(run, "--to", "6")
    assert code == 1
    assert "weights: 1 tensor differ, by " in said
    assert changed[0] in said
    assert found["losses"]["is_same"]
    code, said, found = verify(run, "--to", "8")  # trained from there, the next checkpoint is another one
    assert code == 1
    assert not found["losses"]["is_same"]


@pytest.mark.parametrize(
    ("attention", "model", "whats"),
    [
        ({}, {}, ["softmax attention"]),
        ({"kind": "karat", "softmax_heads": 1, "simplex": True}, {}, ["softmax attention", "attention.simplex"]),
        ({"kind": "karat", "simplex": "hidden"}, {}, ["attention.simplex"]),
        ({"kind": "karat"}, {"name": "mobilevit_xs"}, ["mobilevit_xs at 224 px"]),
    ],
)
def test_what_adds_in_no_fixed_order_on_a_gpu_may_round(attention, model, whats) -> None:
    data = DataConfig(backend="synthetic")
    recipe = Recipe(data=data, attention=AttentionConfig(**attention), model=ModelConfig(**model))
    found = _other_machine({}, recipe, SimpleNamespace(device=torch.device("cuda")))
    assert found == [f"{what} adds in no fixed order on a GPU" for what in whats]


def test_a_changed_image_is_found(image_folder, tmp_path, verify, shards) -> None:
    (tmp_path / "small.yaml").write_text("attention: {kind: karat}\n")
    data = Path(shutil.copytree(image_folder, tmp_path / "images"))
    own = ("data.backend=folder", f"data.path={data}", f"run.dir={tmp_path / 'run'}", "checkpoint.every_steps=4")
    assert karat_here("train", str(tmp_path / "small.yaml"), *SMALL, *QUICK, *own) == 0
    assert verify(tmp_path / "run", "--from", "0")[0] == 0
    pictures = sorted((data / "train").rglob("*.*"))
    shutil.copy(pictures[-1], pictures[0])
    code, said, found = verify(tmp_path / "run", "--from", "0")
    assert code == 1
    assert found["data"]["is_same"]  # the same samples, with other pixels
    assert "losses: 5 of 5 lines differ, by at most " in said


@pytest.mark.slow
@pytest.mark.multiprocess
def test_other_kernels_round_within_the_tolerance_and_other_ranks_are_refused(run, tmp_path, monkeypatch) -> None:
    refused = karat("verify", str(run), processes=2).stderr
    assert (
        "step-00000008 was written by 1 rank, and here 2 ranks would train; use karat launch --ranks 1 verify"
        in refused
    )
    file = tmp_path / "found.json"
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    claim_another_processor(run)
    done = karat_done("verify", str(run), "--from", "0", "--json", str(file))
    assert "processor another there" in done.stdout
    found = json.loads(file.read_text())
    assert not found["weights"]["is_same"]
    assert found["verified"]
