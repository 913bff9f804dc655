"""What people see: logs and progress on stderr, results on stdout, one JSON document with --json."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_bars: list = []  # consoles of the progress bars on the terminal now


def _stderr():
    from rich.console import Console

    if _bars:
        return _bars[-1]  # it writes above the bar; another one would write into its line
    # A fresh console each time: tests and workers swap sys.stderr.
    return Console(stderr=True, highlight=False, soft_wrap=True)


def is_terminal() -> bool:
    """True when progress may be drawn: stderr is a terminal and not a dumb one."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


_CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def _visible(text: str) -> str:
    """Control characters as escapes: a file's name or a reply must not move the terminal's cursor."""
    return _CONTROL.sub(lambda m: ascii(m[0])[1:-1], text)


# Told every line of `log` and `warn`, and whether it is a warning: a worker's stderr is a file that nobody watches.
repeat: Callable[[str, bool], None] | None = None


def log(message: str) -> None:
    """One line for people, on stderr. The text is data: markup in it is not interpreted."""
    _stderr().print(_visible(message), markup=False)
    if repeat is not None:
        repeat(message, False)


def warn(message: str) -> None:
    """One `warning:` line on stderr."""
    from rich.text import Text

    _stderr().print(Text.assemble(("warning: ", "yellow"), _visible(message)))
    if repeat is not None:
        repeat(message, True)


def error(exc) -> None:
    """Print an `R1VError`: message, details, hint."""
    from rich.text import Text

    console = _stderr()
    console.print(Text.assemble(("error: ", "bold red"), _visible(exc.message)))
    for line in exc.details:
        console.print(f"  {_visible(line)}", markup=False)
    if exc.hint:
        console.print(Text.assemble(("hint: ", "cyan"), _visible(exc.hint)))


def emit(text: str) -> None:
    """A result, on stdout."""
    sys.stdout.write(text if text.endswith("\n") else text + "\n")
    sys.stdout.flush()


def emit_json(document) -> None:
    """The one JSON document of `--json`, on stdout. NaN is refused: it is not JSON."""
    emit(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


def emit_table(title: str, columns: list[str], rows: list[list], *, to_stderr: bool = False) -> None:
    """A small table; first column left, the others right-aligned. Plain text, never folded, when piped."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, box=box.SIMPLE, title_justify="left", pad_edge=False)
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*[Text("" if cell is None else str(cell)) for cell in row])
    console = Console(stderr=to_stderr, highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 1000)  # a log has no edge, and a name cut in two cannot be searched for
    console.print(table)


class Progress:
    """Handle of `progress()`: `advance(n, note)`."""

    def __init__(self, bar, task, total: int | None, description: str):
        self._bar, self._task, self._total, self._description = bar, task, total, description
        self._done = 0
        self._last = time.monotonic()

    def advance(self, n: int = 1, note: str = "") -> None:
        """Count `n` more items as done; `note` is shown at the end of the line."""
        self._done += n
        if self._bar is not None:
            self._bar.update(self._task, advance=n, note=note)
        elif time.monotonic() - self._last > 10:
            self._last = time.monotonic()
            log(f"{self._description}: {self._done}/{self._total if self._total is not None else '?'} {note}".rstrip())


@contextmanager
def progress(description: str, total: int | None = None) -> Iterator[Progress]:
    """A progress bar on a terminal, a plain line every 10 s elsewhere."""
    if not is_terminal():
        yield Progress(None, None, total, description)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = [
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    ]
    with Bar(*columns, console=_stderr(), transient=True) as bar:
        _bars.append(bar.console)
        try:
            yield Progress(bar, bar.add_task(description, total=total, note=""), total, description)
        finally:
            _bars.pop()
