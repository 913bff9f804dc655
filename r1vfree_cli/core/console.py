"""What people see: logs and progress on stderr, results on stdout, one JSON document with --json."""

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


_CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def _visible(text: str) -> str:
    """Control characters as escapes: a file's name or a reply must not move the terminal's cursor."""
    return _CONTROL.sub(lambda m: ascii(m[0])[1:-1], text)


# Told every line of `log` and `warn`, and whether it is a warning: a worker's stderr is a file that nobody watches.
repeat: Callable[[str, bool], None] | None = None


def log(message: str) -> None:
    """One line for people, on stderr; markup in it is not interpreted."""
    _stderr().print(_visible(message), markup=False)
    if repeat is not None:
        repeat(message, False)


debugging = False  # --debug


def detail(message: str) -> None:
    """A line that only --debug shows."""
    if debugging:
        log(message)


def warn(message: str) -> None:
    """One `warning:` line on stderr."""
    _told("warning: ", "yellow", message)
    if repeat is not None:
        repeat(message, True)


def _told(word: str, style: str, message: str) -> None:
    from rich.text import Text

    _stderr().print(Text.assemble((word, style), _visible(message)))


def error(exc) -> None:
    """Print an `R1VError`: message, details, hint."""
    _told("error: ", "bold red", exc.message)
    for line in exc.details:
        _told("  ", "", line)
    if exc.hint:
        _told("hint: ", "cyan", exc.hint)


def emit(text: str) -> None:
    """A result, on stdout."""
    sys.stdout.write(text if text.endswith("\n") else text + "\n")
    sys.stdout.flush()


def emit_json(document) -> None:
    """The one JSON document of `--json`, on stdout. NaN is refused: it is not JSON."""
    emit(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


def emit_table(title: str, columns: list[str], rows: list[list]) -> None:
    """A small table; first column left, the others right-aligned. Plain text, never folded, when piped."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE, pad_edge=False)
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*[Text("" if cell is None else str(cell)) for cell in row])
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 1000)  # a log has no edge, and a name cut in two cannot be searched for
    console.print(Text(title, style="italic", no_wrap=True, overflow="ignore"), table)


class Progress:
    """Handle of `progress()`: `advance(n, note)`."""

    def __init__(self, bar, task, total: int | None, description: str):
        self._bar, self._task, self._total, self._description = bar, task, total, description
        self._done = 0
        self._start = self._last = time.monotonic()
        self._first: tuple[float, int] | None = None

    def advance(self, n: int = 1, note: str = "", total: int | None = None) -> None:
        """Count `n` more items as done; `note` is shown at the end of the line. `total`, once it is known."""
        self._done += n
        self._total = total or self._total
        now = time.monotonic()
        # The time left as tqdm writes it, `<7:05`, at the pace since the first call, which may count what was before.
        since, done = self._first = self._first or (now, self._done)
        left = ""
        if self._total is not None and self._done > done:
            left = f"<{clock((now - since) / (self._done - done) * (self._total - self._done))}"
        if self._bar is not None:
            self._bar.update(self._task, advance=n, note=note, total=self._total, left=left)
        elif now - self._last > 10:
            self._last = now
            count = f"{self._done}/{'?' if self._total is None else self._total}"
            log(f"{self._description}: {count} {clock(now - self._start)}{left} {note}".rstrip())


def clock(seconds: float) -> str:
    """`4:05` or `1:02:03`."""
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}" if hours else f"{minutes}:{s:02}"


@contextmanager
def progress(description: str, total: int | None = None) -> Iterator[Progress]:
    """A progress bar on a terminal, a plain line every 10 s elsewhere."""
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield Progress(None, None, total, description)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn
    from rich.progress import Progress as Bar
    from rich.table import Column
    from rich.text import Text

    class Clock(ProgressColumn):
        def render(self, task):
            return Text(clock(task.elapsed or 0) + task.fields["left"])

    columns = [
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        Clock(Column(no_wrap=True)),
        TextColumn("{task.fields[note]}", markup=False, table_column=Column(no_wrap=True, ratio=1)),
    ]
    shown = _stderr()
    if shown.width < 110:  # room for the note
        del columns[1]
    with Bar(*columns, console=shown, transient=True, expand=True) as bar:
        _bars.append(bar.console)
        try:
            yield Progress(bar, bar.add_task(description, total=total, note="", left=""), total, description)
        finally:
            _bars.pop()
