"""A run that resumes at another world size or ZeRO stage has the results of an uninterrupted one."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.engine.stage_jobs import Job, launch_jobs
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


def hand_over(tmp_path: Path, worlds: tuple[int, int], pairs: list[tuple[str, str]], last: int) -> None:
    """Assert that runs resume from each of two world sizes at each of them, for each pair of configurations."""
    configs = list(dict.fromkeys(before for before, _ in pairs))
    places = {n: {config: str(tmp_path / f"{n}-{config}") for config in configs} for n in worlds}
    whole = {}
    for n in worlds:
        jobs = [Job(config, 1, last, save=places[n][config], save_at=SAVED) for config in configs]
        whole[n] = dict(zip(configs, launch_jobs(jobs, n, tmp_path / f"whole-{n}"), strict=True))
    everyone = [outcome["losses"] for n in worlds for outcome in whole[n].values()]
    for losses in everyone:
        assert losses == pytest.approx(everyone[0], rel=1e-5)
    for before, after in itertools.product(worlds, repeat=2):
        jobs = [Job(b, SAVED + 1, last, load=places[before][a]) for a, b in pairs]
        answers = launch_jobs(jobs, after, tmp_path / f"{before}-to-{after}")
        for (a, b), answer in zip(pairs, answers, strict=True):
            expected = whole[before][a]
            losses = {step: loss for step, loss in expected["losses"].items() if int(step) > SAVED}
            assert answer["losses"] == pytest.approx(losses, rel=1e-5), (before, after, a, b)
            assert answer["ema_norm"] == pytest.approx(expected["ema_norm"], rel=1e-5)
            if (before, a) == (after, b):  # the same bits
                assert answer["losses"] == losses
                assert (answer["raw"], answer["ema"]) == (expected["raw"], expected["ema"])


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("worlds", [(1, 2), (2, 4)])
def test_ranks_and_stages_take_over_from_each_other(tmp_path, worlds) -> None:
    hand_over(tmp_path, worlds, SAMPLE, last=6)


@pytest.mark.night
@pytest.mark.timeout(3600)
@pytest.mark.multiprocess
@pytest.mark.parametrize("worlds", [(1, 2), (1, 4), (2, 4)])
@pytest.mark.parametrize("before", CONFIGS)
def test_every_pair_of_stages_takes_over_for_fifty_steps(tmp_path, before, worlds) -> None:
    hand_over(tmp_path, worlds, [(before, after) for after in CONFIGS], last=SAVED + 50)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_ranks_resume_to_the_same_bits_at_every_stage(tmp_path, precision) -> None:
    _check_same_bits(tmp_path, {config: Job(config, precision=precision) for config in CONFIGS})


@pytest.mark.slow
@pytest.mark.multiprocess
def test_copies_within_a_node_follow_a_resume_and_the_average(tmp_path) -> None:
    """A resume and the average reach the copies within a node, from which DeepSpeed's hpZ gathers the weights.

    Before the fix, only a step renewed these copies.
    """
    config = json.loads((ROOT / "ds_configs/zero3.json").read_text())
    config["zero_optimization"]["zero_hpz_partition_size"] = 2
    (tmp_path / "hpz.json").write_text(json.dumps(config))
    _check_same_bits(tmp_path, {"hpz": Job(str(tmp_path / "hpz.json"))})
    plain, copies = launch_jobs([Job("zero3"), Job(str(tmp_path / "hpz.json"))], 2, tmp_path / "both")
    assert copies["ema"] == plain["ema"]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_ranks_resume_every_variant_of_attention_to_the_same_bits(tmp_path, whole_zero3) -> None:
    _check_same_bits(tmp_path, {name: Job(whole_zero3, overrides=more) for name, more in VARIANTS.items()})


def _check_same_bits(tmp_path: Path, jobs: dict[str, Job]) -> None:
    """Assert that two ranks that resume each job end with the same bits as two that were not interrupted."""
    whole = [replace(job, save=str(tmp_path / name), save_at=SAVED) for name, job in jobs.items()]
    resumed = [replace(job, first=SAVED + 1, load=str(tmp_path / name)) for name, job in jobs.items()]
    answers = launch_jobs([*whole, *resumed], 2, tmp_path / "together")
    for one, two in zip(answers[: len(jobs)], answers[len(jobs) :], strict=True):
        assert (one["raw"], one["ema"]) == (two["raw"], two["ema"])
        assert all(one["losses"][step] == loss for step, loss in two["losses"].items())
