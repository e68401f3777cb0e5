"""Render docs/reproduction.md from the paper's tables and the records. The page has no other source."""

import statistics
from collections.abc import Iterable, Sequence

from karat_scale.commands.evaluate.predictions import Evaluation
from paper.counted import counted
from paper.match import budget_mark, by_recipe, command_of_record, repeats
from paper.paper import PaperGroup, PaperRow, PaperTable, paper_groups
from paper.record import Record

_TOP = """# Reproduction

This page has every figure in the tables of [arXiv 2503.10632](https://arxiv.org/abs/2503.10632) that a run can have,
and our runs. `python -m paper RUN` generates it from `paper/paper.yaml` and the runs' summaries in `docs/ledger/`; do
not edit it. Table 14 is not here: its models are KANs without attention.

To repeat a row, pass its last column, and what every row has, to `karat train` (`karat detect` for COCO), with
`data.path=DIR` for the directory of the data and, if the row has settings, a `run.dir` of its own. DATA stands for the
column's data set, as in `cifar10`. `karat launch train` uses more GPUs.

Accuracies are top-1/top-5 in percent. A figure marked ! disagrees with another place of the paper; lines below
its table say how. {found} of the {rows} figures have a run of ours.
"""
_RUNS = """## Runs

Figures are those after the last epoch, not the best of all epochs. A run marked *short* was trained on fewer images
than the paper's model, and one marked *long* on more; do not compare these with the paper's. Runs that differ only in
their seed have their mean ± standard deviation. Each figure links to the run's record, with hardware, versions and the
whole recipe; `recipe` has the first digits of its SHA-256. The
[comparison of kinds of attention](experiments/attention_results.md) has records in `docs/experiments/attention/`.
"""
_TEST_SETS = """## Other test sets

Top-1/top-5 in percent on test sets of `karat eval --on`, `--labels` and `--corrupt`. If a set has only some of the
run's classes, the model chose among these. Figures of corrupted images are means over corruptions and severities.
"""
PAGE = "reproduction.md"


def render_page(records: Sequence[Record]) -> str:
    """Return the whole page as Markdown."""
    used: set[str] = set()
    counts, runs = [], []
    for group in paper_groups():
        for table, row in _cells(group):
            found = [record for record in records if repeats(record, row, table)]
            used.update(record.name for record in found)
            counts.append(len(found))
            runs += [_run(same, group.title, table, row) for same in by_recipe(found)]
    runs += [_run(same) for same in by_recipe([record for record in records if record.name not in used])]
    top = _TOP.format(found=sum(map(bool, counts)), rows=len(counts))
    parts = [top, *map(_render_group, paper_groups()), _RUNS]
    parts += [_table(("row", "paper", "ours", "budget", "seed", "recipe", "command"), runs)] if runs else []
    if rows := [row for record in records for row in _test_rows(record)]:
        parts += [_TEST_SETS, _table(("run", "test set", "accuracy", "images", "classes", "checkpoint"), rows)]
    return "\n".join(parts)


def _cells(group: PaperGroup) -> list[tuple[PaperTable, PaperRow]]:
    return [(table, row) for table in group.tables for row in table.rows]


def _render_group(group: PaperGroup) -> str:
    tables = group.tables
    rows: dict[str, list[PaperRow | None]] = {}
    for column, table in enumerate(tables):
        for row in table.rows:
            rows.setdefault(row.model, [None] * len(tables))[column] = row
    shared = [word for word in tables[0].rows[0].overrides if all(word in row.overrides for row in tables[0].rows)]
    note = group.note + (f" Every row has {' '.join(f'`{word}`' for word in shared)}." if shared else "")
    lines = []
    for model, cells in rows.items():
        first = next(row for row in cells if row)
        parameters = f"{first.parameters:.2f} M" if first.parameters else ""
        counts = counted(first).text if tables[0].measure == "memory" else ""
        figures = [_paper(table, row) if row else "" for table, row in zip(tables, cells, strict=True)]
        lines.append((_short(model), parameters, *figures, counts, f"`{settings(group, first, shared)}`"))
    head = ("model", "parameters", *(table.title for table in tables), "counted", "recipe and settings")
    return f"## {group.title}\n\n{note.strip()}\n\n{_table(head, lines)}{_doubts(group)}"


