"""The committed page says what the paper's rows and the committed summaries say, and nothing else."""

import re

from karat_scale.ledger.match import reference_recipe
from karat_scale.ledger.page import PAGE, render_page
from karat_scale.ledger.paper import paper_groups
from karat_scale.ledger.record import read_records
from karat_scale.recipe.loading import load_recipe
from karat_scale.tasks.detection.recipe import DetectionRecipe
from tests.conftest import ROOT

DOCS = ROOT / "docs"


def test_no_row_is_written_by_hand() -> None:
    records = read_records(DOCS / "ledger")  # refuses what was changed since it was written
    page = (DOCS / PAGE).read_text()
    assert page == render_page(records), "`karat ledger` writes the page again"
    for record in records:
        figure = f"[{record.summary['last_top1']:.2f} / {record.summary['last_top5']:.2f}](ledger/{record.name}.json)"
        rows = [line for line in page.splitlines() if figure in line]  # of the paper's, one may be in two tables
        assert rows
        assert all(f"`{record.recipe_sha256[:12]}`" in row for row in rows)
        assert not re.search(r"(?<![\w.:/])[/~]\w", record.to_text()), "a path of one machine"


def test_every_row_of_the_paper_is_there_and_can_be_run() -> None:
    tables = {table.title: table.rows for group in paper_groups() for table in group.tables}
    counts = [len(rows) for rows in tables.values()]
    assert counts == [14, 14, 9, 9, 9, 9, 6, 5, 5, 12, 12, 12, 22, 14, 8, 8, 8, 8, 6, 6, 10, 8]
    page = (DOCS / PAGE).read_text()
    for title, rows in tables.items():
        assert f"### {title}\n" in page
        for row in rows:
            assert row.top1 or row.memory or row.box
            recipe = load_recipe(row.recipe, row.overrides, DetectionRecipe) if row.box else reference_recipe(row)
            assert recipe.model
            assert f"| {row.model} |" in page
            assert f"! {row.model}" in page.replace("; ", "\n! ") if row.doubt else True
    figures = {(title, row.model): (row.top1, row.top5) for title, rows in tables.items() for row in rows}
    assert figures["ImageNet-1K (Tables 1 and 3)", "ViT-Tiny + G3B"] == (59.11, 82.01)
    assert figures["CIFAR-100 (Table 1)", "ViT-Small + G3U"] == (53.86, 81.45)
    assert figures["SVHN (Table 2)", "ViT-Base + G1B"] == (96.83, None)


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
