"""Tables on the terminal."""


def show(
    title: str, columns: list[str], rows: list[list[str]], notes: list[str], *, left: int = 2
) -> None:
    """Prints one table, then notes. left: how many of the first columns are flush left."""
    print("\n".join([title, *plain_lines(columns, rows, left), *notes]), flush=True)


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
