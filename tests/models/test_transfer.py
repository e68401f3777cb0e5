"""A student's outputs and gradients against the plain formula, and what it owns."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from karat_scale.foundation.errors import RecipeError
from karat_scale.models import create_model, parameter_count
from karat_scale.models.flops import flops_per_image
from karat_scale.models.recompute import recompute
from karat_scale.models.transfer import Teacher, TransferredAttention, give_teacher, mix_of, teacher_of
from karat_scale.recipe import AttentionConfig, ModelConfig

SIZE = ModelConfig(
    name="vit_mini_patch4_28", image_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=5
)
STUDENT = AttentionConfig(transfer_from="runs/teacher")
TEACHERS = {
    "softmax": AttentionConfig(),
    "fourier": AttentionConfig(kind="karat", rank=3),
    "universal": AttentionConfig(kind="karat", mode="universal", rank=3),
    "hybrid": AttentionConfig(kind="karat", softmax_heads=1, rank=3),
    "residual": AttentionConfig(kind="karat", residual=True, softmax_heads=1, rank=3),
    "spline": AttentionConfig(kind="karat", basis="bspline", form="full_rank"),
}


def pair(attention: AttentionConfig, dtype: torch.dtype = torch.float64):
    torch.manual_seed(0)
    teacher = Teacher(create_model(SIZE, attention))
    student = create_model(SIZE, STUDENT)
    give_teacher(student, teacher, "runs/teacher")
    return student.to(dtype), teacher


def split(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return qkv.reshape(*qkv.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)


def plain(student, teacher, images: Tensor) -> Tensor:
    """Return the student's logits, computed step by step in both models with every S of the teacher written out."""
    x, y = (model._pos_embed(model.patch_embed(images)) for model in (student, teacher.model))
    for block, guide in zip(student.blocks, teacher.model.blocks, strict=True):
        query, key, value = split(guide.attn.qkv(guide.norm1(y)))
        operator = getattr(guide.attn, "operator", None)
        raw = query @ key.mT / 8**0.5
        learned = raw.softmax(-1) if operator is None else operator.scores(query, key)
        y = y + guide.attn.proj((learned @ value).transpose(1, 2).flatten(2))
        y = y + guide.mlp(guide.norm2(y))
        own = block.attn.value(block.norm1(x)).unflatten(-1, (4, 8)).transpose(1, 2)
        x = x + block.attn.proj((learned.detach() @ own).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    return student.head(student.norm(x)[:, 0])


@pytest.mark.parametrize("name", TEACHERS)
def test_a_student_is_driven_by_the_teachers_matrices(name: str) -> None:
    student, teacher = pair(TEACHERS[name])
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    expected = plain(student, teacher, images)
    torch.testing.assert_close(student(images), expected, rtol=1e-9, atol=1e-9)
    loss = torch.linspace(-1, 1, 15, dtype=torch.float64).view(3, 5)
    parameters = list(student.parameters())
    wanted = torch.autograd.grad((expected * loss).sum(), parameters)
    for got, want in zip(torch.autograd.grad((student(images) * loss).sum(), parameters), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)
    assert all(parameter.grad is None for parameter in teacher.model.parameters())


def test_a_student_owns_neither_query_nor_key_nor_its_teacher() -> None:
    student, teacher = pair(TEACHERS["fourier"], torch.float32)
    names = dict(student.named_parameters())
    assert parameter_count(create_model(SIZE, AttentionConfig())) - parameter_count(student) == 2 * 2 * (32 * 32 + 32)
    assert names["blocks.1.attn.value.weight"].shape == (32, 32)
    assert not any("qkv" in name or "operator" in name or "teacher" in name for name in student.state_dict())
    assert names["blocks.0.attn.value.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    assert teacher_of(student) is teacher
    assert teacher_of(teacher.model) is None


def test_a_copy_has_a_copy_of_the_teacher() -> None:
    student, _ = pair(TEACHERS["fourier"])
    copied = copy.deepcopy(student)
    other, images = torch.randn(2, 2, 3, 16, 16, dtype=torch.float64)
    expected = student(images)
    student(other)
    torch.testing.assert_close(copied(images), expected)


def test_blocks_may_be_recomputed() -> None:
    """A student has the same gradients whatever is recomputed."""
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    for choices in (("attention", "attention"), ("block", "nothing")):
        plain_student, _ = pair(TEACHERS["fourier"])
        student, _ = pair(TEACHERS["fourier"])
        recompute(student, choices)
        for model in (plain_student, student):
            model(images).square().sum().backward()
        for own, other in zip(student.parameters(), plain_student.parameters(), strict=True):
            torch.testing.assert_close(own.grad, other.grad, rtol=1e-12, atol=1e-12)


def test_the_products_of_a_student_are_counted() -> None:
    """In each block a student saves query and key, 2 N D^2 operations each, and scores, 2 N^2 D, against softmax."""
    student, softmax = (flops_per_image(SIZE, attention).forward for attention in (STUDENT, TEACHERS["softmax"]))
    assert softmax - student == 2 * (2 * 2 * 17 * 32**2 + 2 * 17**2 * 32)


SERVED = {
    "repeat": [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]],
    "cycle": [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]],
    "interpolate": [[1.0, 0.0], [2 / 3, 1 / 3], [1 / 3, 2 / 3], [0.0, 1.0]],
}


