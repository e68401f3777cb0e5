"""The cluster that the other tests stand on."""


def test_two_nodes_run_a_step_and_know_each_other(cluster) -> None:
    script = 'echo "$SLURM_PROCID $SLURMD_NODENAME $(scontrol show hostnames | xargs)"'
    shown = cluster.command("srun", "--immediate=10", "--nodes=2", "bash", "-c", script)
    assert sorted(shown.splitlines()) == ["0 127.0.0.1 127.0.0.1 127.0.0.2", "1 127.0.0.2 127.0.0.1 127.0.0.2"]
