"""Without --trust, no command runs or opens what somebody else's run, checkpoint, weights or data name."""

import io
import itertools
import json
import random
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from karat_scale.commands.cli import build_parser
from karat_scale.data.streams import StreamShards, read_tar
from karat_scale.foundation.errors import DataError, UserError
from karat_scale.foundation.tables import VARIABLE
from karat_scale.recipe import DataConfig
from karat_scale.recipe.loading import load_recipe
from tests.conftest import SMALL, karat_here, made_once
from tests.data.tars import write_stream
from tests.faults.foreign import DATA, MODULE, Effects, as_value, hostile_values, text_keys, watched

STEPS = 3
QUICK = ("schedule.warmup_epochs=0", "data.workers=0", "checkpoint.every_steps=1", "checkpoint.keep_last=9")
PLAIN = ("data.backend=synthetic", "data.synthetic_samples=16", "data.workers=0", "schedule.warmup_epochs=0")


def demo(run: Path, here: Path) -> int:
    """Do what `karat demo` does before it waits for pictures; return the exit code."""
    from karat_scale.commands.predict.command import open_classifier

    try:
        open_classifier(str(run), "best", "auto")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def begins_with(key: str, *more: str) -> Callable[[Path, Path], list[str]]:
    return lambda run, here: ["train", *_plain(here, f"{key}={run}"), *more]


def _plain(here: Path, *overrides: str) -> list[str]:
    return [str(here / "plain.yaml"), *SMALL, *PLAIN, f"run.dir={here / 'own'}", "train.max_steps=1", *overrides]


# The arguments of each command, given the run and a directory with the user's own recipe.
LOOKS: dict[str, Callable[[Path, Path], list[str]] | Callable[[Path, Path], int]] = {
    "eval": lambda run, here: ["eval", str(run)],
    "eval on": lambda run, here: ["eval", str(run), "--on", str(here / "images" / "val"), "--name", "other"],
    "export": lambda run, here: ["export", str(run), "--weights", "raw"],
    "export folder": lambda run, here: ["export", str(run), "--format", "timm", "--weights", "raw"],
    "analyze": lambda run, here: ["analyze", str(run), "--only", "maps", "training", "--images", "2"],
    "predict": lambda run, here: ["predict", str(run), str(next((here / "images" / "val").rglob("*.jpg")))],
    "demo": demo,
    "replay": lambda run, here: ["replay", str(run), "3", "--out", str(here / "x.png")],
    "replay from the start": lambda run, here: ["replay", str(run), "1", "--out", str(here / "x.png")],
    "verify": lambda run, here: ["verify", str(run)],
    "verify from the start": lambda run, here: ["verify", str(run), "--from", "0"],
    "compare": lambda run, here: ["compare", str(run), str(run), "--out", str(here / "compared")],
    "status": lambda run, here: ["status", str(run), "--once"],
    "track": lambda run, here: ["track", str(run)],
    "sweep": lambda run, here: ["sweep", *_plain(here), "run.seed=0,1", "--out", str(run.parent), "--print"],
    "plan": lambda run, here: ["plan", *_plain(here, f"run.dir={run}"), "--gpus", "1"],
    "plan with its teacher": lambda run, here: ["plan", *_plain(here, f"distill.from={run}"), "--gpus", "1"],
    "convert": lambda run, here: ["convert", str(run), *_plain(here, "convert.images=4", "convert.steps=1")],
    "init_from": begins_with("init_from"),
    "init_from a checkpoint": lambda run, here: begins_with("init_from")(run / "checkpoints" / "best", here),
    "distill.from": begins_with("distill.from"),
    "transfer_from": begins_with("attention.transfer_from", "attention.kind=softmax"),
    "resume.from": begins_with("resume.from"),
    "train in its directory": begins_with("run.dir"),
}
# These read no run that somebody else wrote. Some, such as `doctor`, read the recipe on the command line.
OTHERS = {"prepare", "index", "show", "data", "doctor", "submit", "recipes", "explain", "detect", "launch", "fetch"}
OTHERS |= {"bench", "completion", "quickstart"}


def test_each_command_is_here_or_reads_no_run() -> None:
    (commands,) = (action.choices for action in build_parser()._actions if isinstance(action.choices, dict))
    tried = {name.partition(" ")[0] for name in LOOKS} | {"train"}
    assert set(commands) - OTHERS <= tried, set(commands) - OTHERS - tried


