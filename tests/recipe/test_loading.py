"""Recipes: what is accepted, and that each mistake is one line that names the field, the value and the fix."""

import os
from pathlib import Path

import pytest
import yaml

from karat_scale.foundation.errors import RecipeError
from karat_scale.recipe import Recipe
from karat_scale.recipe.base import Effect
from karat_scale.recipe.loading import (
    MOST_MISTAKES,
    differing_keys,
    dump_recipe,
    effects,
    flatten,
    load_recipe,
    rounding_keys,
    schema_keys,
)

VARIANTS = [
    *(f"vit_{size}{kind}" for size in ("tiny", "small") for kind in ("", "_g3b", "_g3u")),
    *(f"vit_base{kind}" for kind in ("", "_g1b", "_g1u")),
]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text("data: {path: somewhere}\n")
    return path


def message(path: Path | str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("run.name=a/b", ["run.name = 'a/b'", "remove /, | and control characters"]),
        ("run.name='x | y'", ["run.name = 'x | y'", "remove /"]),
        ('run.name="a\\nb"', ["run.name = 'a\\nb'", "remove /"]),
        ("run.name=..", ["run.name = '..'", "use no . or .."]),
        ("data.path=/d/a #1", ["override 'data.path=/d/a #1'", "`#` begins a comment in YAML; quote the value"]),
        ("data.path=#1", ["quote the value"]),
        ("data.path=ftp://host/x", ["data.path: ftp:// is not supported"]),
        ("train.epochs=010", ["override 'train.epochs=010'", "remove the leading 0 or the :, or quote it"]),
        ("train.epochs=1:30", ["override 'train.epochs=1:30'", "or the :, or quote it"]),
        ("attention.blocks={8: {kind: [karat]}}", ["attention.blocks.8.kind", "'softmax', 'karat'"]),
        ("attention.kind=kart", ["attention.kind = 'kart'", "did you mean karat?"]),
        ("train.steps=3", ["train.steps: unknown key", "did you mean train.max_steps?"]),
        ("attention.grdi=3", ["attention.grdi", "did you mean attention.grid?"]),
        ("lr=3", ["lr: unknown key", "did you mean optim.lr?"]),
        ("batch_size=64", ["batch_size: unknown key", "did you mean train.global_batch or train.micro_batch?"]),
        ("schedule.warmup=3", ["did you mean schedule.warmup_epochs or schedule.warmup_steps?"]),
        ("Optim.lr=3", ["Optim: unknown key; did you mean optim?"]),
        ("LR=3", ["LR: unknown key; did you mean optim.lr?"]),
        ("optim.learning_rate=1", ["did you mean optim.lr?"]),
        ("num-epochs=3", ["did you mean train.epochs?"]),
        ("train.gpus=2", ["`karat launch --ranks N` sets the number of processes"]),
        ("train.batchsize=8", ["did you mean train.global_batch or train.micro_batch?"]),
        ("train.resume=true", ["did you mean resume?"]),
        ("resume=true", ["resume = true: should be a section with the keys mode, from, allow"]),
        ("modl.name=x", ["modl", "did you mean model"]),
        ("data.backend=webdatset", ["'synthetic'; did you mean webdataset? (default: webdataset)"]),
        ("optim.lr=fast", ["optim.lr = 'fast': should be a number (default: 0.0005)"]),
        ("optim.lr=-1", ["optim.lr = -1: should be above 0"]),
        ("optim.lr=.inf", ["optim.lr = inf", "finite", "0.0005"]),
        ("optim.lr=1e30", ["optim.lr = '1e30': should be at most 1000"]),
        ("optim.weight_decay=.inf", ["optim.weight_decay = inf", "finite"]),
        (
            "augment.mean=[.nan, 0, 0]",
            ["augment.mean[0] = nan: should be a finite number (default: [0.485, 0.456, 0.406])"],
        ),
        ("checkpoint.every_minutes=.inf", ["checkpoint.every_minutes = inf", "finite"]),
        (
            "schedule.min_lr=5",
            [
                "schedule.min_lr = 5 is above the peak learning rate, 0.000125, which follows from optim.lr = 0.0005; "
                "set schedule.min_lr=0, or raise optim.lr"
            ],
        ),
        ("schedule.warmup_lr=0.1", ["schedule.warmup_lr = 0.1", "optim.lr = 0.0005", "set schedule.warmup_lr=0"]),
        ("attention.grid=true", ["attention.grid = true: should be a number, not true or false"]),
        ("attention.grid=99", ["attention.grid = 99", "16"]),
        (
            "attention.kind=soft",
            [
                "attention.kind = 'soft'",
                "'softmax', 'karat', 'static', ",
                " or package.module:Class",
            ],
        ),
        *(
            (f"augment.mean={value}", [f"augment.mean = {value}: should be three numbers, of red, green and blue (def"])
            for value in ("[1, 2]", "[1, 2, 3, 4]", "0.5", "[]")
        ),
        ("augment.scale=[1.0, 0.5]", ["augment.scale", "ascending"]),
        *(
            (f"augment.randaugment={policy}", ["augment.randaugment", "rand-m9-mstd0.5-inc1"])
            for policy in ("auto", "rand-", "rand-foo", "rand-m9-x")
        ),
        ("model.patch_size=15", ["model.image_size = 224", "model.patch_size = 15", "set model.image_size=210"]),
        *(
            (
                f"model.num_heads={heads} && model.embed_dim={width}",
                [f"set model.num_heads={near}, or model.embed_dim={fits}"],
            )
            for heads, width, near, fits in ((5, 96, "4 or 6", 100), (3, 100, "2 or 4", 102), (4, 33, "1 or 3", 32))
        ),
        ("train.global_batch=127", ["train.global_batch = 127", "odd", "augment.mix_prob=0"]),
        ("train.micro_batch=6", ["train.global_batch = 128", "train.micro_batch = 6", "set train.micro_batch=4"]),
        ("train.epochs=3", ["schedule.warmup_epochs = 5", "train.epochs = 3"]),
        (
            "optim.karat_weight_decay=some",
            ["optim.karat_weight_decay = 'some': should be true, false or 'all' (default: false)"],
        ),
        ("none=1", ["none: unknown key; `karat explain` lists the sections"]),
        ("data.foo=1", ["data.foo: unknown key; `karat explain data` lists its keys"]),
        ("train.recompute.foo=1", ["unknown key; `karat explain train.recompute` lists its keys"]),
        ("deepspeed.stage=3", ["deepspeed.stage: unknown key; did you mean deepspeed.config?"]),
        ("optim.betas=[0.9, 0.99, 0.9]", ["optim.betas = [0.9, 0.99, 0.9]: too many values (default: [0.9, 0.999])"]),
        ("optim.betas=[0.9]", ["optim.betas = [0.9]: too few values (default: [0.9, 0.999])"]),
        ("run.device=gpu", ["run.device = 'gpu': should be 'auto', 'cpu' or 'cuda'; did you mean cuda? (def"]),
        ("train.max_steps=None", ["train.max_steps = 'None': should be a whole number, such as 12, or null"]),
        ("attention.blocks=8-11", ["attention.blocks = '8-11': should be a section", "such as {8-11: {kind: karat}}"]),
        ("attention.blocks={8: {bound: x}}", ["attention.blocks.8.bound = 'x': should be a number"]),
        ("schedule.image_sizes=128", ["schedule.image_sizes = 128: should be pairs of epoch and size, such as [[0, "]),
        ("train.compile=7", ["= 7: should be false, 'default', 'reduce-overhead' or 'max-autotune' (default: false)"]),
        ("train.recompute.polcy=all", ["train.recompute.polcy", "did you mean train.recompute.policy?"]),
        ("recompute=all", ["recompute: unknown key", "did you mean train.recompute?"]),
        ("train.recompute=all", ["train.recompute = 'all'", "should be a section with the keys policy, every"]),
        ("train.recompute.policy=al", ["train.recompute.policy = 'al'", "'attention'", "(default: none)"]),
        ("train.recompute.every=0", ["train.recompute.every = 0", "1", "(default: 2)"]),
        ("train.recompute.policy=budget", ["train.recompute.policy = 'budget'", "'every' or 'all'"]),
        ("train.recompute.budget_gb=2", ["train.recompute.budget_gb: unknown key"]),
        ("log.trackers=paper", ["log.trackers[0] = 'paper'", "'tensorboard'"]),
        ("distill.weight=0.25", ["distill.weight = 0.25", "no effect", "set distill.from, or distill.weight=0.5"]),
        ("distill.kind=hard", ["distill.kind = hard", "no effect without distill.from"]),
        ("data.backend=zip", ["data.backend = 'zip'", "'folder', 'webdataset'", "(default: webdataset)"]),
        ("optim.name=lion", ["optim.name = 'lion'", "'adamw' or 'muon'"]),
        ("log.profile_steps=[5, 3]", ["log.profile_steps", "swap the two"]),
        ("checkpoint.keep_last=1", ["checkpoint.keep_last = 1", "2"]),
        ("checkpoint.snapshots=-1", ["checkpoint.snapshots = -1", "0"]),
        ("train.on_nonfinite=ignore", ["train.on_nonfinite = 'ignore'", "'skip' or 'stop'"]),
        ("data.path=", ["data.path"]),
        ("optim=3", ["optim = 3", "weight_decay"]),
        ("optim.lr.peak=3", ["optim.lr"]),
        ("train.max_steps=true", ["train.max_steps = true", "a number, not true or false"]),
        ("optim.betas=[true, 0.9]", ["optim.betas", "a number, not true or false"]),
        ("resume.allow=optim.lr,train.epochs", ["no such key; write several as a list, [optim.lr,train.epochs]"]),
        ("resume.allow=[3]", ["resume.allow[0] = 3: should be a text; put it in quotes"]),
        ("schedule.name=cosine", ["schedule.name: unknown key; `karat explain schedule` lists its keys"]),
        ("model.dropout=0.1", ["model.dropout: unknown key; did you mean model.proj_drop?"]),
        ("grad_accum=2", ["grad_accum: unknown key; did you mean train.micro_batch?"]),
        ("optim.scheduler=cosine", ["optim.scheduler: unknown key; did you mean schedule?"]),
        ("data.split=val", ["data.split: unknown key; did you mean data.train_split or data.val_split?"]),
        ("train.tf32=maybe", ["train.tf32 = 'maybe': should be true or false (default: true)"]),
        (
            "data.path=yes",
            ["data.path = true: should be a text; put it in quotes, ", "(YAML reads yes, no, on and off as"],
        ),
        ("run.name=2024", ["run.name = 2024: should be a text; put it in quotes, on a command line in two pairs"]),
        ("run.name=" + "a" * 256, ["a: should have at most 255 characters"]),
        ("train.epochs=1.5", ["train.epochs = 1.5: should be a whole number, such as 12 (default: 100)"]),
        ("train.epochs=0", ["train.epochs = 0: should be at least 1"]),
        ("train.epochs=2001-01-01", ['train.epochs = "2001-01-01": should be a whole number']),
        ("train.ema_decay=1", ["train.ema_decay = 1: should be below 1"]),
        ("optim.lr={a: true}", ['optim.lr = {"a": true}: should be a number']),
        (
            "train.epochs = 3",
            ["override 'train.epochs = 3': should be key=value without blanks, such as optim.lr=1e-3"],
        ),
        ("train.epochs", ["override 'train.epochs': should be key=value without blanks"]),
        (
            "checkpoint.every=15",
            ["= 15: should be auto or null; for a number, set checkpoint.every_minutes or checkpoint.ev"],
        ),
        ("log.profile_steps=3", ["log.profile_steps = 3: should be a list, such as [a, b], or null"]),
        ("schedule.image_sizes=[[0, x]]", ["schedule.image_sizes[0][1] = 'x': should be a whole number"]),
        (
            "schedule.image_sizes=[[0]]",
            ["schedule.image_sizes[0] = [0]: should be pairs of epoch and size, such as [["],
        ),
        ("attention.residual=true", ["attention.residual = true has no effect with attention.kind = softmax"]),
        (
            "attention.kind=karat && attention.form=content && attention.simplex=true",
            ["attention.simplex = true does not work with attention.form = content; use false"],
        ),
        ("data.path=!x y", ["override 'data.path=!x y': the value is not valid YAML; quote it"]),
        ("resume.allow=optim.lrr", ["resume.allow = optim.lrr: no such key; did you mean optim.lr?"]),
        ("nonsense", ["nonsense", "key=value"]),
        ("a=[", ["a=[", "YAML"]),
        # Muon needs ZeRO stage 0, but weights in bf16 need a higher stage.
        ("optim.name=muon && train.precision=bf16_weights", ["precision = bf16_weights", "use train.precision=bf16"]),
        (
            "train.precision=fp16 && train.on_nonfinite=stop",
            ["train.on_nonfinite = stop with train.precision = fp16", "use skip"],
        ),
        (
            "init_from=a && resume.from=b",
            ["init_from = a and resume.from = b both set the start of the run; unset one"],
        ),
    ],
)
def test_a_mistake_is_one_line_with_field_value_and_fix(recipe: Path, override: str, parts: list[str]) -> None:
    text = message(recipe, *override.split(" && "))
    for part in parts:
        assert part in text


