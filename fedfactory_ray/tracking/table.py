"""A table for a person."""

from __future__ import annotations

from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text


class PlainTable(Table):
    """A table that shows texts as they are, where rich would parse `[x]` and `:x:` in the names that people give."""

    def __init__(self, *headers: str, title: str | None = None, **look: Any) -> None:
        super().__init__(title=None if title is None else Text(title, "table.title"), **look)
        for header in headers:
            self.add_column(header)

    def add_column(self, header: RenderableType = "", *rest: Any, **look: Any) -> None:
        """See Table."""
        super().add_column(_plain(header), *rest, **look)

    def add_row(self, *cells: RenderableType | None, **look: Any) -> None:
        """See Table."""
        super().add_row(*(None if cell is None else _plain(cell) for cell in cells), **look)


def _plain(cell: RenderableType) -> RenderableType:
    return Text(cell) if isinstance(cell, str) else cell
