"""Render docs/reproduction.md from the paper's tables and the records. The page has no other source."""

from collections.abc import Iterable, Sequence

from karat_scale.ledger.match import budget_mark, command_of_record, command_of_row, repeats
from karat_scale.ledger.paper import PaperRow, PaperTable, paper_tables
from karat_scale.ledger.record import Record
from karat_scale.recipe.files import shipped_recipes

_TOP = """# Reproduction

This page lists every row of the tables of [arXiv 2503.10632](https://arxiv.org/abs/2503.10632). Where we have a run of
the same recipe, it is in the column `ours`. `karat ledger RUN` generates this page from the paper's figures
(`karat_scale/ledger/paper.yaml`) and the runs' own summaries (`docs/ledger/`). Do not edit it: a test compares it with
both.

Accuracies are top-1 / top-5 in percent after the last epoch, not the best of all epochs. A row marked *short* was
trained on fewer images than the paper's model, and a row marked *long* on more; do not compare such a figure with the
paper's. The column `recipe` has the first digits of the recipe's SHA-256. Each figure links to the run's summary, whole
recipe, hardware and versions. DIR is the directory of the data. With torchrun, the same commands use more GPUs.
"""
_HEAD = ("model", "parameters", "paper", "ours", "budget", "hardware", "seed", "recipe", "command")
_OTHER = """## Other runs

These runs do not repeat a row of the paper.
"""
PAGE = "reproduction.md"
_NOT_YET = "not yet run"


def render_page(records: Sequence[Record]) -> str:
    """Return the whole page as Markdown."""
    used: set[str] = set()
    parts = [_TOP]
    for table in paper_tables():
        parts.append(_render_table(table, records, used))
    others = [record for record in records if record.name not in used]
    if others:
        parts.append(_OTHER)
        parts.append(_table(_HEAD, (_other_row(record) for record in others)))
    return "\n".join(parts)


def _render_table(table: PaperTable, records: Sequence[Record], used: set[str]) -> str:
    rows = []
    for row in table.rows:
        found = [record for record in records if repeats(record, row, table)]
        used.update(record.name for record in found)
        rows += [_ours(table, row, record) for record in found] or [_not_yet(table, row)]
    note = f"\n{table.note}\n" if table.note else ""
    head = list(_HEAD)
    if table.measure == "memory":
        head[2] = "paper; GFLOPs of the activation / in total"
    return f"## {table.title}\n{note}\n{_table(head, rows)}"


def _not_yet(table: PaperTable, row: PaperRow) -> tuple[str, ...]:
    command = f"`{command_of_row(row)}`" if row.recipe in shipped_recipes() else ""
    return row.model, _parameters(row), _paper(table, row), _NOT_YET, "", "", "", "", command


def _ours(table: PaperTable, row: PaperRow, record: Record) -> tuple[str, ...]:
    mark = budget_mark(record, row, table) if table.measure == "accuracy" else ""
    figure = f"{f'*{mark}:* ' if mark else ''}[{_figure(table, record)}](ledger/{record.name}.json)"
    return row.model, _parameters(row, record), _paper(table, row), figure, *_circumstances(record)


def _other_row(record: Record) -> tuple[str, ...]:
    figure = f"[{record.figures.last_top1:.2f} / {record.figures.last_top5:.2f}](ledger/{record.name}.json)"
    return record.resolved.run.name, _millions(record), "", figure, *_circumstances(record)


def _circumstances(record: Record) -> tuple[str, ...]:
    figures = record.figures
    budget = f"{record.epochs:.4g} x {record.epoch_images:,} images"
    if rate := figures.images_per_second:
        budget += f", {figures.samples / rate / 3600:.2g} h of training"
    ranks = f"{figures.world_size} x " if figures.world_size > 1 else ""
    hardware = ranks + figures.device.replace("CPU", figures.processor, 1 if figures.device.startswith("CPU") else 0)
    seed = str(record.resolved.run.seed)
    command = f"`{command_of_record(record)}`".replace("``", "a recipe that is not shipped")
    return budget, hardware, seed, f"`{record.recipe_sha256[:12]}`", command


def _figure(table: PaperTable, record: Record) -> str:
    if table.measure == "memory":
        return f"{record.figures.peak_memory_mb / 1000:.2f} GB"
    return f"{record.figures.last_top1:.2f} / {record.figures.last_top5:.2f}"


def _paper(table: PaperTable, row: PaperRow) -> str:
    if table.measure == "memory":
        return f"{row.memory:g} GB" + (f"; {row.gflops[0]:g} / {row.gflops[1]:g}" if row.gflops else "")
    return " / ".join(f"{figure:.2f}" for figure in (row.top1, row.top5) if figure is not None)


def _parameters(row: PaperRow, record: Record | None = None) -> str:
    paper = f"{row.parameters:.2f} M" if row.parameters else ""
    return f"{paper}{', ' if paper else ''}ours {_millions(record)}" if record else paper


def _millions(record: Record) -> str:
    return f"{record.figures.parameters / 1e6:.2f} M"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