@pytest.mark.parametrize(
    ("how", "kind", "heads", "more"),
    [
        *((how, kind, 2, 4) for how in SERVED for kind in ("softmax", "fourier", "universal", "spline")),
        ("interpolate", "softmax", 3, 9),  # some heads serve more than others
    ],
)
def test_fewer_heads_serve_more(how: str, kind: str, heads: int, more: int) -> None:
    torch.manual_seed(0)
    teacher = Teacher(create_model(SIZE.changed(num_heads=heads, embed_dim=8 * heads), TEACHERS[kind]))
    student = create_model(SIZE.changed(num_heads=more, embed_dim=8 * more), STUDENT)
    give_teacher(student, teacher, "runs/teacher", how)
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    student.double()(images)
    value = torch.randn(3, more, 17, 8, dtype=torch.float64, requires_grad=True)
    query, key = teacher.query_and_key(1)
    operator = teacher.operator(1)
    own = (query @ key.mT / 8**0.5).softmax(-1) if operator is None else operator.scores(query, key)
    mix = mix_of(how, heads, more).double()
    if more == 4:
        torch.testing.assert_close(mix, torch.tensor(SERVED[how], dtype=torch.float64), rtol=1e-6, atol=1e-6)
    matrices = torch.einsum("ij,bjkq->bikq", mix, own.detach())
    torch.testing.assert_close(teacher.matrices(own), matrices, rtol=1e-6, atol=1e-6)
    expected, output = matrices @ value, teacher.attend(1, value)
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)
    gradients = (torch.autograd.grad(x.sin().sum(), value)[0] for x in (output, expected))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", SERVED)
def test_three_heads_serve_twelve(how: str) -> None:
    mix = mix_of(how, 3, 12)
    torch.testing.assert_close(mix.sum(1), torch.ones(12))
    torch.testing.assert_close(mix.sum(0), torch.full((3,), 4.0) if how != "interpolate" else mix.sum(0).flip(0))
    assert (mix.count_nonzero(1) <= 2).all()


