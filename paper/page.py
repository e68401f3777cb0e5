"""Render docs/reproduction.md from the paper's tables and the records. The page has no other source."""

import statistics
from collections.abc import Iterable, Sequence

from karat_scale.commands.evaluate.predictions import Evaluation
from paper.counted import counted
from paper.match import budget_mark, by_recipe, command_of_record, command_of_row, repeats
from paper.paper import PaperGroup, PaperRow, PaperTable, paper_groups
from paper.record import Record

_TOP = """# Reproduction

This page has a row for every figure in the tables of [arXiv 2503.10632](https://arxiv.org/abs/2503.10632) that a run
can have. Where we have a run of the same recipe, it is in the column `ours`. `python -m paper RUN` generates this page
from the paper's figures (`paper/paper.yaml`) and the runs' own summaries (`docs/ledger/`). Do not edit it:
a test compares it with both. Table 14 has no rows here: its models are KANs without attention, which karat_scale does
not train.

Accuracies are top-1 / top-5 in percent after the last epoch, not the best of all epochs. A row marked *short* was
trained on fewer images than the paper's model, and a row marked *long* on more; do not compare such a figure with the
paper's. Runs that differ only in their seed have a row with their mean and, after ±, their standard deviation. A figure
of the paper marked ! is at odds with another place of the paper, as the lines below its table say. The column `recipe`
has the first digits of the recipe's SHA-256. Each figure links to the run's summary, whole recipe, hardware and
versions. DIR is the directory of the data. With `karat launch` before them, the same commands use more GPUs.
"""
_HEAD = ("model", "parameters", "paper", "counted", "ours", "budget", "hardware", "seed", "recipe", "command")
_PAPER = {
    "accuracy": "paper",
    "memory": "paper; GFLOPs of the activation / in total; parameters of the operators",
    "detection": "paper: box AP / AP50 / AP75; mask AP / AP50 / AP75",
}
_OTHER = """## Other runs

These runs do not repeat a row of the paper.
"""
_EXPERIMENTS = """## Experiments

The runs of the [comparison of kinds of attention](experiments/attention_results.md) do not repeat a row of the paper.
Each has a record like those of this page, in `docs/experiments/attention/`.
"""
_TEST_SETS = """## Other test sets

Top-1 / top-5 in percent on test sets of `karat eval --on`, `--labels` and `--corrupt`. If a set has only some of the
run's classes, the model chose among these. Figures of corrupted images are means over corruptions and severities.
"""
PAGE = "reproduction.md"
_NOT_YET = "not yet run"


def render_page(records: Sequence[Record]) -> str:
    """Return the whole page as Markdown."""
    used: set[str] = set()
    groups = [(group, _render_group(group, records, used)) for group in paper_groups()]
    others = [record for record in records if record.name not in used]
    parts = [_TOP, _contents([group for group, _ in groups], bool(others)), *(text for _, text in groups), _EXPERIMENTS]
    if others:
        rows = [row for group in by_recipe(others) for row in _other_rows(group)]
        parts += [_OTHER, _table(_HEAD, rows)]
    if rows := [row for record in records for row in _test_rows(record)]:
        parts += [_TEST_SETS, _table(("run", "test set", "accuracy", "images", "classes", "checkpoint"), rows)]
    return "\n".join(parts)


def _test_rows(record: Record) -> list[tuple[str, ...]]:
    run = f"[{record.name}](ledger/{record.name}.json)"
    found = [Evaluation.model_validate({"source": "", "identity": "", **one}) for one in record.evaluations]
    return [
        (
            run,
            one.name.replace("|", " "),
            _percents(figure for figure in (one.top1, one.top5) if figure is not None),
            f"{one.images:,}",
            f"{one.among} of {one.classes:,}",
            f"`{one.checkpoint}`, {one.weights}",
        )
        for one in found
    ]


def _contents(groups: Sequence[PaperGroup], has_others: bool) -> str:
    lines = [f"- {_link(group.title)}: {', '.join(table.title for table in group.tables)}" for group in groups]
    lines += [f"- {_link(title)}" for title in ("Experiments", *(["Other runs"] if has_others else []))]
    return "".join(f"{line}\n" for line in lines)


def _link(title: str) -> str:
    return f"[{title}](#{title.lower().replace(' ', '-')})"


def _render_group(group: PaperGroup, records: Sequence[Record], used: set[str]) -> str:
    return "\n".join([f"## {group.title}\n", *(_render_table(table, records, used) for table in group.tables)])


def _render_table(table: PaperTable, records: Sequence[Record], used: set[str]) -> str:
    rows = []
    for row in table.rows:
        found = [record for record in records if repeats(record, row, table)]
        used.update(record.name for record in found)
        rows += [line for group in by_recipe(found) for line in _rows_of(table, row, group)] or [_not_yet(table, row)]
    note = f"\n{table.note}\n" if table.note else ""
    head = [_PAPER[table.measure] if name == "paper" else name for name in _HEAD]
    return f"### {table.title}\n{note}\n{_table(head, rows)}{_doubts(table)}"