def test_a_mistake_of_the_command_line_does_not_blame_the_file(recipe: Path) -> None:
    assert message(recipe, "batch_size=64").startswith("batch_size: unknown key")
    assert message(recipe, "resume.allow=optim.lrr").startswith("resume.allow = optim.lrr: no such key")
    recipe.write_text(recipe.read_text() + "\nbatch_size: 64\n")
    assert message(recipe, "optim.lr=1").startswith(f"{recipe}: batch_size: unknown key")


def test_each_mistake_is_a_line_and_a_misspelt_key_comes_before_what_is_missing(tmp_path: Path) -> None:
    file = tmp_path / "new.yaml"
    file.write_text("optim: {lrr: 1e-3}\nmodle: {}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, ["train.freeze=5", "foo.bar=1"])
    assert caught.value.mistakes == (
        f"{file}: optim.lrr: unknown key; did you mean optim.lr?",
        "train.freeze = 5: should be a list, such as [a, b] (default: [])",
        f"{file}: modle: unknown key; did you mean model?",
        "foo: unknown key; `karat explain` lists the sections",
        f"{file}: data: missing; every recipe needs it, or begins with `extends: RECIPE`",
    )
    file.write_text("".join(f"key{number}: 1\n" for number in range(11)) + "data: {path: a}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    assert len(caught.value.mistakes) == MOST_MISTAKES + 1
    assert caught.value.mistakes[-1] == f"{file}: 1 more mistake"


def test_an_override_of_a_section_keeps_its_other_keys(recipe: Path) -> None:
    before = load_recipe(recipe, ["model.depth=3"]).model
    after = load_recipe(recipe, ["model.depth=3", "model={num_classes: 7}"]).model
    assert after == before.model_copy(update={"num_classes": 7})


def test_an_override_of_one_of_two_aliases_spares_the_other(recipe: Path) -> None:
    recipe.write_text("data: {path: a}\nattention: {blocks: {0-3: &x {kind: karat, grid: 3}, 8-11: *x}}\n")
    blocks = load_recipe(recipe, ["attention.blocks.0-3.grid=5"]).attention.blocks
    assert [own["grid"] for own in blocks.values()] == [5, 3]


def test_a_misspelt_file_or_name_is_suggested(recipe):
    with pytest.raises(RecipeError, match=rf"no such file; did you mean {recipe}\?"):
        load_recipe(recipe.with_name(recipe.name[1:]))
    assert "did you mean imagenet_vit_tiny_g3b?" in message("imagenet_vit_tny_g3b")
    assert "no such file" in message("nowhere/recipe.yaml")


def test_a_pipe_and_a_link_to_nothing_are_no_recipe_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "link.yaml").symlink_to("nothing")
    for name in ("pipe", "link"):
        assert message(tmp_path / f"{name}.yaml").endswith("not a regular file, or a link to nothing; name a YAML file")


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ("data: {path: a}\ndata: {path: b}\n", "line 2: not valid YAML: key 'data' appears twice"),
        ("attention: {blocks: {8: {grid: 3}, '8': {grid: 5}}}\n", "line 1: not valid YAML: key '8' appears twice"),
        ("a: &a {}\nb: {<<: *a}\n", "line 2: not valid YAML: `<<` is not supported; write out the keys"),
        ("train: {epochs: 010}\n", "line 1: not valid YAML: YAML reads 010 as another number; remove the leading 0"),
        (
            "extends: parts/taught/transfer\n",
            "attention.transfer_from = 'runs/{base}_g3b': only a shipped recipe's name",
        ),
        ("extends: parts/data/stl10\n", "init_from = 'runs/imagenet_{model}{attention}': only a shipped recipe's name"),
        ("- 1\n", "mine.yaml: [1]: should be sections such as `model:` and `data:`"),
        ("on: 1\n", "key true should be a name"),
        ("optim.lr: 3\n", "mine.yaml: optim.lr: a key with a dot works on the command line only; write optim: {lr: 3}"),
        ("train: {recompute.every: 2}\n", "; write train: {recompute: {every: 2}}"),
        ("optim.lrr: 3\n", "mine.yaml: optim.lrr: unknown key; did you mean optim.lr?"),
        ("data:\n  path: [\n", "not valid YAML: a bracket or a quote without its end; close it"),
        (
            "data: {path: x\nmodel: {depth: 3}\n",
            "line 1: not valid YAML: a bracket or a quote without its end; close it",
        ),
        ("data:\n  path: 'x\n", "line 2: not valid YAML: a bracket or a quote without its end; close it"),
        ("data: {path: x}}\n", "line 1: not valid YAML: a bracket without its beginning; remove it"),
        ("data:\n\tpath: x\n", "line 2: not valid YAML: a tab; indent by spaces"),
        ("data:\n  path: x\n workers: 3\n", "line 3: not valid YAML: wrong blanks at the line's start; align it with"),
        ("data:\n  path: 'it's'\n", "line 2: not valid YAML: a text after a value; quote all of it"),
        ("data: path: x\n", "line 1: not valid YAML: an unexpected `: `; check the line's blanks and quotes, and"),
        ("data:\n  path: x\n  workers 3\n  timeout: 3\n", "line 3: not valid YAML: a key without its value; write it"),
        ("data: {path: @x}\n", "line 1: not valid YAML: a value with a special character; quote it"),
        *(
            (f"data:\n  path: {tag} y\n", "mine.yaml, line 2: not valid YAML: a tag, which is a word after !; remove")
            for tag in ("!x", "!!python/object:os.system", "!!python/name:os.system")
        ),
        ('data: {path: "C:\\data"}\n', "line 1: not valid YAML: a backslash in double quotes; use single quotes"),
        ("data: {path: x}\n---\nmodel: {}\n", "line 2: not valid YAML: a second recipe; remove the ---"),
        ("", "data: missing"),
        ("data:\n", "data.path is empty"),
        ("data: 3\n", "data = 3"),
        ("\x89PNG\xff\xfe\x00", "mine.yaml: not a recipe in YAML: it holds bytes that are no text; name another file"),
    ],
)
def test_a_broken_file_is_one_line(recipe: Path, body: str, part: str) -> None:
    recipe.write_bytes(body.encode("latin-1"))
    assert part in message(recipe)