def test_a_teacher_keeps_its_bits_for_images_that_autocast_would_round() -> None:
    """Under autocast, bfloat16 images leave a teacher's weights in float32; on a GPU, images come in bfloat16."""
    student, teacher = pair(TEACHERS["fourier"], torch.float32)
    images = torch.randn(2, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        logits = [student(seen) for seen in (images, images.bfloat16(), images)]
    assert {parameter.dtype for parameter in teacher.model.parameters()} == {torch.float32}
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    teacher.look(images.bfloat16())
    assert {parameter.dtype for parameter in teacher.model.parameters()} == {torch.bfloat16}


class Copies(TorchDispatchMode):
    """A mode that counts copies from the host to `meta` tensors: on a GPU, the host waits for each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.count += (
            isinstance(result, Tensor)
            and result.is_meta
            and any(isinstance(x, Tensor) and x.device.type == "cpu" for x in args)
        )
        return result


def test_a_batch_copies_nothing_to_the_device_to_serve_more_heads() -> None:
    teacher = Teacher(create_model(SIZE.changed(num_heads=2, embed_dim=16), AttentionConfig()))
    teacher.mix_heads(mix_of("repeat", 2, 4))
    images, value = torch.empty(2, 3, 16, 16, device="meta"), torch.empty(2, 4, 17, 8, device="meta")
    teacher.look(images)  # this moves the teacher
    with Copies() as copies:
        teacher.look(images)
        assert teacher.attend(1, value).shape == value.shape
    assert copies.count == 0


def test_heads_that_cannot_serve_are_refused() -> None:
    teacher = Teacher(create_model(SIZE.changed(num_heads=3, embed_dim=24), AttentionConfig()))
    with pytest.raises(
        RecipeError, match=r"transfer_heads = cycle: the 4 heads of this model are not a multiple of the 3"
    ):
        give_teacher(create_model(SIZE, STUDENT), teacher, "runs/x", "cycle")
    with pytest.raises(ValueError, match=r"attention.transfer_heads = cycle has no effect without transfer_from"):
        AttentionConfig(transfer_heads="cycle")


def test_training_mode_does_not_reach_the_teacher() -> None:
    """The teacher stays in evaluation mode while the student trains, so that nothing drops out of its matrices."""
    student, teacher = pair(TEACHERS["softmax"], torch.float32)
    student.train()
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())


def test_a_teacher_follows_the_images_dtype_and_keeps_its_digest() -> None:
    student, teacher = pair(TEACHERS["fourier"], torch.float32)
    digest = teacher.digest
    assert student.bfloat16()(torch.randn(2, 3, 16, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert teacher.digest == digest
    torch.manual_seed(0)
    assert Teacher(create_model(SIZE, TEACHERS["fourier"])).digest == digest
    assert Teacher(create_model(SIZE, TEACHERS["fourier"])).digest != digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 3}, "its depth is 3, this model's is 2"),
        ({"num_heads": 2}, "its number of heads is 2, this model's is 4; use attention.transfer_heads=repeat, cycle"),
        ({"embed_dim": 64}, "its head width is 16, this model's is 8"),
        ({"image_size": 32}, "its image size is 32x32, this model's is 16x16"),
        ({"patch_size": 8}, "its number of tokens is 5, this model's is 17"),
    ],
)
def test_matrices_of_another_shape_are_refused(change: dict[str, int], message: str) -> None:
    teacher = Teacher(create_model(SIZE.model_copy(update=change), AttentionConfig()))
    with pytest.raises(RecipeError, match=f"attention.transfer_from = runs/x: {message}"):
        give_teacher(create_model(SIZE, STUDENT), teacher, "runs/x")


def test_a_student_without_a_teacher_says_so() -> None:
    student = create_model(SIZE, STUDENT)
    assert isinstance(student.blocks[0].attn, TransferredAttention)
    with pytest.raises(RuntimeError, match="before `give_teacher`"):
        student(torch.randn(1, 3, 16, 16))


@pytest.mark.parametrize("kind", ["gated", "differential"])
@pytest.mark.parametrize("softmax_heads", [0, 1])
def test_attention_that_is_no_matrix_of_queries_and_keys_is_refused(softmax_heads: int, kind: str) -> None:
    message = r"attention.transfer_from = runs/teacher: its attention is not a matrix of queries and keys times the"
    with pytest.raises(RecipeError, match=message):
        pair(AttentionConfig(kind=kind, softmax_heads=softmax_heads))
