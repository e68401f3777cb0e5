"""Find what runs on this machine: each implementation of KArAt attends over a few tokens, each decoder reads a JPEG."""

import time
import warnings
from collections.abc import Iterator
from typing import Any

from karat_scale.commands.doctor.report import Finding, found
from karat_scale.foundation.tables import DECODERS

SIDE = 32
BATCH, HEADS, TOKENS, WIDTH, RANK, GRID = 1, 1, 16, 16, 4, 2


def examine_attention() -> Iterator[Finding]:
    """Yield one finding per implementation: it runs, or the reason why not."""
    import torch

    from karat_scale.attention.functional import AUTOMATIC, IMPLEMENTATIONS

    cuda = torch.cuda.is_available()
    runs = []
    for name in IMPLEMENTATIONS:
        device = "cuda" if cuda and name != "cpu" else "cpu"
        begun = time.perf_counter()
        refusal = _attention_refusal(name, device)
        seconds = time.perf_counter() - begun
        if refusal is None:
            runs.append(name)
            yield found(f"attention {name}", f"runs on {device}", runs=True, device=device, seconds=round(seconds, 3))
        else:
            fix = "" if name == "triton" and not cuda else "auto uses another one; if a recipe names it, it is refused"
            yield Finding(
                f"attention {name}",
                "note",
                f"cannot run: {refusal}",
                fix,
                {"runs": False, "device": device, "seconds": round(seconds, 3)},
            )
    chosen = next(name for name in AUTOMATIC if name in runs and (name != "cpu" or not cuda))
    yield found("attention auto", f"uses {chosen}", chosen=chosen)


def _attention_refusal(implementation: str, device: str) -> str | None:
    """Return the reason why the implementation cannot attend, or None if it can, including its gradient."""
    import torch

    from karat_scale.attention import fourier_karat_attention

    def random(*shape: int) -> Any:
        return torch.randn(*shape, device=device, requires_grad=True)

    query, key, value = (random(BATCH, HEADS, TOKENS, WIDTH) for _ in range(3))
    cos_coef, sin_coef = (random(HEADS, RANK, TOKENS, GRID) for _ in range(2))
    proj = random(HEADS, TOKENS, RANK)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a failed build warns, and then raises the same as an error
            output = fourier_karat_attention(query, key, value, cos_coef, sin_coef, proj, implementation=implementation)
            output.sum().backward()
    except ValueError as error:
        return str(error).partition("cannot take this call: ")[2] or str(error)
    except Exception as error:  # a kernel that does not compile or launch
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def examine_decoders() -> Iterator[Finding]:
    """Yield one finding per decoder of the folder and webdataset backends: it runs, or the reason why not."""
    runs = []
    for name in DECODERS:
        refusal = _decoder_refusal(name)
        if refusal is None:
            runs.append(name)
            yield found(f"decoder {name}", "runs", runs=True)
        else:
            yield found(f"decoder {name}", "cannot run", refusal, runs=False)
    if runs:
        yield found("decoder auto", f"uses {runs[0]}", chosen=runs[0])


def _decoder_refusal(name: str) -> str | None:
    """Return the reason why the decoder cannot read a JPEG, or None if it can."""
    from karat_scale.data.decoders import make_decoder
    from karat_scale.data.decoders.decode import blank_jpeg
    from karat_scale.data.decoders.view import crop_view
    from karat_scale.recipe import DataConfig

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a failed build warns, and then raises the same as an error
            decoder = make_decoder(DataConfig.model_validate({"path": "-", "decoder": name}), "bicubic")
        decoder.read(blank_jpeg(SIDE), lambda width, height: crop_view((0, 0, width, height), SIDE // 2))
    except Exception as error:  # any error of a broken library
        return " ".join(str(error).split()).removeprefix(f"data.decoder = {name} cannot run: ")
    return None
