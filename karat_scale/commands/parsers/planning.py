"""The commands before training: recipes, plans, and a check of the machine. Each imports what it needs when it runs."""

import argparse
import sys
from typing import Any

from karat_scale.foundation.arguments import add_trust, count, new_file, positive
from karat_scale.foundation.errors import UserError
from karat_scale.foundation.machine import known_gpu

SECONDS = 20.0  # of the timed run of karat doctor


def add_commands(commands: Any) -> None:
    """Add the parsers of these commands."""
    recipes = commands.add_parser("recipes", help="list the shipped recipes: what each trains, needs and gave")
    recipes.add_argument("words", nargs="*", metavar="WORD", help="a recipe's name, or words that its text has")
    recipes.add_argument("--json", type=new_file, metavar="FILE", help="also write the list to this file")
    recipes.set_defaults(run=_recipes)

    explain = commands.add_parser("explain", help="say what a key of a recipe means, and what it may change")
    explain.add_argument("keys", nargs="*", metavar="KEY", help="a key, a section, or another tool's name for one")
    explain.add_argument("--detection", action="store_true", help="of the recipes of karat detect")
    explain.set_defaults(run=_explain)

    plan = commands.add_parser("plan", help="estimate memory, ZeRO stage, micro batch and time, and find mistakes")
    plan.add_argument("recipe", metavar="RECIPE", help="a shipped recipe's name or a YAML file")
    plan.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="such as train.precision=bf16")
    plan.add_argument("--gpus", type=count, default=1, help="total number of ranks (default: %(default)s)")
    plan.add_argument("--gpu", metavar="NAME", help="the GPU, such as h100-80 (default: this machine's RAM)")
    plan.add_argument("--memory", type=positive, metavar="GB", help="memory of an unknown GPU, or of a rank's RAM")
    plan.add_argument("--gpus-per-node", type=count, default=8, help="(default: %(default)s)")
    plan.add_argument("--cores-per-gpu", type=count, default=12, help="for decoding (default: %(default)s)")
    plan.add_argument("--step-time", type=positive, metavar="S", help="measured seconds of one micro batch on one GPU")
    plan.add_argument("--curve", action="store_true", help="show the predicted throughput from 1 to 1,024 GPUs")
    plan.add_argument("--dry-run", action="store_true", help="only build and check model, data and batches")
    plan.add_argument("--json", type=new_file, metavar="FILE", help="also write all figures to this file")
    plan.set_defaults(run=_plan)
    add_trust(plan)

    doctor = commands.add_parser("doctor", help="check this machine, and find what limits a recipe's speed on it")
    doctor.add_argument("recipe", metavar="RECIPE", nargs="?", help="a shipped recipe's name or a YAML file")
    doctor.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="such as data.workers=4")
    doctor.add_argument("--seconds", type=positive, help=f"length of the timed run (default: {SECONDS:g})")
    doctor.add_argument("--json", type=new_file, metavar="FILE", help="also write all figures to this file")
    doctor.set_defaults(run=_doctor)
    add_trust(doctor)

    completion = commands.add_parser("completion", help="print the lines that make a shell complete karat")
    completion.add_argument("shell", choices=("bash", "zsh", "fish"), help='in bash: eval "$(karat completion bash)"')
    completion.set_defaults(run=_completion)


def _recipes(options: argparse.Namespace) -> int:
    from karat_scale.recipe.catalog import list_recipes

    return list_recipes(options.words, options.json)


def _explain(options: argparse.Namespace) -> int:
    from karat_scale.recipe import Recipe
    from karat_scale.recipe.keys import explain

    if options.detection:
        from karat_scale.training.tasks.detection.recipe import DetectionRecipe

        return explain(options.keys, DetectionRecipe)
    return explain(options.keys, Recipe)


def _plan(options: argparse.Namespace) -> int:
    if options.gpu:
        known_gpu(options.gpu)  # before torch is imported
    from karat_scale.commands.plan.command import Request, plan_recipe

    if options.dry_run:
        if options.json:
            raise UserError("--dry-run makes no plan, so --json has nothing to write; leave one of them out")
        makes_a_plan = {"--curve": options.curve, "--gpu": options.gpu}
        makes_a_plan |= {"--memory": options.memory, "--step-time": options.step_time}
        if idle := [name for name, value in makes_a_plan.items() if value]:
            print(f"note: --dry-run makes no plan, so {', '.join(idle)} has no effect", file=sys.stderr)
    request = Request(
        gpus=options.gpus,
        gpus_per_node=options.gpus_per_node,
        cores_per_gpu=options.cores_per_gpu,
        gpu=options.gpu,
        memory=options.memory,
        step_time=options.step_time,
        with_curve=options.curve,
        only_dry_run=options.dry_run,
        json_file=options.json,
    )
    return plan_recipe(options.recipe, options.overrides, request)


def _doctor(options: argparse.Namespace) -> int:
    from karat_scale.commands.doctor.checkup import doctor

    if options.seconds and options.recipe is None:
        raise UserError("--seconds is the length of a recipe's timed run; name a RECIPE, or remove it")
    return doctor(options.recipe, options.overrides, options.seconds or SECONDS, options.json)


def _completion(options: argparse.Namespace) -> int:
    from karat_scale.commands.completion import shell_code

    print(shell_code(options.shell))
    return 0
