"""`karat export --push` to a server with the hub's API, from which timm loads the model."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from karat_scale.commands.export.command import Source
from karat_scale.recipe import Recipe
from karat_scale.training.run_directory import OpenRun
from tests.commands.export.hub import TOKEN, Hub, serve
from tests.conftest import karat_environment, run_to_end

LOAD = """
import sys, timm, torch, karat_scale.timm_models
model = timm.create_model("hf-hub:jane/owls", pretrained=True).eval()
images = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    torch.save(model(images), sys.argv[1])
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve() as running:
        yield running


def here(hub: Hub, home: Path, *arguments: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    """Run Python with variables that make the hub's client use this server."""
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": token}
    return run_to_end(sys.executable, *arguments, env={**karat_environment(), **own})


@pytest.mark.slow
def test_timm_loads_what_was_pushed_and_what_the_hub_refuses_is_one_line(small_recipe, make_run, hub, tmp_path) -> None:
    run, *_ = make_run(small_recipe("attention.mode=universal"))
    push = ("-m", "karat_scale", "export", str(run), "--push", "jane/owls", "--private")
    assert "add --weights ema or raw" in here(hub, tmp_path, *push).stderr
    done = here(hub, tmp_path, *push, "--weights", "ema", token="hf_wrong")
    assert (done.returncode, "hf_wrong" in done.stdout + done.stderr) == (2, False)
    said, line = done.stderr.splitlines()
    assert said == "ema weights of step-00000003 ..."
    assert line.startswith("error: --push jane/owls: ")
    assert "401" in line
    done = here(hub, tmp_path, *push, "--weights", "ema", "--out", str(tmp_path / "owls"), token="hf_wrong")
    assert done.stderr.endswith(f"; remove {tmp_path / 'owls'} and run the same command again\n")
    done = here(hub, tmp_path, *push, "--weights", "ema")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{hub.url}/jane/owls"
    asked = hub.repositories["jane/owls"]
    assert "private" in (asked.get("visibility"), asked.get("private") and "private")
    assert hub.commits == ["Upload by karat export"]
    names = {path.removeprefix("jane/owls/") for path in hub.files}
    assert names == {"README.md", "SHA256SUMS", "config.json", "model.safetensors", "recipe.yaml"}
    assert TOKEN.encode() not in b"".join(hub.files.values())
    assert not list(run.glob("*hub*"))  # the folder that was uploaded is gone

    done = here(hub, tmp_path, "-c", LOAD, str(tmp_path / "logits.pt"))
    assert done.returncode == 0, done.stderr
    source = Source(OpenRun.at(run, Recipe, checkpoint="step-00000003"), "ema")
    images = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), source.model(images))
