import pytest

from karat_scale.train.distributed import World, launch_environment


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (5, 8, 1)),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}, (3, 4, 1)),
        # The batch script and an salloc shell know the job's tasks, yet are one process.
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, (0, 1, 0)),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, (0, 1, 0)),
    ],
)
def test_ranks_are_read_from_the_launcher(environ: dict[str, str], expected: tuple[int, int, int]) -> None:
    assert launch_environment(environ) == expected


def test_one_process_agrees_with_itself(world: World) -> None:
    assert world.is_main
    assert world.any(True)
    assert not world.any(False)
    assert world.max(7) == 7
    assert world.broadcast("text") == "text"
    assert world.gather(3) == [3]
