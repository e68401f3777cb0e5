"""Tables of any number of columns: rich's on a terminal, aligned lines elsewhere."""

import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table


def show_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table whose first column is text and whose others are figures."""
    if sys.stdout.isatty():
        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE)
        for number, name in enumerate(header):
            table.add_column(name, justify="right" if number else "left")
        for row in rows:
            table.add_row(*map(escape, row))
        Console(highlight=False).print(table)
        return
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]
    print(f"\n{title}")
    for line in (header, *rows):
        cells = (f"{cell:{'>' if number else '<'}{widths[number]}}" for number, cell in enumerate(line))
        print(f"  {'  '.join(cells)}".rstrip())


def gigabytes(size: float) -> str:
    """Bytes in units of 1e9, or of 1e6 below a hundredth of that."""
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"


def duration(seconds: float) -> str:
    """In the unit a person would use."""
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"
