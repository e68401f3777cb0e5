"""slurm/prepare_imagenet.sh by itself, without SLURM."""

import os
import re
import subprocess
import sys
from pathlib import Path

from karat_scale.data.shards.shard_format import read_dataset_record
from tests.conftest import ROOT
from tests.slurm.test_launch import stub


def test_a_split_is_joined_without_locks_and_the_users_workers_count(image_folder: Path, tmp_path: Path) -> None:
    # As on a shared file system that has no locks.
    stub(tmp_path, "flock", "echo 'flock: .lock: Function not implemented' >&2; exit 65")
    # In place of a container: notes what runs in it.
    stub(tmp_path, "note", f'echo "$@" >>{tmp_path}/noted; exec "$@"')
    kept = {key: value for key, value in os.environ.items() if key not in ("SPLITS", "KARAT_HOME")}
    shards = tmp_path / "shards"
    environment = {
        **kept, "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{kept['PATH']}", "CONTAINER": "note",
        "SLURM_JOB_ID": "813", "SLURM_ARRAY_JOB_ID": "812", "SLURM_ARRAY_TASK_ID": "1",
        "SLURM_CPUS_PER_TASK": "16", "IMAGES": str(image_folder), "SHARDS": str(shards),
    }  # fmt: skip
    command = ["bash", "slurm/prepare_imagenet.sh", "--workers", "1"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list(read_dataset_record(shards).splits) == ["val"]
    assert not list(shards.glob(".*"))
    (made,) = [line for line in (tmp_path / "noted").read_text().splitlines() if "make_webdataset" in line]
    # argparse takes the last of several.
    assert re.findall(r"--workers (\d+)", made)[-1] == "1"