class Attack:
    """A run with a hostile recipe, the folder `outside` that nothing may touch, and the user's directory."""

    def __init__(self, root: Path, trained: Path, shards: Path) -> None:
        self.outside, self.here, self.runs = root / "outside", root / "here", root / "runs"
        self.recipe = load_recipe(trained / "recipe.yaml")
        for folder in (self.outside, self.here, self.runs):
            folder.mkdir()
        shutil.copytree(trained, self.outside / "run")
        self.trained = trained
        tar = next(iter(sorted(shards.glob("*.tar"))))
        shutil.copy(tar, self.outside / "secret.tar")
        (self.outside / "secret.yaml").write_text("model: {depth: 1}\n")
        (self.outside / "secret.json").write_text("{}")
        weights = next(iter(sorted((trained / "snapshots").glob("*.safetensors"))), None)
        for name in ("secret.safetensors", "secret.pth"):
            shutil.copy(weights or tar, self.outside / name)
        (self.outside / f"{MODULE}.py").write_text(f"open({str(self.outside / 'pwned')!r}, 'w')\nclass Foreign: pass\n")
        (self.here / "plain.yaml").write_text("data: {path: x}\nattention: {kind: karat}\n")

    def run(self, name: str, change: Callable[[Path], object]) -> tuple[int, Effects, str]:
        """Run a command on a run that `change` made hostile; return its exit code, its effects and its errors."""
        for folder in (self.runs, self.here / "own"):
            shutil.rmtree(folder, ignore_errors=True)
        run = self.runs / "run"
        shutil.copytree(self.trained, run, symlinks=True)
        change(run)
        errors = io.StringIO()
        with watched(self.outside) as effects, redirect_stderr(errors), redirect_stdout(io.StringIO()):
            call = LOOKS[name](run, self.here) if name != "demo" else demo(run, self.here)
            code = karat_here(*call) if isinstance(call, list) else call
        return code, effects, errors.getvalue()


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory) -> Path:
    """Return a run of three steps on a stream of tars, with a checkpoint of each step."""

    def train(root: Path) -> None:
        tars = write_stream(root / "tars", (9, 11), classes=4)
        data = {"path": str(shards), "order": "stream", "stream": f"{tars}/{{0..1}}.tar", "stream_samples": 64}
        (root / "theirs.yaml").write_text(json.dumps({"data": data, "attention": {"kind": "karat"}}))
        run = [f"run.dir={root / 'run'}", f"train.max_steps={STEPS}"]
        assert karat_here("train", str(root / "theirs.yaml"), *SMALL, *QUICK, *run) == 0

    return made_once(tmp_path_factory, "foreign-run", train) / "run"


@pytest.fixture
def attack(trained, shards, image_folder, tmp_path, monkeypatch) -> Attack:
    made = Attack(tmp_path, trained, shards)
    (made.here / "images").symlink_to(image_folder)
    monkeypatch.chdir(made.here)
    monkeypatch.syspath_prepend(str(made.outside))
    set_variables(monkeypatch, made.outside)
    return made


