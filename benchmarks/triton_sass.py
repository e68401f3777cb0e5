"""The Triton kernels' cost on an H100, predicted: `python -m benchmarks.triton_sass [--grid 3] [--heads 6]`.

Compiles a forward and a backward pass for sm_90 through Triton's own binder, counts registers, spills and instructions
in what ptxas made, and predicts times against softmax attention by FlashAttention-2. A prediction within 30 % at best:
no cache, no stall and no clock was measured.
"""

import argparse

from karat_scale.attention.kernels.triton_tiles import Sizes, padded_tokens
from tests.attention.kernels.operator_launches import Compiled, compiled, count_instructions, launch, loops

CLOCK, MULTIPROCESSORS, SCHEDULERS = 1.80e9, 132, 4
# Instructions a clock and scheduler: 0.8 where three programs of four warps or more fit, less with two.
IPC, IPC_OF_TWO = 0.8, 0.7
HBM, L2 = 2.8e12, 5.6e12  # bytes a second
TAIL, BETWEEN_KERNELS = 1.1, 2.5e-6
# FlashAttention-2 on tokens padded to 256, in FLOP/s.
SDPA_FORWARD, SDPA_BACKWARD = 260e12, 190e12
REGISTERS = 65536
# Sines, cosines and exponentials a clock and scheduler, of 32 in an instruction: 16 a clock and multiprocessor.
SPECIAL = 4 / 32


def main() -> None:
    """Prints a line a kernel and the predicted ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("batch", 256), ("heads", 6), ("tokens", 197), ("width", 64), ("rank", 12), ("grid", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    asked = parser.parse_args()
    # Small tensors: a launch's arguments do not show in the code but for the number of programs.
    sizes = Sizes(2, asked.heads, asked.tokens, asked.width, asked.width, asked.rank, asked.grid)
    ahead, back, driver = launch(90, sizes)
    binaries = iter(compiled(driver, sizes))  # one for each launch, in order: G above 3 launches a kernel twice
    forward = backward = 0.0
    print(f"{'kernel':18} {'registers':>9} {'stack':>5} {'shared':>7} {'a score':>7} {'predicted':>10}")
    for launched in (*ahead, *back):
        kernel = next(binaries)
        assert kernel.name == launched.name
        seconds = max(issue_seconds(kernel, asked), memory_seconds(kernel.name, asked)) * TAIL + BETWEEN_KERNELS
        per_score = "" if kernel.loop_per_score is None else f"{kernel.loop_per_score:.1f}"
        resources = f"{kernel.registers:9} {kernel.stack:5} {kernel.shared:7}"
        print(f"{kernel.name:18} {resources} {per_score:>7} {seconds * 1e6:7.0f} us")
        if launched in ahead:
            forward += seconds
        else:
            backward += seconds
    flops = 4 * padded_tokens(asked.tokens) ** 2 * 64 * asked.batch * asked.heads * asked.width / 64
    ahead_of, back_of = flops / SDPA_FORWARD, 2.5 * flops / SDPA_BACKWARD
    print(f"forward  {forward * 1e6:6.0f} us, {forward / ahead_of:.2f} x SDPA")
    print(f"backward {backward * 1e6:6.0f} us, {backward / back_of:.2f} x SDPA")
    print(f"both     {(forward + backward) * 1e6:6.0f} us, {(forward + backward) / (ahead_of + back_of):.2f} x SDPA")


def issue_seconds(kernel: Compiled, asked: argparse.Namespace) -> float:
    """The time to issue all instructions of the kernels that score, or in their main loops to compute its sines and
    cosines where that is longer; 0 for others, which wait for memory."""
    if kernel.loop_per_score is None:
        return 0.0
    spans = [span for span in loops(kernel.code) if any("MMA" in line for line in kernel.code[slice(*span)])]
    inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    body = min(length(kernel, span) for span in inner)
    scores = round(body / kernel.loop_per_score * 32 * kernel.warps)
    # All that is outside the main loop runs once for an image and tile: whole for a program of one image, at most
    # what the loop over images holds otherwise.
    around = max((length(kernel, span) for span in spans if span not in inner), default=0)
    around = around or count_instructions(kernel.code)
    own = {"forward_kernel": 128, "grad_query_kernel": 64, "grad_key_kernel": 64}[kernel.name]
    steps = -(-asked.tokens * own // scores)
    tiles = -(-asked.tokens // own) * asked.batch * asked.heads
    fitting = REGISTERS // (kernel.registers * 32 * kernel.warps) * kernel.warps
    ipc = IPC if fitting >= 12 or kernel.name == "grad_query_kernel" else IPC_OF_TWO
    special = sum("MUFU" in line for line in kernel.code[slice(*min(inner, key=lambda span: length(kernel, span)))])
    clocks = steps * max(body / ipc, special / SPECIAL) + (around - body) / ipc
    return tiles * kernel.warps * clocks / (MULTIPROCESSORS * SCHEDULERS * CLOCK)


def length(kernel: Compiled, span: tuple[int, int]) -> int:
    """Instructions of a loop's body."""
    return count_instructions(kernel.code[slice(*span)])


def memory_seconds(name: str, asked: argparse.Namespace) -> float:
    """The time to move the bytes that a kernel must."""
    items = asked.batch * asked.heads
    rows = items * asked.tokens * 2
    wide, narrow = rows * asked.width, rows * 16
    partial = asked.heads * padded_tokens(asked.tokens) * 16 * 4 * (2 * asked.grid * 22 + 88)
    moved = {
        "prepare_kernel": wide,
        "forward_kernel": 3 * wide + narrow,
        "readout_kernel": 3 * wide + 2 * narrow + partial / 3,
        "grad_query_kernel": 3 * wide + narrow,
        "grad_key_kernel": 3 * wide + narrow + partial,
        "reduce_kernel": partial,
    }[name]
    # The readout reads the gradient of the output a second time.
    again = wide / L2 if name == "readout_kernel" else 0.0
    return moved / HBM + again


if __name__ == "__main__":
    main()
