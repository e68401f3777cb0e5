"""Find the image decoders that run on this machine: each reads a JPEG."""

import warnings
from collections.abc import Iterator

from karat_scale.doctor.finding import Finding, found
from karat_scale.tables import DECODERS

SIDE = 32


def examine_decoders() -> Iterator[Finding]:
    """Yield one finding per decoder of the folder and webdataset backends: it runs, or the reason why not."""
    runs = []
    for name in DECODERS:
        refusal = _refusal(name)
        if refusal is None:
            runs.append(name)
            yield found(f"decoder {name}", "runs", runs=True)
        else:
            yield found(f"decoder {name}", "cannot run", refusal, runs=False)
    if runs:
        yield found("decoder auto", f"uses {runs[0]}", chosen=runs[0])


def _refusal(name: str) -> str | None:
    """Return the reason why the decoder cannot read a JPEG, or None if it can."""
    from karat_scale.data.decode import small_jpeg
    from karat_scale.data.decoders import make_decoder
    from karat_scale.data.view import crop_view
    from karat_scale.recipe import DataConfig

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a failed build warns, and then raises the same as an error
            decoder = make_decoder(DataConfig.model_validate({"path": "-", "decoder": name}), "bicubic")
        decoder.read(small_jpeg(SIDE), lambda width, height: crop_view((0, 0, width, height), SIDE // 2))
    except Exception as error:  # any error of a broken library
        return " ".join(str(error).split()).removeprefix(f"data.decoder = {name} cannot run: ")
    return None
