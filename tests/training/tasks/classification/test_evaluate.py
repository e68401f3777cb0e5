import pytest
import torch

from karat_scale.data.augmentation.device_augment import Normalize
from karat_scale.data.backends import ImageSpec, open_backend
from karat_scale.foundation.errors import UserError
from karat_scale.training.tasks.classification.task import EvalResult, evaluate, top_classes
from tests.conftest import CLASSES


@pytest.mark.parametrize("batch", [1, 5, 32, 100])
def test_a_perfect_model_scores_100_on_every_sample_whatever_the_batch(small_recipe, world, batch) -> None:
    recipe = small_recipe("data.synthetic_samples=33")
    backend = open_backend(ImageSpec(recipe.data, recipe.augment, 16, CLASSES, 0))
    position = 0

    def oracle(images: torch.Tensor) -> torch.Tensor:
        # synthetic sample i has label i mod classes, and evaluation reads in order
        nonlocal position
        labels = torch.arange(position, position + len(images)) % CLASSES
        position += len(images)
        return 20.0 * torch.nn.functional.one_hot(labels, CLASSES)

    calls = []
    normalize = Normalize(recipe.augment.mean, recipe.augment.std)
    result = evaluate(oracle, backend, normalize, batch, world, lambda done, total, bad: calls.append((done, total)))
    assert (result.top1, result.top5, result.images, result.bad) == (100.0, 100.0, 33, 0)
    assert result.loss < 1e-6
    assert calls == [(number, -(-33 // batch)) for number in range(1, -(-33 // batch) + 1)]


def test_top5_and_loss_are_the_textbooks(small_recipe, world) -> None:
    recipe = small_recipe("data.synthetic_samples=24", "model.num_classes=8")
    backend = open_backend(ImageSpec(recipe.data, recipe.augment, 16, 8, 0))
    torch.manual_seed(3)
    logits = torch.randn(24, 8)
    labels = torch.arange(24) % 8
    pieces = iter(logits.split(10))

    def model(images: torch.Tensor) -> torch.Tensor:
        piece = next(pieces)
        return torch.cat([piece, torch.zeros(len(images) - len(piece), 8)])

    normalize = Normalize(recipe.augment.mean, recipe.augment.std)
    result = evaluate(model, backend, normalize, 10, world, lambda done, total, bad: None)
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert result.top1 == pytest.approx(100 * (ranks == 0).double().mean().item())
    assert result.top5 == pytest.approx(100 * (ranks < 5).double().mean().item())
    assert result.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-6)


@pytest.mark.parametrize("classes", [10, 1000])
def test_of_equal_logits_the_lower_class_comes_first_whatever_their_number(classes: int) -> None:
    """Logits in bf16 are often equal: `karat analyze` and training's evaluation disagreed on 4 of 10,000 images."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-3, 3, (50, classes), generator=generator).float()
    expected = torch.tensor([sorted(range(classes), key=lambda c: (-row[c], c)) for row in logits.tolist()])
    for count in (1, 5, classes):
        assert torch.equal(top_classes(logits, count), expected[:, :count])


def test_an_output_that_is_not_finite_is_no_prediction_and_is_counted(small_recipe, world) -> None:
    recipe = small_recipe("data.synthetic_samples=24")
    backend = open_backend(ImageSpec(recipe.data, recipe.augment, 16, CLASSES, 0))
    logits = 20.0 * torch.nn.functional.one_hot(torch.arange(24) % CLASSES, CLASSES)
    logits[4, 0] = logits[8] = torch.nan  # sample 4 is of class 0, which sorting puts first
    logits[9, 2] = torch.inf
    normalize = Normalize(recipe.augment.mean, recipe.augment.std)
    result = evaluate(lambda images: logits, backend, normalize, 24, world, lambda *_: None)
    assert (result.top1, result.images, result.nonfinite) == (pytest.approx(100 * 21 / 24), 24, 3)
    assert str(result).endswith("on 24 images, 3 with outputs that are not finite")


def test_running_out_of_memory_names_the_batch_of_the_evaluation(small_recipe, world) -> None:
    recipe = small_recipe()
    backend = open_backend(ImageSpec(recipe.data, recipe.augment, 16, CLASSES, 0))
    normalize = Normalize(recipe.augment.mean, recipe.augment.std)
    with pytest.raises(UserError, match=r"out of memory: .*; lower train\.eval_batch \(now 16\)$"):
        evaluate(lambda images: torch.empty(1 << 50), backend, normalize, 16, world, lambda *_: None)


def test_top5_of_few_classes_is_not_told() -> None:
    """A top-5 accuracy of 100 % is not printed, because any model with five classes has it."""
    assert str(EvalResult(60.0, 100.0, 1.0, 10, 0)) == "top-1 60.00 % loss 1.0000 on 10 images"
    assert "top-5 90.00 %" in str(EvalResult(60.0, 90.0, 1.0, 10, 0))
