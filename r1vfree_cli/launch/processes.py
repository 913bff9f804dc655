"""Starts processes and waits for them: the launcher, a reward server, a module that prints one JSON document.

Ranks write their own logs, pid and error files into `logs/attempt-N/`; the launcher's exit code is 1 whatever
happened, so the cause is read from those files.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ..config.schema import GrpoRecipe, SftRecipe
from ..core import process as ranks
from ..core.errors import Interrupted, R1VError, UsageError, from_dict
from ..core.files import disk_full
from ..core.process import POLL_S, die_with_parent
from .plan import Plan, free_port, server_plan

SAME_MOMENT_S = 0.3
SERVER_START_S = 1800  # loading a 7B judge from a cold network disk


def run_json(plan: Plan) -> dict:
    """Run a command that prints one JSON document, its logs passing through to stderr; returns the document.

    Raises:
        R1VError: of the class that the command's `{"error": ...}` names, or that it printed no document.
        Interrupted: stopped by a signal.
    """
    with _Signals() as signals, tempfile.TemporaryFile() as out:
        process = _start(plan, out, stderr=None)
        try:
            for _ in _ticks(process):
                if signals.count:
                    raise Interrupted("interrupted")
        finally:
            _kill(process)
        out.seek(0)
        printed = out.read()
    try:
        document = json.loads(printed)
    except ValueError:
        raise R1VError(
            f"{shlex.join(plan.argv[1:4])} ended with exit code {process.returncode} and no result"
        ) from None
    if "error" in document:
        raise from_dict(document["error"])
    return document


# --- running ---------------------------------------------------------------------------------------------------


class _Signals:
    """While active, SIGINT and SIGTERM are noted instead of raised.

    `count` of them; `again`: a person pressed Ctrl-C once more. What comes at the same moment does not count as that:
    `timeout` sends its signal twice, and a scheduler that repeats SIGTERM still wants the checkpoint.
    """

    def __enter__(self):
        self.count, self.again, self._first = 0, False, 0.0
        self._old = {n: signal.signal(n, self._on) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc):
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _on(self, number, frame):
        now = time.monotonic()
        self._first = self._first or now
        self.count += 1
        self.again = self.again or (number == signal.SIGINT and now - self._first > SAME_MOMENT_S)


def execute(plan: Plan, logs: Path, *, watch: Callable[[], None] | None = None) -> None:
    """Run a plan to its end; logs and errors of its processes are in `logs`. Blocks.

    The first SIGINT or SIGTERM is passed to the ranks, which write a checkpoint; a second SIGINT, or the end
    of their time for it (`ranks.grace_s`), kills them. `watch` is called a few times a second.

    Raises:
        R1VError: of the class and exit code that the first failed rank left, else with the log's tail.
        Interrupted: stopped by a signal.
    """
    grace_s = 1.25 * ranks.grace_s()
    logs.mkdir(parents=True, exist_ok=True)
    with _Signals() as signals:
        with open(logs / "launcher.log", "ab") as out:
            main = _start(plan, out, launcher=True)
        try:
            stopping: float | None = None
            for _ in _ticks(main, watch):
                if signals.count and stopping is None:
                    stopping = time.monotonic()
                    if not ranks.signal_all(logs, signal.SIGTERM):
                        _kill(main, signal.SIGKILL)
                elif stopping is not None and (signals.again or time.monotonic() - stopping > grace_s):
                    ranks.signal_all(logs, signal.SIGKILL)
                    _kill(main, signal.SIGKILL)
            if signals.count and main.returncode:
                raise Interrupted("interrupted", hint="--resume continues from the last checkpoint")
            if main.returncode:
                raise _cause(logs, main.returncode)
        finally:
            _kill(main, signal.SIGKILL)
            ranks.signal_all(logs, signal.SIGKILL)


@contextmanager
def serving(recipe: GrpoRecipe | SftRecipe, logs: Path) -> Iterator[str | None]:
    """Run the recipe's reward server, if it has one, while the body runs; yields its URL.

    Raises:
        UsageError: it ended, or was not healthy in time; with its log's tail.
        Interrupted: a signal came while it was starting.
    """
    if recipe.served is None:
        yield None
        return
    logs.mkdir(parents=True, exist_ok=True)
    port = recipe.served.port or free_port()
    log = logs / "reward-server.log"
    with open(log, "ab") as out:
        process = _start(server_plan(recipe, port), out)
    try:
        with _Signals() as signals:
            _wait_healthy(process, port, log, signals)
        yield f"http://127.0.0.1:{port}"
    finally:
        _kill(process)


def _start(plan: Plan, out: IO[bytes], *, stderr: int | None = subprocess.STDOUT, launcher: bool = False):
    return subprocess.Popen(
        plan.argv,
        env={**os.environ, **plan.env},
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=stderr,
        start_new_session=True,  # Ctrl-C in the terminal reaches r1v alone, which passes it on
        preexec_fn=_outlive_signals if launcher else functools.partial(die_with_parent, signal.SIGTERM),
    )


def _ticks(process: subprocess.Popen, watch: Callable[[], None] | None = None) -> Iterator[None]:
    """A few times a second as long as the process runs; `watch` is called each time, and once after its end."""
    while process.poll() is None:
        time.sleep(POLL_S)
        if watch:
            watch()
        yield
    if watch:
        watch()


def _outlive_signals() -> None:
    """The launcher waits for its ranks, which stop at a signal by themselves; it ends with r1v, however that ends."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(signal.SIGKILL)


