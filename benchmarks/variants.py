"""What each kind of attention costs over softmax: `python -m benchmarks.variants`.

Forward and backward of the operator alone, in fp32 on one thread, against scaled_dot_product_attention, interleaved, in
processor time. The sizes are those of ViT-Tiny at 224 px. Each kind runs as a recipe runs it (`implementation: auto`).
"""

from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.attention_trials import ARMS, GONE, RECIPE
from karat_scale.attention.operator import layer_input
from karat_scale.commands.measure.attention import passes
from karat_scale.commands.measure.interleaved import interleaved_seconds, processor_seconds
from karat_scale.foundation.arguments import OneLineParser, count, new_file
from karat_scale.foundation.console import print_table, write_json
from karat_scale.foundation.errors import run_script
from karat_scale.foundation.tables import ATTENTIONS
from karat_scale.models.operators import operator_maker
from karat_scale.recipe.loading import load_recipe

SOFTMAX = "softmax"
# Those of the experiment, and the other kinds of `attention.kind`.
KINDS = {arm: overrides for arm, overrides in ARMS.items() if arm not in (SOFTMAX, *GONE)}
KINDS |= {kind: [f"attention.kind={kind}"] for kind in ATTENTIONS if kind != SOFTMAX and kind not in KINDS}
HEADS, WIDTH = 3, 64


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a table, and write the file of `--json`."""
    parser = OneLineParser(prog="python -m benchmarks.variants", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=KINDS, help="(default: all)")
    parser.add_argument("--batch", type=count, default=8, help="(default: %(default)s)")
    parser.add_argument("--tokens", type=count, default=197, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=count, default=9, help="interleaved rounds (default: %(default)s)")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="also write all figures to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    shape = options.batch, HEADS, options.tokens, WIDTH
    torch.manual_seed(0)
    inputs = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    tokens = torch.randn(options.batch, options.tokens, HEADS * WIDTH)
    both = {SOFTMAX: passes(scaled_dot_product_attention, inputs)[1]}
    for arm in options.only or KINDS:
        attention = load_recipe(RECIPE, ["data.path=.", *KINDS[arm]]).attention
        heads = operator_maker(attention)(options.tokens, HEADS, WIDTH)
        attend = partial(heads, **layer_input(heads, tokens))
        both[arm] = passes(attend, inputs, tuple(heads.parameters()))[1]
    seconds = interleaved_seconds(both, options.rounds, processor_seconds)
    ratios = {arm: round(seconds.ratio(arm, SOFTMAX), 2) for arm in both}
    title = f"forward and backward at {list(shape)}, over scaled_dot_product_attention"
    print_table(title, ("kind of attention", "time"), [(arm, f"{ratio:.2f}") for arm, ratio in ratios.items()])
    write_json(options.json, {"shape": shape, "rounds": options.rounds, "ratios": ratios})


if __name__ == "__main__":
    run_script(main)
