"""The look of everything that is printed in a terminal: tables without lines, titles in one colour.

On a terminal too narrow for columns a table becomes a list: the first cell of a row, and under it the others with their names.
"""

from __future__ import annotations

import re
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, JustifyMethod, OverflowMethod, RenderableType, RenderResult
from rich.containers import Lines
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

NARROW = 56
"""Columns of a terminal below which a table is a list."""


_SEAM = re.compile(r"[._]|-(?!(?<=\d-)\d)")
"""Where a name may break; a range of numbers holds together."""


class _Cell(Text):
    """Text whose long words (names of modules, mostly) break behind a dot, a dash or an underscore when they must."""

    def wrap(
        self,
        console: Console,
        width: int,
        *,
        justify: JustifyMethod | None = None,
        overflow: OverflowMethod | None = None,
        tab_size: int = 8,
        no_wrap: bool | None = None,
    ) -> Lines:
        pieces = Text("\n").join(self.divide(() if no_wrap else _breaks(self.plain, width)))
        return pieces.wrap(console, width, justify=justify, overflow=overflow, tab_size=tab_size, no_wrap=no_wrap)


def _breaks(text: str, width: int) -> list[int]:
    """Where to break the words that are longer than a line."""
    found = []
    for word in re.finditer(r"\S+", text):
        start = last = word.start()
        for end in (*(seam.end() for seam in _SEAM.finditer(text, *word.span())), word.end()):
            if last > start and cell_len(text[start:end]) > width:
                found.append(last)
                start = last
            last = end
    return found


class _Table(Table):
    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        made = (_Cell(cell.plain, cell.style, spans=cell.spans) if isinstance(cell, Text) else cell for cell in cells)
        super().add_row(*made, **options)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if options.max_width >= NARROW or len(self.columns) < 3:
            yield from super().__rich_console__(console, options)
            return
        for cells, row in zip(zip(*(column.cells for column in self.columns), strict=True), self.rows, strict=True):
            for n, (column, cell) in enumerate(zip(self.columns, cells, strict=True)):
                text = cell if isinstance(cell, Text) else Text(str(cell))
                if n == 0 and text.plain:
                    yield Text.assemble(text, style=row.style or "bold")
                elif n and text.plain:
                    name = f"{column.header}: " if column.header else ""
                    yield Padding(Text.assemble((name, "dim"), text, style=row.style or ""), (0, 0, 0, 2))


def table(*columns: tuple[str, str]) -> Table:
    """An empty table; the sign before a column's name says where it stands: "<" left, ">" right."""
    made = _Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for side, name in columns:
        made.add_column(name, justify="right" if side == ">" else "left", overflow="fold", no_wrap=side == ">")
    return made


def titled(title: str, body: RenderableType) -> RenderableType:
    """A section: a blank line, its title, its body set in by two columns."""
    return Group(Text(""), Text(title, style="bold cyan"), Padding(body, (0, 0, 0, 2)))
