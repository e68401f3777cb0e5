"""The committed page says what the paper's rows and the committed summaries say, and nothing else."""

import json
import re
from itertools import chain
from pathlib import Path

import pytest
import yaml

from karat_scale.files import sealed
from karat_scale.ledger.counted import count, counted, counted_rows
from karat_scale.ledger.match import reference_recipe
from karat_scale.ledger.page import PAGE, render_page
from karat_scale.ledger.paper import PaperRow, PaperTable, paper_groups
from karat_scale.ledger.record import Record, read_records
from tests.conftest import ROOT

DOCS = ROOT / "docs"
TABLES = [table for group in paper_groups() for table in group.tables]


def test_no_row_is_written_by_hand() -> None:
    records = read_records(DOCS / "ledger")  # refuses what was changed since it was written
    page = (DOCS / PAGE).read_text()
    assert page == render_page(records), "`karat ledger` writes the page again"
    for record in records:
        result = "; ".join(" / ".join(f"{figure:.2f}" for figure in part) for part in record.result)
        figure = f"[{result}](ledger/{record.name}.json)"
        rows = [line for line in page.splitlines() if figure in line]  # of the paper's, one may be in two tables
        assert rows
        assert all(f"`{record.recipe_sha256[:12]}`" in row for row in rows)
        assert not re.search(r"(?<![\w.:/])[/~]\w", record.to_text()), "a path of one machine"


def test_every_row_of_the_paper_is_there_and_can_be_run() -> None:
    page = (DOCS / PAGE).read_text()
    for table in TABLES:
        assert f"### {table.title}\n" in page
        for row in table.rows:
            assert row.top1 or row.memory or row.box
            assert reference_recipe(row).model
            assert f"| {row.model} |" in page
            assert f"! {row.model}" in page.replace("; ", "\n! ") if row.doubts else True


def numbers(table: PaperTable) -> list[int]:
    """The numbers in a title, such as 1 and 3 of "CIFAR-10 (Tables 1 and 3)"."""
    return [int(number) for number in re.findall(r"\d+", table.title.rpartition("(")[2])]


def figures_of(row: PaperRow) -> set[float]:
    several = (*(row.gflops or ()), *(row.box or ()), *(row.mask or ()))
    single = (row.top1, row.top5, row.parameters, row.operator, row.memory, row.total_gflops)
    return {*several, *(figure for figure in single if figure is not None)}


def test_every_cell_of_the_paper_is_there_and_no_other() -> None:
    paper: dict[int, dict[str, str]] = yaml.safe_load((Path(__file__).parent / "paper_cells.yaml").read_text())
    ours: dict[int, set[float]] = {}
    for table in TABLES:
        for number in numbers(table):
            ours.setdefault(number, set()).update(*map(figures_of, table.rows))
    for number, rows in paper.items():
        for row, cells in rows.items():
            place = int(row.removeprefix("in Table ")) if row.startswith("in Table ") else number
            missing = [cell for cell in cells.split() if float(cell) not in ours[place]]
            assert not missing, f"Table {number}, {row}"
    for table in TABLES:
        tables = [paper[number] for number in numbers(table)]
        for row in table.rows:
            of_row = [rows[row.model] for rows in tables if row.model in rows]  # the paper may name it otherwise
            printed = {
                float(cell) for cells in of_row or chain(*(t.values() for t in tables)) for cell in cells.split()
            }
            assert figures_of(row) <= printed, f"{table.title}, {row.model}"


def test_the_counts_are_those_of_the_models() -> None:
    rows = [row for row in counted_rows() if row.recipe == "imagenet_vit_tiny_g3u"]
    assert len(rows) == 3
    assert [counted(row) for row in rows] == [count(row) for row in rows]
    # All blocks share the operator: (2 G + 1) r N parameters for each of 3 heads, G = 3, r = 12, N = 197.
    assert counted(rows[0]).operator == round(3 * 7 * 12 * 197 / 1e6, 3)


@pytest.mark.slow
def test_all_counts_are_those_of_the_models() -> None:
    for row in counted_rows():
        assert counted(row) == count(row), row.model


def test_the_runs_of_the_experiment_have_records() -> None:
    for path in (DOCS / "experiments" / "attention").glob("*.json"):
        kept = json.loads(path.read_text())["run"]
        assert kept == sealed(kept), path.name
        record = Record.model_validate({key: value for key, value in kept.items() if key != "sha256"})
        assert record.resolved.run.seed == record.figures.seed, path.name


def test_the_starts_that_the_docs_compare_are_committed_runs() -> None:
    runs: dict[tuple[str, int], dict[int, float]] = {}
    for record in read_records(DOCS / "ledger"):
        recipe = record.resolved
        if recipe.run.name.startswith("cifar10_vit_mini_32px"):
            start = "`residual=true`" if recipe.attention.residual else f"`init={recipe.attention.init}`"
            start = "softmax attention" if recipe.attention.kind == "softmax" else start
            by_seed = runs.setdefault((start, recipe.model.depth or 0), {})
            by_seed[recipe.run.seed] = record.summary["last_top1"]
    assert [depth for _, depth in sorted(runs, key=lambda run: run[1])] == [6] * 5 + [12] * 3
    page = (DOCS / "attention.md").read_text()
    for (start, depth), by_seed in runs.items():
        figures = [by_seed[seed] for seed in ((0, 1, 2) if depth == 6 else (0,))]
        mean = [sum(figures) / len(figures)] if depth == 6 else []
        cells = (start, *(f"{figure:.2f}" for figure in (*figures, *mean)))
        assert f"| {' | '.join(cells)} |\n" in page
