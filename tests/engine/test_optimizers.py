import pytest
import torch

from karat_scale.checkpoint.checkpoints import Checkpoints
from karat_scale.checkpoint.store import CheckpointStore
from karat_scale.engine.ema import Ema
from karat_scale.engine.optimizers import build_optimizer, hidden_matrices
from karat_scale.engine.reporting.progress import PlainDisplay, Reporter
from karat_scale.foundation.errors import RecipeError, RunDirectoryError
from karat_scale.models import create_model
from karat_scale.recipe import Recipe
from karat_scale.training.tasks.classification.task import TrainState
from tests.small_engines import equal, train_once, weights

MUON = "optim.name=muon"
CPU = torch.device("cpu")


def test_hidden_matrices_are_the_blocks_linear_weights(small_recipe) -> None:
    recipe = small_recipe()
    hidden = hidden_matrices(create_model(recipe.model, recipe.attention))
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert hidden == {f"blocks.{block}.{layer}.weight" for block in (0, 1) for layer in layers}


def test_each_parameter_moves_as_under_the_optimizer_that_has_it(small_recipe) -> None:
    recipe = small_recipe(MUON, "optim.lr=0.01")
    torch.manual_seed(0)
    model = create_model(recipe.model, recipe.attention)
    torch.manual_seed(0)
    twin = create_model(recipe.model, recipe.attention)
    ours = build_optimizer(model, recipe.optim, CPU)
    hidden = hidden_matrices(twin)
    matrices = [p for name, p in twin.named_parameters() if name in hidden]
    muon = torch.optim.Muon(matrices, lr=0.01, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    adamw = build_optimizer(twin, small_recipe("optim.lr=0.01").optim, CPU)
    for matrix in matrices:
        matrix.requires_grad_(True)
    for seed in range(3):
        for network in (model, twin):
            images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
            network(images).square().mean().backward()
        ours.step()
        ours.zero_grad()
        muon.step()
        for matrix in matrices:
            matrix.grad = None  # AdamW passes over it
        adamw.step()
        adamw.zero_grad()
    pairs = zip(model.named_parameters(), twin.parameters(), strict=True)
    assert all(torch.equal(p, q) for (_, p), q in pairs)


@pytest.fixture
def run(make_engine, world, tmp_path):
    """An engine with averages and checkpoints over one directory."""

    def build(recipe: Recipe):
        engine = make_engine(recipe)
        ema = Ema(engine.deepspeed, recipe.train)
        store = CheckpointStore(tmp_path / "checkpoints")
        return engine, Checkpoints(
            store, engine, ema, world, recipe, Reporter(PlainDisplay(), None), "classification", TrainState
        )

    return build


def test_muon_resumes_to_the_same_bits(small_recipe, run) -> None:
    engine, checkpoints = run(small_recipe(MUON))
    for step in (1, 2):
        train_once(engine, step)
    checkpoints.store.root.mkdir(parents=True)
    assert checkpoints.save(TrainState(step=2, samples=16))
    norms = [train_once(engine, step) for step in (3, 4)]
    resumed, again = run(small_recipe(MUON))
    assert again.load() is not None
    assert [train_once(resumed, step) for step in (3, 4)] == norms
    assert equal(weights(engine), weights(resumed))


@pytest.mark.parametrize(("before", "after"), [("adamw", "muon"), ("muon", "adamw")])
def test_another_optimizers_checkpoint_is_refused(small_recipe, run, before: str, after: str) -> None:
    engine, checkpoints = run(small_recipe(f"optim.name={before}"))
    train_once(engine, 1)
    checkpoints.store.root.mkdir(parents=True)
    assert checkpoints.save(TrainState(step=1, samples=8))
    _, other = run(small_recipe(f"optim.name={after}"))
    with pytest.raises(RunDirectoryError, match=f"optim.name={before}"):
        other.load()


@pytest.mark.parametrize("config", ["zero1", "zero2", "zero3", "zero2_offload"])
def test_muon_is_refused_where_matrices_are_cut_up(small_recipe, make_engine, config: str) -> None:
    with pytest.raises(RecipeError, match=r"optim\.name = muon .* use deepspeed\.config=zero0"):
        make_engine(small_recipe(MUON, f"deepspeed.config={config}"))


def test_a_torch_without_muon_is_one_line(small_recipe, make_engine, monkeypatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(RecipeError, match=r"has no Muon; install torch 2\.9"):
        make_engine(small_recipe(MUON))