def _doubts(table: PaperTable) -> str:
    """Return a paragraph for each doubt, with the rows that have it."""
    rows: dict[str, list[str]] = {}
    for row in table.rows:
        for doubt in row.doubts:
            rows.setdefault(doubt, []).append(row.model)
    return "".join(f"\n! {'; '.join(models)}: {doubt}.\n" for doubt, models in rows.items())


def _not_yet(table: PaperTable, row: PaperRow) -> tuple[str, ...]:
    return *_of_paper(table, row), _NOT_YET, "", "", "", "", f"`{command_of_row(row, table)}`"


def _of_paper(table: PaperTable, row: PaperRow, parameters: str = "") -> tuple[str, ...]:
    """Return the cells before `ours`."""
    counts = counted(row).text if table.measure == "memory" else ""
    return row.model, parameters or _parameters(row), _paper(table, row), counts


def _rows_of(table: PaperTable, row: PaperRow, group: Sequence[Record]) -> list[tuple[str, ...]]:
    mark = _mark(table, row, group[0])  # all have the same budget
    mean = [] if len(group) < 2 else [(row.model, "", _paper(table, row), "", *_mean(table.measure, group, mark))]
    return [*mean, *(_ours(table, row, record) for record in group)]


def _other_rows(group: Sequence[Record]) -> list[tuple[str, ...]]:
    mean = [] if len(group) < 2 else [(group[0].resolved.run.name, "", "", "", *_mean("accuracy", group))]
    return [*mean, *map(_other_row, group)]


def _mean(measure: str, group: Sequence[Record], mark: str = "") -> tuple[str, ...]:
    """Return the cells from `ours` on of the mean over seeds, whose figure begins with `mark`."""
    parts = zip(*(_figures(measure, record) for record in group), strict=True)
    means = "; ".join(
        " / ".join(f"{statistics.mean(x):.2f} ± {statistics.stdev(x):.2f}" for x in zip(*part, strict=True))
        for part in parts
    )
    seeds = ", ".join(str(record.resolved.run.seed) for record in group)
    budget = f"{group[0].epochs:.4g} x {group[0].epoch_images:,} images"
    command = command_of_record(group[0], seed=False)
    figure = f"{mark}**{means}{_unit(measure)}**, mean of {len(group)}"
    return figure, budget, "", seeds, "", f"`{command}`" if command else ""


def _ours(table: PaperTable, row: PaperRow, record: Record) -> tuple[str, ...]:
    figure = f"{_mark(table, row, record)}[{_figure(table.measure, record)}](ledger/{record.name}.json)"
    return *_of_paper(table, row, _parameters(row, record)), figure, *_circumstances(record)


def _mark(table: PaperTable, row: PaperRow, record: Record) -> str:
    mark = budget_mark(record, row, table) if table.measure != "memory" else ""
    return f"*{mark}:* " if mark else ""


def _other_row(record: Record) -> tuple[str, ...]:
    figure = f"[{_figure('accuracy', record)}](ledger/{record.name}.json)"
    return record.resolved.run.name, _millions(record), "", "", figure, *_circumstances(record)


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


def _figures(measure: str, record: Record) -> tuple[tuple[float, ...], ...]:
    return ((record.figures.peak_memory_mb / 1000,),) if measure == "memory" else record.result


def _figure(measure: str, record: Record) -> str:
    return "; ".join(map(_percents, _figures(measure, record))) + _unit(measure)


def _unit(measure: str) -> str:
    return " GB" if measure == "memory" else ""


def _paper(table: PaperTable, row: PaperRow) -> str:
    mark = " !" if row.doubts else ""
    if table.measure == "detection":
        return "; ".join(_percents(figures) for figures in (row.box, row.mask) if figures) + mark
    if table.measure == "memory":
        gflops = f"{row.gflops[0]:g} / {row.gflops[1]:g}" if row.gflops else ""
        gflops = f"{row.total_gflops:g}" if row.total_gflops else gflops
        operator = f"{row.operator:.2f} M" if row.operator else ""
        memory = f"{row.memory:g} GB" if row.memory else ""
        return "; ".join(filter(None, (memory, gflops, operator))) + mark
    return _percents([figure for figure in (row.top1, row.top5) if figure is not None]) + mark


def _percents(figures: Iterable[float]) -> str:
    return " / ".join(f"{figure:.2f}" for figure in figures)


def _parameters(row: PaperRow, record: Record | None = None) -> str:
    paper = f"{row.parameters:.2f} M" if row.parameters else ""
    return f"{paper}{', ' if paper else ''}ours {_millions(record)}" if record else paper


def _millions(record: Record) -> str:
    return f"{record.figures.parameters / 1e6:.2f} M"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table without the columns that are empty in every row."""
    shown = [column for column in range(len(head)) if any(row[column] for row in rows)]
    lines = [[line[column] for column in shown] for line in (head, ["---"] * len(head), *rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
