"""A run goes on at another world size and ZeRO stage as if nothing had happened."""

from dataclasses import replace
from pathlib import Path

import pytest

from karat_scale.engine.distributed import World
from tests.engine.stage_jobs import Job, launch_jobs, run_job
from tests.small_engines import CONFIGS, VARIANTS

SAVED = 3
SAMPLE = [
    ("zero0", "zero3"),
    ("zero1", "zero1"),
    ("zero2", "zero2_offload"),
    ("zero3", "zero3"),
    ("zero3_offload_params", "zero1"),
    ("zero3_offload", "zero0"),
]


def _check(world: World, tmp_path: Path, processes: int, pairs: list[tuple[str, str]], last: int) -> None:
    """1 to `processes`, `processes` to 1, and `processes` to itself, for each pair of configurations."""
    configs = list(dict.fromkeys(before for before, _ in pairs))
    places = {n: {config: str(tmp_path / f"{n}-{config}") for config in configs} for n in (1, processes)}

    def whole(n: int) -> list[Job]:
        return [Job(c, 1, last, save=places[n][c], save_at=SAVED) for c in configs]

    def resumed(n: int) -> list[Job]:
        return [Job(b, SAVED + 1, last, load=places[n][a]) for a, b in pairs]

    scratch = tmp_path / "alone"
    scratch.mkdir()
    alone = dict(zip(configs, (run_job(job, world, scratch) for job in whole(1)), strict=True))
    answers = launch_jobs([*whole(processes), *resumed(processes), *resumed(1)], processes, tmp_path / "together")
    together = dict(zip(configs, answers, strict=False))
    same, spread = answers[len(configs) :][: len(pairs)], answers[len(configs) + len(pairs) :]
    gathered = [run_job(job, world, scratch) for job in resumed(processes)]

    expected = alone[configs[0]]["losses"]
    for outcome in (*alone.values(), *together.values()):
        assert list(outcome["losses"].values()) == pytest.approx(list(expected.values()), rel=1e-5)
    after = {step: loss for step, loss in expected.items() if int(step) > SAVED}
    for (before, config), *outcomes in zip(pairs, same, spread, gathered, strict=True):
        for outcome in outcomes:
            assert outcome["losses"].keys() == after.keys()
            assert list(outcome["losses"].values()) == pytest.approx(list(after.values()), rel=1e-5), (before, config)
            assert outcome["ema_norm"] == pytest.approx(alone[before]["ema_norm"], rel=1e-5)
        if before == config:  # the same world and stage: the same bits
            whole_run = together[before]
            assert {key: outcomes[0][key] for key in ("raw", "ema")} == {key: whole_run[key] for key in ("raw", "ema")}
            assert all(whole_run["losses"][step] == loss for step, loss in outcomes[0]["losses"].items())


@pytest.mark.multiprocess
@pytest.mark.slow
def test_one_and_two_ranks_and_all_stages_take_over_from_each_other(world, tmp_path) -> None:
    _check(world, tmp_path, processes=2, pairs=SAMPLE, last=6)


def _exchange(tmp_path: Path, pairs: list[tuple[str, str]], last: int) -> None:
    """2 ranks to 4 and 4 to 2, for each pair of configurations."""
    configs = list(dict.fromkeys(before for before, _ in pairs))
    places = {n: {config: str(tmp_path / f"{n}-{config}") for config in configs} for n in (2, 4)}
    whole = {}
    for n in (2, 4):
        jobs = [Job(c, 1, last, save=places[n][c], save_at=SAVED) for c in configs]
        whole[n] = dict(zip(configs, launch_jobs(jobs, n, tmp_path / f"whole-{n}"), strict=True))
    for before, after in ((2, 4), (4, 2)):
        jobs = [Job(b, SAVED + 1, last, load=places[before][a]) for a, b in pairs]
        answers = launch_jobs(jobs, after, tmp_path / f"{before}-to-{after}")
        for (config, _), answer in zip(pairs, answers, strict=True):
            expected = whole[before][config]
            losses = [expected["losses"][step] for step in answer["losses"]]
            assert len(losses) == last - SAVED
            assert list(answer["losses"].values()) == pytest.approx(losses, rel=1e-5)
            assert answer["ema_norm"] == pytest.approx(expected["ema_norm"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_and_four_ranks_take_over_from_each_other(tmp_path) -> None:
    _exchange(tmp_path, SAMPLE, last=6)


@pytest.mark.night
@pytest.mark.timeout(3600)
@pytest.mark.multiprocess
@pytest.mark.parametrize("before", CONFIGS)
def test_two_and_four_ranks_and_every_pair_of_stages_over_fifty_steps(tmp_path, before) -> None:
    _exchange(tmp_path, [(before, after) for after in CONFIGS], last=SAVED + 50)


@pytest.mark.night
@pytest.mark.timeout(3600)
@pytest.mark.multiprocess
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("before", CONFIGS)
def test_every_pair_of_stages_over_fifty_steps(world, tmp_path, before, processes) -> None:
    _check(world, tmp_path, processes, [(before, after) for after in CONFIGS], last=SAVED + 50)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_ranks_resume_to_the_same_bits_at_every_stage(tmp_path, precision) -> None:
    _check_same_bits(tmp_path, {config: Job(config, precision=precision) for config in CONFIGS})


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_ranks_resume_every_variant_of_attention_to_the_same_bits(tmp_path, whole_zero3) -> None:
    _check_same_bits(tmp_path, {name: Job(whole_zero3, overrides=more) for name, more in VARIANTS.items()})


def _check_same_bits(tmp_path: Path, jobs: dict[str, Job]) -> None:
    """Two ranks that resume each job end as two that did it without a break."""
    whole = [replace(job, save=str(tmp_path / name), save_at=SAVED) for name, job in jobs.items()]
    resumed = [replace(job, first=SAVED + 1, load=str(tmp_path / name)) for name, job in jobs.items()]
    answers = launch_jobs([*whole, *resumed], 2, tmp_path / "together")
    for one, two in zip(answers[: len(jobs)], answers[len(jobs) :], strict=True):
        assert (one["raw"], one["ema"]) == (two["raw"], two["ema"])
        assert all(one["losses"][step] == loss for step, loss in two["losses"].items())