def test_null_and_nothing_unset_a_text(recipe: Path, tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text(f"extends: {recipe}\ninit_from: null\n")
    assert load_recipe(child, []).init_from == ""
    assert load_recipe(recipe, ["init_from=runs/base", "init_from=", "resume.from="]).init_from == ""


def test_numbers_yaml_reads_as_text_are_numbers_and_the_keys_of_distill_go_with_a_teacher(recipe: Path) -> None:
    assert load_recipe(recipe, ["distill.from=runs/teacher", "distill.weight=0.25"]).distill.weight == 0.25
    assert load_recipe(recipe, ["distill.from=", "distill.weight=0.5"]).distill.from_ == ""
    assert load_recipe(recipe, ["optim.lr=5e-4"]).optim.lr == 5e-4


def test_imagenet_recipes_have_the_papers_settings() -> None:
    recipe = load_recipe("imagenet_vit_tiny_g3b")
    assert (recipe.train.epochs, recipe.train.global_batch, recipe.train.ema_decay) == (100, 128, 0.99992)
    assert (recipe.optim.lr, recipe.optim.lr_batch, recipe.optim.weight_decay) == (5e-4, 512, 0.05)
    assert (recipe.optim.eps, recipe.optim.betas, recipe.optim.clip_grad) == (1e-6, (0.9, 0.999), 1.0)
    assert (recipe.schedule.warmup_epochs, recipe.schedule.warmup_lr, recipe.schedule.min_lr) == (5, 1e-6, 1e-5)
    augment = recipe.augment
    assert (augment.scale, augment.ratio, augment.hflip, augment.color_jitter) == ((0.08, 1), (0.67, 1.5), 0.5, 0.0)
    assert augment.randaugment == "rand-m15-n2-mstd1.0-inc1"
    assert (augment.mixup, augment.cutmix, augment.mix_switch_prob, augment.label_smoothing) == (0.8, 1.0, 0.5, 0.1)
    assert augment.eval_crop == 0.9
    attention = recipe.attention
    assert (attention.kind, attention.grid, attention.rank, attention.base) == ("karat", 3, 12, "zero")
    assert load_recipe("cifar10_vit_tiny_g3b").train.global_batch == 32


def test_recipes_for_many_gpus_differ_in_the_batch_and_what_follows_from_it() -> None:
    for variant in VARIANTS:
        small, large = load_recipe(f"imagenet_{variant}"), load_recipe(f"imagenet_{variant}_1024")
        assert differing_keys(small, large) == ["train.global_batch"]
        assert large.optim.lr * large.train.global_batch / (large.optim.lr_batch or 1) == 1e-3
        assert large.deepspeed.config == "zero0"


def test_dump_and_load_are_inverse(recipe: Path, tmp_path: Path) -> None:
    nested = ["train.recompute.policy=every", "train.recompute.every=3"]
    first = load_recipe(recipe, ["resume.from=there", "resume.allow=optim.lr", "augment.scale=[0.5, 1]", *nested])
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(first))
    assert "from: there" in again.read_text()  # as the user writes it
    assert load_recipe(again) == first
    with pytest.raises(ValueError, match="frozen"):
        first.train.epochs = 3  # type: ignore[misc]


