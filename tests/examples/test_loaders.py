"""The exact loader in other people's loops: killed anywhere, resumed on other ranks, nothing lost or repeated."""

import ast
import os
import re
import signal
import subprocess
import sys
import textwrap
from argparse import Namespace
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from examples.loaders.torchtitan_loader import ExactTokens, Tokens
from karat_scale.data import ExactLoader
from tests.conftest import ROOT, rank_environments

GLOBAL, EPOCHS = 12, 3  # as in the examples
MID_EPOCH = 8, 6  # the steps at which it is killed, and of its last checkpoint: an epoch has five
EPOCH_END = 11, 10


def run(command: list[str], ranks: int) -> tuple[list[int], str]:
    """Run an example on so many ranks; return their exit codes, and all that they printed."""
    environments = rank_environments(ranks)
    first: subprocess.Popen[str] | None = None
    processes = []
    for environment in environments:
        group = first.pid if first else 0
        processes.append(
            subprocess.Popen(
                [sys.executable, *command],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                preexec_fn=partial(os.setpgid, 0, group),
            )
        )
        first = first or processes[0]
    said = [process.communicate(timeout=300)[0] for process in processes]
    return [process.returncode for process in processes], "".join(said)


def steps(said: str) -> list[int]:
    return [int(number) for number in re.findall(r"^step (\d+) ", said, re.MULTILINE)]


EXAMPLES = [
    ("ddp", "torch", (2, 3), MID_EPOCH),
    ("timm_train", "timm", (2, 1), MID_EPOCH),
    ("accelerate_loop", "accelerate", (2, 1), MID_EPOCH),
    ("lightning_loop", "lightning", (2, 1), MID_EPOCH),
    ("lightning_loop", "lightning", (2, 1), EPOCH_END),
    ("torchdata_checkpoint", "torch", (2, 1), MID_EPOCH),
    ("torchtitan_loader", "torch", (1, 2), MID_EPOCH),
]


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(("example", "library", "ranks", "place"), EXAMPLES)
def test_a_killed_run_goes_on_with_the_next_sample_on_other_ranks(
    example, library, ranks, place, image_folder, tmp_path
):
    pytest.importorskip(library, reason=f"{library} is not installed: pip install -e '.[loaders]'")
    (before, after), (killed_at, saved_at) = ranks, place
    checkpoints = tmp_path / "run"
    checkpoints.mkdir()
    script = str(ROOT / f"examples/loaders/{example}.py")
    if example == "torchtitan_loader":
        data = tmp_path / "tokens"
        np.random.default_rng(0).integers(0, 100, 64 * 4 + 1, np.int32).tofile(data)
        whole = ExactLoader(Tokens(str(data), 4), global_batch=GLOBAL, epochs=EPOCHS, workers=0)
    else:
        data = image_folder
        mixes = {"randaugment": "rand-m9-mstd0.5-inc1", "mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1}
        augment = mixes if example == "timm_train" else None
        whole = ExactLoader(data, global_batch=GLOBAL, epochs=EPOCHS, workers=0, image_size=32, augment=augment)
    for _ in range(EPOCHS):
        for _ in whole:
            pass

    killer = str(Path(__file__).with_name("killed.py"))
    codes, said = run([killer, str(killed_at), script, str(data), str(checkpoints), "1"], before)
    assert codes == [-signal.SIGKILL] * before, said
    assert steps(said) == list(range(1, killed_at + 1))
    codes, said = run([script, str(data), str(checkpoints), "2"], after)
    assert codes == [0] * after, said
    assert steps(said) == list(range(saved_at + 1, whole.step + 1))
    assert f"digest {whole.digest}\n" in said


def test_the_changes_to_timms_train_py_work_with_its_defaults(image_folder, tmp_path):
    """The added lines of the list run one after another, as in timm's functions."""
    text = ast.get_docstring(ast.parse((ROOT / "examples/loaders/timm_train.py").read_text())) or ""
    lines = [(line[:1], line[1:]) for line in text.splitlines()]
    added = ["\n".join(line for _, line in part) for sign, part in groupby(lines, itemgetter(0)) if sign == "+"]
    make, resume, keep, _, update, count, loop, save = map(textwrap.dedent, added)
    names: dict[str, Any] = {
        "args": Namespace(
            data_dir=image_folder, workers=0, num_classes=4, aa=None, mixup=0.0, cutmix=0.0, smoothing=0.1
        ),
        "data_config": {"input_size": (3, 32, 32), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
        "mixup_active": False,
        "device": torch.device("cpu"),
        "GLOBAL_BATCH": GLOBAL,
        "ExactLoader": ExactLoader,
        "torch": torch,
        "saver": SimpleNamespace(),
        "lr_scheduler": SimpleNamespace(step_update=lambda number: told.append(number)),
        "save_state": {},
    }
    told: list[int] = []
    exec(make, names)
    length = len(names["loader_train"])
    for _ in range(2):
        exec(keep, names)
        names |= {"self": names["saver"], "loader": names["loader_train"]}
        exec(f"{count}\n{loop}\n    if loader.step == {length + 2}:\n        break", names)
    assert names["target"].dtype == torch.int64  # for LabelSmoothingCrossEntropy
    exec(save, names)
    names["args"].resume = tmp_path / "last.pth.tar"
    torch.save({**names["save_state"], "args": names["args"]}, names["args"].resume)
    exec(f"{make}\n{resume}\n{update}\nloader = loader_train\n{count}\n{loop}\n    break", names)
    assert (names["resume_epoch"], told, names["num_updates"], names["batch_idx"]) == (1, [length + 2], length + 2, 2)


def test_torchtitans_trainer_builds_the_loader_of_its_example(tmp_path):
    titan = pytest.importorskip("torchtitan", reason="torchtitan is not installed: pip install torchtitan")
    assert {kind.__module__ for kind in ExactTokens.__mro__} >= {"torchtitan.components.dataloader"}
    trainer = ast.parse((Path(titan.__path__[0]) / "trainer.py").read_text())
    [build] = (
        node
        for node in ast.walk(trainer)
        if isinstance(node, ast.Call) and "dataloader.build" in ast.unparse(node.func)
    )
    np.arange(41, dtype=np.int32).tofile(tmp_path / "tokens")
    sizes = {"dp_world_size": 1, "dp_rank": 0, "local_batch_size": 2, "seq_len": 4}
    config = ExactTokens.Config(dataset_path=str(tmp_path / "tokens"), global_batch=2, workers=0, epochs=1)
    loader = config.build(**{name.arg: sizes.get(name.arg) for name in build.keywords})
    for inputs, labels in loader:
        assert (inputs["input"] + 1).tolist() == labels.tolist()
    assert (loader.state_dict()["step"], labels.shape) == (5, (2, 4))
