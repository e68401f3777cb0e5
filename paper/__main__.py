"""Adds finished runs to docs/ledger and writes docs/reproduction.md again: `python -m paper [RUN ...]`, in a clone."""

from collections.abc import Sequence
from pathlib import Path

from karat_scale.foundation.arguments import OneLineParser, run_directory
from karat_scale.foundation.errors import UserError, run_script
from karat_scale.foundation.files import write_atomically
from paper.match import by_recipe
from paper.page import PAGE, render_page
from paper.record import Record, read_records, take_record


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line, and keep the ledger."""
    parser = OneLineParser(prog="python -m paper", description=__doc__)
    parser.add_argument(
        "runs", metavar="RUN", type=run_directory, nargs="*", help="a run's directory (default: only rewrite the page)"
    )
    parser.add_argument("--docs", metavar="DIR", default="docs", help="a clone's docs folder (default: %(default)s)")
    options = parser.parse_args(arguments)
    return keep_ledger(options.runs, options.docs)


def keep_ledger(runs: Sequence[str], docs: str) -> int:
    """Add runs to `docs`/ledger and write `docs`/reproduction.md; without runs, only the page. Returns the exit code.

    Raises:
        UserError: a run cannot be added, it or its seed is there already, or a record was changed. Then nothing is
            written.
    """
    folder = Path(docs) / "ledger"
    if not folder.is_dir():
        raise UserError(f"--docs {docs}: has no folder `ledger`; run this in a clone, or name its docs folder")
    records = {record.name: record for record in read_records(folder)}
    added: list[Record] = []
    for run in runs:
        record = take_record(run)
        if record.name in records:
            same = "" if records[record.name] == record else ", with another result; remove that file to replace it"
            raise UserError(f"{run}: is in the ledger already, as {folder / record.name}.json{same}")
        records[record.name] = record
        added.append(record)
    _refuse_second_of_a_seed(folder, list(records.values()))
    page = render_page([records[name] for name in sorted(records)])
    for record in added:
        write_atomically(folder / f"{record.name}.json", record.to_text())
        print(f"{folder / record.name}.json: {_outcome(record)}")
    write_atomically(Path(docs) / PAGE, page)
    print(f"{Path(docs) / PAGE}: {len(records)} runs")
    return 0


def _refuse_second_of_a_seed(folder: Path, records: Sequence[Record]) -> None:
    """Raise UserError for two runs that would count one seed twice in a mean."""
    for group in by_recipe(records):
        first: dict[int, Record] = {}
        for record in group:
            seed = record.resolved.run.seed
            if (other := first.setdefault(seed, record)) is not record:
                raise UserError(
                    f"{folder}: {other.name} and {record.name} train the same with run.seed = {seed}, which their mean "
                    "would count twice; leave one of them out"
                )


def _outcome(record: Record) -> str:
    return f"{record.result[-1][0]:.2f} % {record.kind.score} in {record.epochs:.4g} epochs"


if __name__ == "__main__":
    run_script(main)
