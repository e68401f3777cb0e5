"""A user's mistake in a call gives one line and exit code 2, and nothing is written."""

from pathlib import Path

import pytest
import torch

from tests.conftest import SMALL, karat_refuses

SMALL_VIT = "imagenet_vit_tiny_g3b model.depth=1 model.image_size=64 train.precision=bf16 train.global_batch=256"
SYNTHETIC = "cifar10_vit_tiny schedule.warmup_epochs=0 data.backend=synthetic data.path= attention.kind=karat "
SYNTHETIC += " ".join(SMALL).replace(", ", ",")
DOCTOR = "doctor fashion_mnist_demo data.backend=synthetic data.path="
SUBMIT = "submit imagenet_vit_tiny_g3b run.dir=run"
PUSH = "export kept --push"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        pytest.param(
            "bench attention --device cuda",
            "--device cuda: no CUDA device here; use --device cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here"),
        ),
        ("bench attention --form content --basis dog", "--form content needs --basis fourier, not dog"),
        ("bench attention --basis dogs", "--basis = 'dogs': expected one of fourier, "),
        ("bench data --backend petastorm", "petastorm"),
        ("bench data --tar nowhere.tar", "nowhere.tar"),
        ("bench data --path nowhere", "--path = nowhere is not a directory"),
        ("bench resume imagenet_vit_base_g1b optim.lrr=1", "optim.lrr"),
        ("bench gpu --only kernels memory", "unknown value 'memory'; choose from losses, rank_losses, kernels, "),
        ("bench gpu --only kernels --device cpu --json missing/gpu.json", "its directory does not exist"),
        ("doctor data.workers=2", "override"),
        ("doctor --json nowhere/x.json", "its directory does not exist"),
        ("doctor vit_tinny", "neither a file nor a shipped recipe"),
        (f"{DOCTOR} model.name=vit_tinny_patch16_224", "vit_tiny_patch16_224"),
        (f"{DOCTOR} deepspeed.config=zero9", "zero9"),
        (f"plan {SMALL_VIT} --gpu v100-32", "no matrix units for it"),
        (f"plan {SMALL_VIT} --curve", "--step-time"),
        (f"plan {SMALL_VIT} train.precision=fp16", "needs a GPU; name it by --gpu"),
        (f"plan {SMALL_VIT} --gpus 3", "does not divide over 3 ranks"),
        (f"plan {SYNTHETIC} --gpus 3 --dry-run", "does not divide over 3 ranks"),
        (f"{SUBMIT} optim.lrr=1", "optim.lrr: unknown key"),
        (f"{SUBMIT} deepspeed.config=own.json", "gradient_cliping: unknown key"),
        (f"{SUBMIT} --gpu=h1000", "--gpu h1000: not in the table"),
        (f"{SUBMIT} train.global_batch=130 --nodes=3 --gpu=a100-40", "does not divide over 12 ranks"),
        (f"{SUBMIT} --print --yes", "not allowed with argument"),
        ("convert kept fashion_mnist_demo --survey --print", "not allowed with argument"),
        ("detect kept --eval --print", "not allowed with argument"),
        (f"sweep {SYNTHETIC} --out run optim.lr=1e-3,fast", "optim.lr=fast: "),
        (f"sweep {SYNTHETIC} --out run run.dir=a,b", "run.dir: each run of a sweep has its own directory; use --out"),
        (f"sweep {SYNTHETIC} --out run run.seed=0,1 --at-once 2", "no effect without --slurm"),
        (f"sweep {SYNTHETIC} --out run run.seed=0,1 --slurm --ranks 2", "--ranks 2 is for this machine"),
        (f"show {SYNTHETIC} --step 999999", "the recipe has steps 1 to"),
        (f"show {SYNTHETIC} --out /nowhere/x.png", "argument --out: '/nowhere/x.png': its directory does not exist"),
        ("plan fashion_mnist_demo.yaml", "no such file; the shipped recipe is fashion_mnist_demo, without .yaml"),
        ("data .", "is not a data set"),
        ("status .", "not a run directory (it has no recipe.yaml)"),
        (f"{PUSH} owls", "--push owls: should be USER/NAME"),
        (f"{PUSH} jane/owls --format onnx", "--format onnx: --push uploads a hub-folder"),
        (f"{PUSH} jane/owls --weights raw", "run `hf auth login`, or set HF_TOKEN"),
        ("compare nowhere", "nowhere: there is no such directory; name that of a run, such as runs/NAME"),
        ("compare .", "error: no run to compare: .: not a run directory"),
        ("compare kept --out own.json", "argument --out: 'own.json' is a file; choose another directory"),
        ("analyze kept --out own.json", "argument --out: 'own.json' is a file; choose another directory"),
        ("compare kep", "kep: there is no such directory; did you mean kept?"),
        ("eval kept --weigths ema", "unknown option --weigths; did you mean --weights?"),
        ("eval kept --weights kept", "unknown value 'kept'; choose from auto, raw, ema"),
        (f"eval kept --corrupt {'x' * 300}", "choose from"),
        ("analyze --only training kept", "'kept' is none of its values; name it before the option"),
        ("detect kept/seven.yaml", "seven.yaml extends cifar10_vit_tiny, a recipe of `karat train`: karat train kept/"),
        ("plan kept/seven.yaml", "model.num_heads = 7 does not divide the width 192 of vit_tiny_patch16_224; use 6"),
        ("train kept/seven.yaml attention.blocks={0-1:{kind:karat}", "quote it, or close its brackets"),
        ("doctor kept/seven.yamll", "no such file; did you mean kept/seven.yaml?"),
        ("train fashion_mnist_demo model.\x1b[2J=1", "\\x1b[2J"),
        ("train fashion_mnist_demo attention.grdi=3", "attention.grdi: unknown key; did you mean attention.grid?"),
        ("train fashion_mnist_demo model.name=resnet50 --print", "it has no attention that KArAt can replace"),
        ("train fashion_mnist_demo train.freeze=[blocs.*] --print", "train.freeze = blocs.*: matches no parameter"),
        ("train fashion_mnist_demo attention.basis=no_such:Basis --print", "put its directory on PYTHONPATH"),
        ("train fashion_mnist_demo deepspeed.config=own.json --print", "did you mean gradient_clipping?"),
        ("eval .", ".: not a run directory (it has no recipe.yaml); did you mean kept?"),
        ("eval kept/checkpoints/step-00000001", "there is no such directory; did you mean kept?"),
        ("eval kept/checkpoints/step-00000002", "not a run's directory; write kept --checkpoint step-00000002"),
        ("export kept --checkpoint foo", "no such checkpoint; name one of best, latest, step-00000002"),
        ("my_recipe", "unknown value 'my_recipe'; did you mean karat train my_recipe?"),
        ("launch train fashion_mnist_demo --ranks 2", "--ranks comes before the command: karat launch --ranks N"),
        ("launch sweep fashion_mnist_demo run.seed=0,1 --print", "launch sweep: ranks share the work of train,"),
        ("launch sweep fashion_mnist_demo run.seed=0,1 --print --ranks 2", "use karat sweep --ranks N"),
        ("launch recipes", "use karat recipes without launch"),
        ("launch launch recipes", "use karat launch without launch"),
        ("train fashion_mnist_demo --epochs 5", "unknown option --epochs; write train.epochs=VALUE"),
    ],
)
def test_a_mistake_is_one_line(command: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    (tmp_path / "own.json").write_text('{"gradient_cliping": 1.0}')
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "recipe.yaml").touch()
    (tmp_path / "kept" / "checkpoints" / "step-00000002").mkdir(parents=True)
    (tmp_path / "kept" / "seven.yaml").write_text("extends: cifar10_vit_tiny\nmodel: {num_heads: 7}\n")
    line = karat_refuses(*command.split(" "))
    assert said in line
    assert "\x1b" not in line
    assert {path.name for path in tmp_path.iterdir()} == {"own.json", "kept"}