def test_differing_keys_leaves_out_what_cannot_matter_and_what_is_allowed(recipe):
    old = load_recipe(recipe)
    free = load_recipe(
        recipe, ["data.workers=7", "log.every_steps=1", "run.dir=elsewhere", "train.recompute.policy=all"]
    )
    assert differing_keys(old, free) == []
    other = load_recipe(recipe, ["optim.lr=1", "model.depth=3"])
    assert differing_keys(old, other) == ["model.depth", "optim.lr"]
    assert differing_keys(old, other, ["optim"]) == ["model.depth"]
    old = load_recipe(recipe)
    new = load_recipe(recipe, ["data.decoder=pillow", "deepspeed.config=zero1", "train.compile=true", "data.workers=7"])
    assert differing_keys(old, new) == []
    assert rounding_keys(old, new) == ["data.decoder", "train.compile", "deepspeed.config"]


def test_every_key_says_what_it_may_change(recipe: Path) -> None:
    known = effects()
    assert set(known) == set(flatten(load_recipe(recipe))) < set(schema_keys())
    assert known["optim.lr"] is Effect.MODEL
    assert known["attention.rank"] is Effect.SHAPES
    assert known["data.backend"] is known["deepspeed.cpu_adam"] is Effect.ROUNDING
    assert known["resume.from"] is known["log.every_steps"] is Effect.NOTHING


def test_the_schema_has_the_sections_users_know() -> None:
    assert list(Recipe.model_fields) == yaml.safe_load(
        "[run, model, attention, init_from, resume, data, augment, optim, schedule, train, deepspeed, checkpoint, log, "
        "distill, convert]"
    )


def test_the_micro_batch_that_is_proposed_is_even_where_images_are_mixed() -> None:
    with pytest.raises(RecipeError, match=r"set train\.micro_batch=10$"):
        load_recipe("imagenet_vit_tiny_g3b", ["data.path=x", "train.global_batch=90", "train.micro_batch=16"])
