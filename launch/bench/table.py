"""Tables on the terminal; in plain characters where rich is not installed."""

import importlib.util


def show(
    title: str, columns: list[str], rows: list[list[str]], notes: list[str], *, left: int = 2
) -> None:
    """Prints one table, then notes. left: how many of the first columns are flush left."""
    lines = plain_lines(columns, rows, left)
    if importlib.util.find_spec("rich") is None:
        print("\n".join([title, *lines, *notes]), flush=True)
        return
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    # Wider than a narrow screen or a pipe if need be: a folded figure cannot be read.
    console = Console(width=max(Console().width, len(columns) + 3 + max(map(len, lines))))
    console.print(table)
    for note in notes:
        console.print(note, highlight=False, markup=False)


def plain_lines(columns: list[str], rows: list[list[str]], left: int = 2) -> list[str]:
    """The table's lines, columns two spaces apart."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    lines = []
    for row in [columns, *rows]:
        cells = [
            cell.ljust(width) if number < left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines
