"""Helpers that submit the shipped scripts as a user does, and show what became of the job."""

import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT, run_to_end, wait_until
from tests.slurm.cluster import Cluster

SCRIPTS = sorted(path.name for path in (ROOT / "slurm").glob("*.sh") if "#SBATCH" in path.read_text())
ON_CPU = ("--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=1")
END_SECONDS = 240


def submission(
    cluster: Cluster,
    script: str,
    options: tuple[str, ...],
    arguments: tuple[str, ...],
    settings: Mapping[str, str],
    cwd: Path,
) -> subprocess.CompletedProcess[str]:
    """Run `SETTINGS sbatch OPTIONS slurm/SCRIPT ARGUMENTS` in the directory `cwd`."""
    environment = {**cluster.environment, **settings}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    environment.pop("PYTHONPATH", None)
    command = ["sbatch", *options, str(ROOT / "slurm" / script), *arguments]
    return run_to_end(*command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, timeout=30)


@dataclass(frozen=True)
class Job:
    """A submitted job."""

    cluster: Cluster
    id: str
    output: Path

    @property
    def log(self) -> str:
        """Return what the job has printed so far, over all its starts."""
        return self.output.read_text() if self.output.is_file() else ""

    def fields(self, name: str) -> list[str]:
        """Return a field of `scontrol show job` for each task of an array."""
        shown = self.cluster.command("scontrol", "show", "job", self.id)
        found = re.findall(rf"\b{name}=(\S*)", shown)
        assert found, shown
        return found

    def field(self, name: str) -> str:
        """Return a field of `scontrol show job`; of an array, each different value once."""
        values = sorted(set(self.fields(name)))
        return " ".join(values)

    @property
    def ended(self) -> bool:
        final = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        return all(state in final for state in self.fields("JobState"))

    @property
    def starts(self) -> int:
        return int(self.field("Restarts")) + 1

    def wait(self, seconds: float = END_SECONDS) -> str:
        """Wait until the job has ended; return "STATE code"."""
        try:
            wait_until(lambda: self.ended, seconds, f"job {self.id} at its end")
        except AssertionError as error:
            shown = self.cluster.command("scontrol", "show", "job", self.id)
            raise AssertionError(f"{error}\n{shown}\n{self.log}\n{self.cluster.logs()}") from None
        return f"{self.field('JobState')} {self.field('ExitCode').partition(':')[0]}"

    def signal_batch(self) -> None:
        """Send USR2 to the batch script, as SLURM does before preemption or the time limit."""
        self.cluster.command("scancel", "--batch", "--signal=USR2", self.id)


def submit(
    cluster: Cluster, script: str, *arguments: str, options: tuple[str, ...] = (), cwd: Path, **settings: str | Path
) -> Job:
    """Submit a shipped script for CPU nodes."""
    cwd.mkdir(exist_ok=True)
    output = cwd / "job.out"
    done = submission(
        cluster,
        script,
        (*ON_CPU, f"--output={output}", "--parsable", *options),
        arguments,
        {name: str(value) for name, value in settings.items()},
        cwd,
    )
    assert done.returncode == 0, done.stderr
    return Job(cluster, done.stdout.strip(), output)
