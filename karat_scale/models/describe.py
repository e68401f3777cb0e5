"""What a model's attention is, in the words of its recipe."""

from karat_scale.console import plural
from karat_scale.recipe import AttentionConfig
from karat_scale.recipe.attention import VARIANTS

KARAT = "Kolmogorov-Arnold attention"
_KINDS = {
    "softmax": "softmax attention",
    "karat": KARAT,
    "static": "a learned constant matrix as attention",
    "static_softmax": "softmax attention plus a learned constant matrix",
    "scaled_softmax": "softmax attention times a learned gain",
}


def describe_attention(attention: AttentionConfig) -> str:
    """Return a phrase such as `softmax attention times a learned gain (blockwise, 1 softmax head)`."""
    if attention.transfer_from:
        return f"attention transferred from {attention.transfer_from}"
    if attention.kind == "softmax":
        return _KINDS["softmax"]
    is_ours = attention.kind == "karat" and (attention.form in VARIANTS or not attention.scores)
    name = _KINDS[attention.kind]
    return f"{'a variant of ' if is_ours else ''}{name} ({', '.join(_details(attention))})"


def _details(attention: AttentionConfig) -> list[str]:
    is_karat = attention.kind == "karat"
    details = {
        attention.basis: is_karat,
        attention.form: is_karat,
        attention.mode: True,
        f"grid {attention.grid}": is_karat,
        f"rank {attention.rank}": is_karat and attention.form != "full_rank",
        "on the simplex": attention.simplex is True,
        "hidden units on the simplex": attention.simplex == "hidden",
        "without scores": not attention.scores,
        "residual": attention.residual,
        plural(attention.softmax_heads, "softmax head"): attention.softmax_heads > 0,
    }
    return [detail for detail, applies in details.items() if applies]
