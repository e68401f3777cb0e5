"""The page of `karat data`: one HTML file that opens offline, with every text escaped."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from karat_scale.analysis.figures import new_figure, rendered
from karat_scale.errors import DataError
from karat_scale.files import write_atomically
from karat_scale.html_page import render_page
from karat_scale.look.split_facts import SplitFacts

Pictures = Mapping[str, Mapping[str, Sequence[bytes]]]
"""Small JPEGs by split and class."""


def write_page(path: Path, place: str, splits: Sequence[SplitFacts], pictures: Pictures) -> None:
    """Write the page. Raises DataError if the file cannot be written."""
    charts = {one.name: _charts(one) for one in splits}
    page = render_page("karat_scale.look", "data.html.j2", place=place, splits=splits, pictures=pictures, charts=charts)
    try:
        write_atomically(path, page)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}; choose another --out") from error


def _charts(facts: SplitFacts) -> bytes:
    """Return histograms of the sampled sizes and of the classes' sizes, as a PNG."""
    figure = new_figure(12, 2.6)
    left, middle, right = figure.subplots(1, 3)
    if len(facts.sizes):
        left.scatter(facts.sizes[:, 0], facts.sizes[:, 1], s=4, alpha=0.4)
        middle.hist(facts.sizes[:, 0] / facts.sizes[:, 1], bins=40)
    left.set(xlabel="width", ylabel="height", title="pixels")
    middle.set(xlabel="width / height", ylabel="images", title="aspect ratio")
    right.plot(sorted(facts.per_class.values(), reverse=True))
    right.set(xlabel="class, largest first", ylabel="images", title="images of a class", ylim=(0, None))
    return rendered(figure, dpi=110)
