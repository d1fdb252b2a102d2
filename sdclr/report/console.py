"""What the terminal shows. stdout carries results that someone may pipe; everything else goes to stderr.

Tables and bars are imported when they are first shown: help and a mistake in the config need neither.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from sdclr.errors import SdclrError

if TYPE_CHECKING:
    import numpy as np
    from rich.progress import Progress

console = Console(stderr=True, highlight=False)
quiet = False
muted = False
"""True in all but one of several processes that work together: nothing is shown, save why the program ends."""
LOG_WIDTH = 160
"""Columns of a table that goes into a file or a pipe."""


def say(text: str = "", style: str | None = None) -> None:
    """A line of talk, to stderr."""
    if not (quiet or muted):
        console.print(escape(text), style=style, soft_wrap=True)


def warn(text: str) -> None:
    """Something the user should know, though the work goes on."""
    if not muted:
        console.print(f"[yellow]warning:[/] {escape(text)}", soft_wrap=True)


def result(text: str) -> None:
    """A result, to stdout, as it is."""
    if muted:
        return
    sys.stdout.write(text if text.endswith("\n") else text + "\n")
    sys.stdout.flush()


def error(problem: SdclrError) -> None:
    """A failure as its reader needs it: every problem on a line, then the hint."""
    for line in problem.message.splitlines():
        prefix = "" if line.startswith(" ") else "[bold red]error:[/] "
        console.print(prefix + escape(line), soft_wrap=True)
    if problem.hint:
        console.print(f"\n[bold]hint:[/] {escape(problem.hint)}", soft_wrap=True)


def table(rows: Iterable[Sequence[Any]], header: Sequence[str] = (), title: str | None = None) -> None:
    """A small table, to stderr; the first column names, the others are numbers or words. No cell is cut: a narrow terminal folds it."""
    if quiet or muted:
        return
    from rich.table import Column, Table

    grid = Table(
        *(Column(head, overflow="fold") for head in header),
        title=title,
        title_justify="left",
        show_header=bool(header),
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    for row in rows:
        cells = [escape(str(cell)) for cell in row]
        grid.add_row(f"[bold]{cells[0]}[/]" if not header else cells[0], *cells[1:])
    wide = console if console.is_terminal else Console(stderr=True, highlight=False, width=LOG_WIDTH)
    wide.print(grid)


def paragraphs(text: Iterable[tuple[str, str]]) -> None:
    """Titles and text to read at length, to stderr; whoever asks for it gets it, quiet or not."""
    if muted:
        return
    wide = Console(stderr=True, highlight=False, width=min(100, console.width if console.is_terminal else 100))
    for title, paragraph in text:
        wide.print(f"\n[bold]{escape(title)}[/]\n{escape(paragraph)}")


@contextmanager
def progress(what: str, total: int | None, done: int = 0) -> Iterator[Bar]:
    """A progress bar with time left and a line of numbers."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("[bold]{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[numbers]}", markup=False),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=quiet or muted, transient=False) as bar:
        yield Bar(bar, bar.add_task(what, total=total, completed=done, numbers=""))


class Bar:
    """One running progress bar."""

    def __init__(self, bar: Progress, task: Any):
        self.bar, self.task = bar, task

    def advance(self, numbers: str = "", steps: int = 1) -> None:
        """Move on, and show the latest numbers."""
        if numbers:
            self.bar.update(self.task, numbers=numbers)
        self.bar.update(self.task, advance=steps)


def curve(values: Sequence[float] | np.ndarray, width: int = 72, height: int = 6) -> str:
    """A curve drawn with block characters, the largest value on top."""
    blocks = " ▁▂▃▄▅▆▇█"
    count = min(width, len(values))
    columns = [
        max(values[i * len(values) // count : max(i * len(values) // count + 1, (i + 1) * len(values) // count)])
        for i in range(count)
    ]
    top = max(columns) or 1.0
    lines = []
    for row in range(height, 0, -1):
        filled = [min(8, max(0, round((value / top * height - row + 1) * 8))) for value in columns]
        lines.append("  " + "".join(blocks[level] for level in filled).rstrip())
    return "\n".join(lines)
