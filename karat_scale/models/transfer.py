"""Attention transfer: a model uses the attention matrices of a trained model, and learns what to do with the values.

O = S_teacher V_student, block by block and head by head, on the same images (arXiv 2503.10632, "Attention transfer").
S is not formed: the teacher's operator receives its own query and key and the student's value, O = H (W^T V). A student
with more heads uses each of the teacher's heads several times.
"""

import functools
import hashlib
from typing import Any, Protocol

import torch
from timm.layers import Attention
from torch import Tensor, nn
from torch.nn import functional

from karat_scale.attention.call import autocast_is_on
from karat_scale.foundation.errors import RecipeError
from karat_scale.models.hosts import join_heads, num_tokens
from karat_scale.models.layers import attention_layers
from karat_scale.models.operators import heads_of


class Matrices(Protocol):
    """An object that provides the attention matrices S of each block."""

    def attend(self, block: int, value: Tensor) -> Tensor:
        """Return O = S V [B, h, N, d] for value [B, h, N, d]."""


class Teacher:
    """A trained, frozen model, softmax or KArAt. It processes each batch first, and keeps each block's query and key.

    It is not a module, so a student holds it without owning it: code that trains, casts, shards or saves the student's
    parameters does not see the teacher's.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model.eval().requires_grad_(False)
        self.digest = weights_digest(model)
        """The digest that identifies a teacher, whatever it is cast to."""
        self.mix: Tensor | None = None
        """M [student's heads, own heads]: the student's matrices are M S. None if they are S."""
        self._passes: list[tuple[Tensor, Tensor]] = []
        self._queries: dict[int, Tensor] = {}
        self._keys: dict[int, Tensor] = {}
        self.attentions = [layer.attention for layer in attention_layers(model)]
        for number, attention in enumerate(self.attentions):
            attention.q_norm.register_forward_hook(functools.partial(_keep, self._queries, number))
            attention.k_norm.register_forward_hook(functools.partial(_keep, self._keys, number))

    @torch.no_grad()
    def look(self, images: Tensor) -> None:
        """Process normalised images [B, 3, H, W]; the teacher follows their device and, without autocast, dtype."""
        weight = next(self.model.parameters())
        # Under autocast the images may be in 16 bits, and the student's weights are not.
        dtype = weight.dtype if autocast_is_on(images.device.type) else images.dtype
        if (weight.device, weight.dtype) != (images.device, dtype):  # a tracer cannot move it
            self.model.to(images.device, dtype)
            # Here, since a copy to a GPU in each block would stop the host each time.
            self._passes = [(at.to(images.device), weights.to(images.device)) for at, weights in self._passes]
        self.model.forward_features(images)

    def query_and_key(self, block: int) -> tuple[Tensor, Tensor]:
        """Return query and key of the last batch, [B, h, N, d] each, after timm's norms of them."""
        return self._queries[block], self._keys[block]

    def operator(self, block: int) -> nn.Module | None:
        """Return the block's learned operator; None for softmax."""
        operator: nn.Module | None = getattr(self.attentions[block], "operator", None)
        return operator

    def mix_heads(self, mix: Tensor) -> None:
        """Set `mix`."""
        self.mix = mix
        self._passes = _passes(mix)

    def matrices(self, learned: Tensor) -> Tensor:
        """Return the student's matrices [B, h, N, N] from the teacher's own, S or A."""
        return learned if self.mix is None else torch.einsum("ij,bjkq->bikq", self.mix.to(learned), learned)

    def attend(self, block: int, value: Tensor) -> Tensor:
        """Return O = S V [B, h, N, d] for a student's value [B, h, N, d]; only the value gets a gradient."""
        if self.mix is None:
            return self._attend(block, value)
        output = torch.zeros_like(value)
        for students, weights in self._passes:
            at = students.to(value.device)
            own = self._attend(block, value[:, at]) * weights.to(value)[:, None, None]
            output = output.index_add(1, at, own.to(output.dtype))
        return output

    def _attend(self, block: int, value: Tensor) -> Tensor:
        query, key = (x.to(value.dtype) for x in self.query_and_key(block))
        operator = self.operator(block)
        if operator is None:
            return functional.scaled_dot_product_attention(query, key, value)
        output: Tensor = operator(query, key, value)
        return output


class TransferredAttention(Attention):
    """timm's attention layer without query and key: another model's matrices map the values to the output.

    `give_teacher` sets `teacher` and the number of the layer, `block`.
    """

    teacher: Matrices | None = None
    block = -1

    def __init__(self, dim: int, **kwargs: Any) -> None:
        super().__init__(dim, **kwargs)
        if self.attn_drop.p:
            raise ValueError("attn_drop has no meaning with transferred attention: the matrix is never formed")
        self.value = nn.Linear(dim, self.attn_dim, bias=self.qkv.bias is not None)
        del self.qkv, self.q_norm, self.k_norm

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Compute attention: tokens [B, N, D] to tokens [B, N, D]."""
        if attn_mask is not None or is_causal:
            raise ValueError("transferred attention takes no mask: its matrices are those of the teacher")
        if self.teacher is None:
            raise RuntimeError("a model with attention.transfer_from computes nothing before `give_teacher`")
        value = self.value(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        return join_heads(self, x, self.teacher.attend(self.block, value))


def mix_of(how: str, theirs: int, ours: int) -> Tensor:
    """Return M [ours, theirs] for `attention.transfer_heads` other than `same`, float32."""
    if how == "interpolate":
        place = torch.arange(ours) * ((theirs - 1) / max(ours - 1, 1))
        return (1 - (place[:, None] - torch.arange(theirs)).abs()).clamp(min=0)
    heads = torch.arange(ours)
    return functional.one_hot(heads % theirs if how == "cycle" else heads // (ours // theirs), theirs).float()


def _passes(mix: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return passes through all heads of the teacher: for each head, a student's head and its weight."""
    users = [column.nonzero().flatten().tolist() for column in mix.mT]
    passes = []
    for number in range(max(map(len, users))):
        # A head that has no more users computes for its first user again, with weight 0.
        at = [
            (own[number], float(mix[own[number], j])) if number < len(own) else (own[0], 0.0)
            for j, own in enumerate(users)
        ]
        passes.append((torch.tensor([student for student, _ in at]), torch.tensor([weight for _, weight in at])))
    return passes


def give_teacher(student: Any, teacher: Teacher, source: str, heads: str = "same") -> None:
    """Set the teacher of a model whose layers are TransferredAttention.

    Args:
        source: where the teacher came from, for error messages.
        heads: `attention.transfer_heads`.

    Raises:
        RecipeError: the teacher's matrices do not have the student's shape.
    """
    for what, theirs, ours in zip(_SHAPE, _shape(teacher.model), _shape(student), strict=True):
        if what == _HEADS and heads != "same":
            if ours % theirs:
                raise RecipeError(
                    f"attention.transfer_heads = {heads}: the {ours} heads of this model are not a multiple of the "
                    f"{theirs} of {source}; set model.num_heads to a multiple"
                )
            teacher.mix_heads(mix_of(heads, theirs, ours))
        elif theirs != ours:
            fix = "they must be the same"
            if what == _HEADS and ours % theirs == 0:
                fix = "use attention.transfer_heads=repeat, cycle or interpolate"
            raise RecipeError(
                f"attention.transfer_from = {source}: its {what} is {theirs}, this model's is {ours}; {fix}"
            )
    layers = attention_layers(student)
    if any(heads and (heads.sees_input or not heads.is_linear) for heads in map(heads_of, teacher.attentions)):
        raise RecipeError(
            f"attention.transfer_from = {source}: its attention is not a matrix of queries and keys times the values, "
            "so it cannot be given to another model; use a run of another attention.kind"
        )
    for number, layer in enumerate(layers):
        layer.attention.teacher, layer.attention.block = teacher, number
    # A partial, unlike a closure, gives a copied model its own copy of the teacher.
    student.patch_embed.register_forward_pre_hook(functools.partial(_look, teacher))
    setattr(student, _TEACHER, teacher)


def teacher_of(model: nn.Module) -> Teacher | None:
    """Return the teacher of a student; None for any other model."""
    teacher: Teacher | None = getattr(model, _TEACHER, None)
    return teacher


def weights_digest(model: nn.Module) -> str:
    """Return the SHA-256 of a model's weights by name, as float32: the same wherever and however they are stored."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


_TEACHER = "_karat_teacher"
_HEADS = "number of heads"
_SHAPE = ("image size", "number of tokens", "depth", _HEADS, "head width")


def _shape(model: Any) -> tuple[Any, ...]:
    layers = attention_layers(model)
    attention = layers[0].attention
    size = "x".join(map(str, model.patch_embed.img_size))
    return size, num_tokens(model), len(layers), attention.num_heads, attention.head_dim


def _look(teacher: Teacher, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    teacher.look(inputs[0])


def _keep(kept: dict[int, Tensor], number: int, _: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
    kept[number] = output