def _kill(process: subprocess.Popen, first: int = signal.SIGTERM) -> None:
    """End a process group: politely unless `first` says otherwise, then not."""
    for number, wait in ((first, 10), (signal.SIGKILL, 10)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            continue
    # What the leader left behind in its group.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _wait_healthy(process: subprocess.Popen, port: int, log: Path, signals: _Signals) -> None:
    deadline = time.monotonic() + SERVER_START_S
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy would not find this machine
    for _ in _ticks(process):
        if signals.count:
            raise Interrupted("interrupted while the reward server was starting")
        with contextlib.suppress(OSError), direct.open(f"http://127.0.0.1:{port}/health", timeout=2) as reply:
            if reply.status == 200:
                return
        if time.monotonic() > deadline:
            raise _not_ready(f"the reward server was not ready after {SERVER_START_S} s", log)
    raise _not_ready("the reward server ended before it was ready", log)


def _not_ready(message: str, log: Path) -> UsageError:
    return UsageError(message, details=tail(log), hint=f"the whole log: {log}")


def _cause(logs: Path, code: int) -> R1VError:
    """The first failure among the ranks; where none left a cause (killed, out of memory), the logs' tails."""
    files = sorted(logs.glob("rank-*.error.json"), key=lambda f: f.stat().st_mtime)
    for file in files:
        try:
            error = from_dict(json.loads(file.read_text()))
        except ValueError:
            continue
        rank = file.name.split(".")[0]
        if error.exit_code == 1:
            error.details = error.details + tail(logs / f"{rank}.log")
            error.hint = error.hint or f"this looks like a bug; the whole log: {logs / f'{rank}.log'}"
        return error
    if shutil.disk_usage(logs).free < 1e6:  # too little for a rank to say so itself
        return disk_full(logs)
    if code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
    else:
        how = f"ended with exit code {code} and left no cause; it may have been killed (out of memory?)"
    log = max(logs.glob("rank-*.log"), key=lambda f: f.stat().st_mtime, default=logs / "launcher.log")
    return R1VError(f"a training process {how}", details=tail(log) + tail(logs / "launcher.log"), hint=f"logs: {logs}")


def tail(log: Path, lines: int = 15) -> list[str]:
    """The last lines of a log, [] when there is none."""
    try:
        return log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
    except OSError:
        return []
