"""A run stays the same on more nodes, on fewer nodes, and after a node is lost."""

from pathlib import Path

import pytest

from tests.conftest import events, summary, wait_until
from tests.nvml import nvml_environment
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import submit
from tests.slurm.training import (
    OVERRIDES,
    SCRIPT,
    Train,
    assert_ends_like,
    process_of,
    relative_distance,
    run_of,
    wait_for,
)
from tests.training.runs import assert_same_run


def test_two_nodes_train_what_one_process_trains(on_two_nodes, uninterrupted) -> None:
    assert summary(on_two_nodes)["world_size"] == 2
    assert relative_distance(on_two_nodes, uninterrupted) < 1e-5
    assert summary(on_two_nodes)["data_digest"] == summary(uninterrupted)["data_digest"]


@pytest.mark.parametrize("keeps", [(), ("--no-kill",)], ids=["SLURM requeues", "the script requeues"])
def test_a_killed_node_brings_the_job_back(train, on_two_nodes, cluster, keeps) -> None:
    job = train(options=("--nodes=2", *keeps))
    wait_for(job, "checkpoint", 3)
    process_of(job, 1).suspend()  # otherwise the run may end before its node does
    cluster.kill_node(cluster.nodes[1])
    if not keeps:  # SLURM takes seconds to notice, and the script may be first
        cluster.command("scontrol", "update", f"NodeName={cluster.nodes[1]}", "State=DOWN", "Reason=power")
    try:
        wait_until(lambda: job.starts > 1 or job.ended, 120, "the job is requeued")
    finally:
        cluster.start_node(cluster.nodes[1])
    assert_ends_like(job, on_two_nodes)
    assert (f"lost {cluster.nodes[1]}; requeued" in job.log) == bool(keeps)


def test_a_spare_node_takes_the_place_of_a_lost_one(
    recipe: Path, shards: Path, on_two_nodes: Path, tmp_path: Path
) -> None:
    settings: dict[str, str | Path] = {"RECIPE": recipe, "SHARDS": shards, "RUN": tmp_path / "run", "SPARES": "1"}
    with Cluster(nodes=3) as three:
        job = submit(three, SCRIPT, *OVERRIDES, options=("--nodes=3", "--no-kill"), cwd=tmp_path, **settings)
        wait_for(job, "checkpoint", 1)
        rank = process_of(job, 1)
        rank.suspend()  # otherwise the run may end before its node does
        lost = rank.environ()["SLURMD_NODENAME"]  # srun chooses the node
        three.kill_node(lost)
        assert_ends_like(job, on_two_nodes)
        assert job.starts == 1
    assert f"lost {lost}; a spare node takes part" in job.log


def test_a_spare_node_takes_the_place_of_one_with_a_bad_gpu(
    recipe: Path, shards: Path, on_two_nodes: Path, tmp_path: Path
) -> None:
    settings: dict[str, str | Path] = {"RECIPE": recipe, "SHARDS": shards, "RUN": tmp_path / "run", "SPARES": "1"}
    with Cluster(nodes=3) as three:
        first = three.nodes[0]  # the batch script runs there
        settings |= nvml_environment(tmp_path, "ecc", first)
        job = submit(three, SCRIPT, *OVERRIDES, options=("--nodes=3", "--no-kill"), cwd=tmp_path, **settings)
        assert job.wait() == "COMPLETED 0", job.log
    assert_same_run(run_of(job), on_two_nodes)
    assert f"GPU 1 on {first}: 7 memory errors that ECC could not correct; a spare node takes part" in job.log
    exits = [file.read_text().split() for file in run_of(job).glob("logs/*/rank-*.exit")]
    assert sorted(node for _, node, _, _ in exits) == three.nodes[1:]


def test_it_continues_with_the_remaining_nodes(train, uninterrupted, cluster) -> None:
    job = train(options=("--nodes=1-2",))
    wait_for(job, "checkpoint", 3)
    process_of(job, 1).suspend()  # otherwise the run may end before its node does
    cluster.kill_node(cluster.nodes[1])
    try:
        assert job.wait() == "COMPLETED 0", job.log
    finally:
        cluster.start_node(cluster.nodes[1])
        cluster.wait_idle()
    assert "2 ranks on" in job.log
    assert events(run_of(job), "resume"), job.log
    assert summary(run_of(job))["world_size"] == 1
    assert relative_distance(run_of(job), uninterrupted) < 1e-5


def test_nodes_that_the_batch_does_not_divide_over_stay_idle(train: Train) -> None:
    # Each rank of two would have 3 images of 6, and mixup mixes pairs.
    job = train("train.global_batch=6", "train.max_steps=2", options=("--nodes=2",))
    assert job.wait() == "COMPLETED 0", job.log
    assert "takes 1 of 2 nodes" in job.log
    assert "1 ranks on" in job.log
    assert summary(run_of(job))["world_size"] == 1