def settings(group: PaperGroup, row: PaperRow, shared: Sequence[str] = ()) -> str:
    """Return a row's recipe and settings; DATA stands for the data set if the group has several."""
    text = " ".join([row.recipe, *(word for word in row.overrides if word not in shared)])
    data = row.recipe.partition("_")[0]
    return text.replace(f"{data}_", "DATA_") if len(group.tables) > 1 else text


def _short(model: str) -> str:
    return model.replace(" + ", "+").replace(" = ", "=")


def _doubts(group: PaperGroup) -> str:
    """Return a paragraph for each doubt, with its rows, and its data set unless it is of all."""
    models: dict[str, dict[str, None]] = {}
    sets: dict[str, dict[str, None]] = {}
    for table, row in _cells(group):
        for doubt in row.doubts:
            models.setdefault(doubt, {})[row.model] = None
            sets.setdefault(doubt, {})[table.title] = None
    where = {doubt: f" ({', '.join(of)})" if len(of) < len(group.tables) else "" for doubt, of in sets.items()}
    return "".join(f"\n! {'; '.join(map(_short, models[doubt]))}{where[doubt]}: {doubt}.\n" for doubt in models)


def _run(
    group: Sequence[Record], title: str = "", table: PaperTable | None = None, row: PaperRow | None = None
) -> list[str]:
    """Return the cells of runs that differ only in their seed, and of the row that they repeat."""
    measure = table.measure if table else "accuracy"
    unit = " GB" if measure == "memory" else ""
    figures = [_figures(measure, record) for record in group]
    links = [
        f"[{'; '.join(map(_percents, one))}{unit}](ledger/{record.name}.json)"
        for one, record in zip(figures, group, strict=True)
    ]
    ours = ", ".join(links)
    if len(group) > 1:
        means = "; ".join(
            "/".join(f"{statistics.mean(x):.2f} ± {statistics.stdev(x):.2f}" for x in zip(*part, strict=True))
            for part in zip(*figures, strict=True)
        )
        ours = f"**{means}{unit}**: {ours}"
    name, paper = group[0].resolved.run.name, ""
    if table and row:
        name, paper = f"{title}, {table.title}: {_short(row.model)}", _paper(table, row)
        if measure != "memory" and (mark := budget_mark(group[0], row, table)):  # all have the same budget
            ours = f"*{mark}:* {ours}"
    budget = f"{group[0].epochs:.4g} x {group[0].epoch_images:,} images"
    seeds = ", ".join(str(record.resolved.run.seed) for record in group)
    digests = ", ".join(f"`{record.recipe_sha256[:12]}`" for record in group)
    command = command_of_record(group[0], seed=len(group) == 1)
    return [name, paper, ours, budget, seeds, digests, f"`{command}`" if command else "a recipe that is not shipped"]


def _test_rows(record: Record) -> list[tuple[str, ...]]:
    run = f"[{record.name}](ledger/{record.name}.json)"
    left_out = {"source": "", "identity": "", "model": ""}
    found = [Evaluation.model_validate({**left_out, **one}) for one in record.evaluations]
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


def _figures(measure: str, record: Record) -> tuple[tuple[float, ...], ...]:
    return ((record.figures.peak_memory_mb / 1000,),) if measure == "memory" else record.result


def _paper(table: PaperTable, row: PaperRow) -> str:
    mark = " !" if row.doubts else ""
    if table.measure == "detection":
        return "; ".join(_percents(figures) for figures in (row.box, row.mask) if figures) + mark
    if table.measure == "memory":
        gflops = f"{row.gflops[0]:g}/{row.gflops[1]:g}" if row.gflops else ""
        gflops = f"{row.total_gflops:g}" if row.total_gflops else gflops
        operator = f"{row.operator:.2f} M" if row.operator else ""
        memory = f"{row.memory:g} GB" if row.memory else ""
        return "; ".join(filter(None, (memory, gflops, operator))) + mark
    return _percents([figure for figure in (row.top1, row.top5) if figure is not None]) + mark


def _percents(figures: Iterable[float]) -> str:
    return "/".join(f"{figure:.2f}" for figure in figures)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table without the columns that are empty in every row."""
    shown = [column for column in range(len(head)) if any(row[column] for row in rows)]
    lines = [[line[column] for column in shown] for line in (head, ["---"] * len(head), *rows)]
    return "".join(f"|{'|'.join(line)}|\n" for line in lines)
