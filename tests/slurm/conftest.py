"""Everything here runs on a real SLURM and is marked slow, but for a fixed share that stays below 90 seconds."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.packages import SLURM, missing_reason

HERE = Path(__file__).parent
SHARE = {
    "test_two_nodes_run_a_step_and_know_each_other",
    "test_two_nodes_train_what_one_process_trains",
    "test_every_script_passes_shellcheck",
    "test_slurm_accepts_every_script_as_it_stands",
    "test_a_bad_partition_is_refused_at_submission",
    "test_a_mistake_in_the_settings_is_one_line",
    "test_outside_a_job_the_script_says_how_to_run_it",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents and item.name.partition("[")[0] not in SHARE:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes, up once for all tests."""
    reason = missing_reason(SLURM)
    if reason:
        pytest.skip(reason)
    with Cluster(nodes=2) as running:
        yield running
