"""The look of everything that is printed in a terminal: tables without lines, titles in one colour."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text


def table(*columns: tuple[str, str]) -> Table:
    """An empty table; the sign before a column's name says where it stands: "<" left, ">" right."""
    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for side, name in columns:
        made.add_column(name, justify="right" if side == ">" else "left", overflow="fold", no_wrap=side == ">")
    return made


def titled(title: str, body: RenderableType) -> RenderableType:
    """A section: a blank line, its title, its body set in by two columns."""
    return Group(Text(""), Text(title, style="bold cyan"), Padding(body, (0, 0, 0, 2)))
