"""The committed page says what the paper's rows and the committed summaries say, and nothing else."""

import json
import re
from pathlib import Path

import pytest
import yaml

from benchmarks.attention_trials import GONE
from karat_scale.foundation.files import sealed
from paper.counted import count, counted, counted_rows
from paper.match import reference_recipe
from paper.page import PAGE, render_page, settings
from paper.paper import PaperRow, paper_groups
from paper.record import Record, read_records
from tests.conftest import ROOT

DOCS = ROOT / "docs"
TABLES = [(group, table) for group in paper_groups() for table in group.tables]


def test_no_row_is_written_by_hand() -> None:
    records = read_records(DOCS / "ledger")  # refuses what was changed since it was written
    page = (DOCS / PAGE).read_text()
    assert page == render_page(records), "`python -m paper` writes the page again"
    for record in records:
        result = "; ".join("/".join(f"{figure:.2f}" for figure in part) for part in record.result)
        figure = f"[{result}](ledger/{record.name}.json)"
        rows = [line for line in page.splitlines() if figure in line]  # a row of the paper's may be in two tables
        assert rows
        assert all(f"`{record.recipe_sha256[:12]}`" in row for row in rows)
        assert not re.search(r"(?<![\w.:/])[/~]\w", record.to_text()), "a path of one machine"


def test_every_row_of_the_paper_is_there_and_can_be_run() -> None:
    page = (DOCS / PAGE).read_text()
    for group, table in TABLES:
        section = page.split(f"## {group.title}\n")[1].split("\n## ")[0]
        assert f"|{table.title}|" in section
        for row in table.rows:
            assert figures_of(row)
            assert reference_recipe(row).model
            model = row.model.replace(" + ", "+").replace(" = ", "=")
            assert f"|{model}|" in section
            assert f"! {model}" in section.replace("; ", "\n! ") if row.doubts else True


def test_a_row_of_several_data_sets_has_the_same_settings_on_each() -> None:
    for group in paper_groups():
        for model in {row.model for table in group.tables for row in table.rows}:
            rows = [row for table in group.tables for row in table.rows if row.model == model]
            assert len({settings(group, row) for row in rows}) == 1, model


def figures_of(row: PaperRow) -> list[float]:
    operations = [*(row.gflops or ()), row.total_gflops]
    figures = [row.top1, row.top5, *(row.box or ()), *(row.mask or ()), row.memory, *operations, row.parameters]
    return [figure for figure in (*figures, row.operator) if figure is not None]


def test_every_cell_of_the_paper_is_there_and_no_other() -> None:
    paper = yaml.safe_load((Path(__file__).parent / "paper_cells.yaml").read_text())
    ours = {
        f"{group.title}: {table.title}": {row.model: figures_of(row) for row in table.rows} for group, table in TABLES
    }
    assert ours == paper


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
        recipe = yaml.safe_load(record.recipe)
        assert recipe["run"]["seed"] == record.figures.seed, path.name
        if not {recipe["attention"]["kind"], recipe["attention"]["form"]} & {*GONE}:
            assert record.resolved.run.seed == record.figures.seed, path.name


def test_the_starts_that_the_docs_compare_are_committed_runs() -> None:
    runs: dict[str, list[float]] = {}
    for record in read_records(DOCS / "ledger"):
        recipe = record.resolved
        if recipe.run.name.startswith("cifar10_vit_mini_32px") and recipe.model.depth == 6:
            start = "residual=true" if recipe.attention.residual else recipe.attention.init
            start = "softmax" if recipe.attention.kind == "softmax" else start
            runs.setdefault(start, []).append(record.summary["last_top1"])
    starts = ("softmax", "paper", "variance_preserving", "residual=true", "softmax_like")
    assert {start: len(figures) for start, figures in runs.items()} == dict.fromkeys(starts, 3)
    cells = "|".join(f"{sum(runs[start]) / 3:.2f}" for start in starts)
    assert f"|{cells}|\n" in (DOCS / "attention.md").read_text()
