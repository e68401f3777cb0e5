"""How time and memory of attention grow with the number of tokens: `python -m benchmarks.attention_curve N...`."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from karat_scale.commands.bench.training import case_of
from karat_scale.commands.measure.attention import SDPA, Case, passes, peak_memory, seconds_of
from karat_scale.commands.parsers.preparing import add_attention_options
from karat_scale.foundation.arguments import OneLineParser, count
from karat_scale.foundation.console import print_table, write_json
from karat_scale.foundation.errors import run_script

AUTO = "auto"


def main(arguments: list[str] | None = None) -> None:
    """Measure forward and backward at each N, print the curve with its exponents, and write the file of `--json`."""
    parser = OneLineParser(prog="python -m benchmarks.attention_curve", description=__doc__)
    parser.add_argument("tokens", type=count, nargs="+", metavar="N", help="numbers of tokens")
    add_attention_options(parser)
    options = parser.parse_args(arguments)
    tokens, case = options.tokens, case_of(options, options.tokens[0])
    case.check()
    points = [curve_point(replace(case, tokens=n), options.rounds, options.threads) for n in tokens]
    exponents = {
        "time": growth(tokens, [point["forward_backward_ms"] for point in points]),
        "memory": growth(tokens, [point["peak_mb"] for point in points]),
    }
    result = {**asdict(case), "tokens": tokens, "device_name": case.device_name, "threads": options.threads}
    result |= {"rows": points, "exponents": exponents}
    _print(result)
    write_json(options.json, result)


def curve_point(case: Case, rounds: int, threads: int) -> dict[str, Any]:
    """Time and peak memory of the operator at the case's N, and their ratios to SDPA's."""
    contenders = (SDPA, AUTO)
    memory = {name: peak_memory(name, case) for name in contenders}
    runs = {name: passes(case.attend_by(name), case.inputs())[1] for name in contenders}
    both = seconds_of(runs, case.device, rounds, threads)
    return {
        "tokens": case.tokens,
        "forward_backward_ms": round(1e3 * both.median(AUTO), 3),
        "peak_mb": round(memory[AUTO], 2),
        "ratio_forward_backward": round(both.ratio(AUTO, SDPA), 3),
        "ratio_memory": round(memory[AUTO] / memory[SDPA], 3),
    }


def growth(sizes: Sequence[float], figures: Sequence[float]) -> float | None:
    """The k of figure ~ size^k, by least squares of the logarithms; None for a single size."""
    if len(set(sizes)) < 2:
        return None
    slope, _ = statistics.linear_regression([math.log(x) for x in sizes], [math.log(y) for y in figures])
    return round(slope, 3)


def _print(result: dict[str, Any]) -> None:
    title = f"ViT-{result['model'].capitalize()} batch {result['batch']}, {result['basis']} {result['form']}, "
    title += f"grid {result['grid']}, {result['dtype']}, forward and backward on {result['device_name']}"
    rows = []
    for row in result["rows"]:
        time = (f"{row['forward_backward_ms']:.1f}", f"{row['ratio_forward_backward']:.2f}")
        rows.append((f"{row['tokens']}", *time, f"{row['peak_mb']:.1f}", f"{row['ratio_memory']:.2f}"))
    print_table(title, ("N", "ms", "to SDPA", "MB", "to SDPA"), rows, texts=())
    if result["exponents"]["time"] is not None:
        print(f"time grows as N^{result['exponents']['time']}, memory as N^{result['exponents']['memory']}")


if __name__ == "__main__":
    run_script(main)