def set_variables(monkeypatch: pytest.MonkeyPatch, outside: Path) -> None:
    """Set the environment variables that the hostile values name."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("HOME", str(outside))
    command = f"pipe:touch {outside}/pwned"
    for variable, value in {
        "PIPE": "pipe",
        "ALL": command,
        "DEEP": "${ALL}",
        "MODULE": MODULE,
        "SECRET": "s3cret",
    }.items():
        monkeypatch.setenv(f"WDS_{variable}", value)


def with_recipe(attack: Attack, values: dict[str, str]) -> Callable[[Path], object]:
    """Return a change that writes hostile values into the recipe of a run, whatever the schema says."""

    def change(run: Path) -> None:
        tree = yaml.safe_load((run / "recipe.yaml").read_text())
        for key, text in values.items():
            *sections, leaf = key.split(".")
            section: Any = tree
            for name in sections:
                section = section[name]
            section[leaf] = as_value(attack.recipe, key, text)
        (run / "recipe.yaml").write_text(yaml.safe_dump(tree))

    return change


def tried(attack: Attack, name: str, values: dict[str, str]) -> str:
    """Return what is wrong with how a command handled a hostile recipe."""
    code, effects, errors = attack.run(name, with_recipe(attack, values))
    may_read = any(key in DATA for key in values)
    found = effects.found(may_read)
    if code not in (0, 2):
        found.append(f"exit code {code}: {errors[-300:]}")
    return "; ".join(found)


def product(attack: Attack) -> list[dict[str, str]]:
    """Return each key with each value."""
    values = hostile_values(attack.outside)
    return [{key: value} for key, value in itertools.product(text_keys(attack.recipe), values)]


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOKS)
def test_no_recipe_of_a_run_starts_imports_or_opens_anything(name, attack, share, record) -> None:
    everything = product(attack)
    chosen = random.Random(f"{share.seed} {name}").sample(everything, share.of(12, len(everything)))
    problems = {str(values): problem for values in chosen if (problem := tried(attack, name, values))}
    record({"tried": len(chosen), "problems": problems})
    assert not problems, problems


@pytest.mark.parametrize("name", ["replay", "export", "track", "resume.from"])
def test_a_few_recipes_start_import_and_open_nothing(name, attack, share) -> None:
    chosen = random.Random(f"few {share.seed} {name}").sample(product(attack), 2)
    assert not {str(values): problem for values in chosen if (problem := tried(attack, name, values))}


def spellings(outside: Path) -> list[str]:
    """Return the hostile values that name a command or a class, and no file."""
    values = [value for value in hostile_values(outside) if "secret" not in value and "/run" not in value]
    assert len(values) > 30
    return values


def read_stream(value: str, found_in: str) -> None:
    """Open everything that a stream names, as data workers do."""
    data = DataConfig.model_validate({"path": ".", "order": "stream", "stream": value, "stream_samples": 1})
    shards = StreamShards(data.of(found_in), seed=0)
    for url, name in zip(shards.urls, shards.names, strict=True):
        with suppress(DataError):  # it is no tar
            list(read_tar(url, name))


def test_no_spelling_of_a_stream_starts_a_command(tmp_path, monkeypatch) -> None:
    set_variables(monkeypatch, tmp_path)
    values = spellings(tmp_path)
    with watched(tmp_path) as effects:
        for value in values:
            with suppress(UserError, ValueError):  # refused
                read_stream(value, "theirs/recipe.yaml")
    assert not effects.opened | effects.written  # curl may be started, with the URL as an argument
    with watched(tmp_path) as effects:  # this shows that the detector sees something
        read_stream(values[0], "")
    assert effects.opened | effects.written


@pytest.mark.slow
def test_no_spelling_of_a_stream_in_a_run_starts_a_command(attack) -> None:
    values = spellings(attack.outside)
    problems = {value: tried(attack, "replay", {"data.stream": value}) for value in values}
    assert not {value: problem for value, problem in problems.items() if problem}


@pytest.mark.parametrize("key", ["data.stream", "attention.basis", "init_from", "deepspeed.config"])
def test_what_is_trusted_is_noticed_here(key, attack, monkeypatch) -> None:
    """With KARAT_TRUST=1 the detector notices an effect, so it would notice one in the other tests."""
    monkeypatch.setenv(VARIABLE, "1")
    text, name, seen = {
        "data.stream": (f"{{p,p}}ipe:touch {attack.outside}/pwned", "replay", "started"),
        "attention.basis": (f"{MODULE}:Foreign", "export", "opened"),
        "init_from": (f"{attack.outside}/secret.safetensors", "replay from the start", "opened"),
        "deepspeed.config": (f"{attack.outside}/secret.json", "replay", "opened"),
    }[key]
    sys.modules.pop(MODULE, None)
    code, effects, errors = attack.run(name, with_recipe(attack, {key: text}))
    assert any(found.startswith(seen) for found in effects.found()), (code, errors)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LOOKS if name != "train in its directory"])
def test_nothing_is_written_where_a_link_in_a_run_leads(name: str, attack: Attack) -> None:
    # Files that a command of an earlier version may have left there.
    left = ("evaluations/other.json", "predictions.npz", "trackers/tensorboard.json", "analysis/report.html")

    def change(run: Path) -> None:
        for file in left:
            (run / file).parent.mkdir(exist_ok=True)
            (run / file).write_bytes(b"mine")
        for path in [path for path in sorted(run.rglob("*")) if path.is_file()]:
            target = attack.outside / "linked" / path.relative_to(run)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
            path.symlink_to(target)
        before.update(contents(attack.outside))

    before: dict[str, bytes] = {}
    (attack.outside / "linked").mkdir()
    attack.run(name, change)
    assert contents(attack.outside) == before


@pytest.mark.parametrize("name", ["eval on", "analyze", "track"])
def test_nothing_is_written_where_a_linked_folder_of_a_run_leads(name, attack) -> None:
    def change(run: Path) -> None:
        for folder in ("evaluations", "trackers", "tensorboard", "analysis", "predictions.npz"):
            (run / folder).symlink_to(attack.outside)

    values = with_recipe(attack, {"log.trackers": "tensorboard"})
    code, effects, errors = attack.run(name, lambda run: (values(run), change(run)))
    assert not effects.found()
    assert code in (1, 2), errors


SPELLED = ("{outside}/secret", "../../outside/secret", "file://{outside}/secret", "~/secret")


@pytest.mark.parametrize("field", ["shard", "index", "split"])
def test_a_data_set_reads_nothing_outside_itself(field, attack, shards) -> None:
    data = attack.here / "data"
    shutil.copytree(shards, data)
    for name in (text.format(outside=attack.outside) for text in SPELLED):
        record = json.loads((shards / "dataset.json").read_text())
        split = record["splits"]["val"]
        if field == "split":
            record["splits"] = {name: split}
        elif field == "index":
            split["shards"][0]["index"]["name"] = f"{name}.tar"
        else:
            split["shards"][0]["name"] = f"{name}.tar"
        (data / "dataset.json").write_text(json.dumps(record))
        with watched(attack.outside) as effects, redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            code = karat_here("data", str(data), "--out", str(attack.here / "page.html"))
        assert not effects.found()
        assert code in (0, 2)
