"""Starts processes and waits for them: the launcher, a reward server, a module that prints one JSON document.

Ranks write logs, pid and error files into `logs/attempt-N/`; the launcher's exit code is 1 whatever happened.
"""

import contextlib
import functools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ..config.schema import Recipe
from ..core import console
from ..core import process as ranks
from ..core.errors import DataError, Interrupted, R1VError, UsageError, from_dict
from ..core.files import read_json
from ..core.machine import disk_full, ended, how_ended, library
from .plan import Plan, free_port, port_is_free, server_plan

SAME_MOMENT_S = 0.3
_ERROR = re.compile(r"\b(?:\w+\.)*\w*(?:Error|Exception): .*")
SERVER_START_S = 1800  # loading a 7B judge from a cold network disk


def run_json(plan: Plan) -> dict:
    """Run a command that prints one JSON document, its logs passing through to stderr; returns the document.

    Raises R1VError: of the class that the command's `{"error": ...}` names, or that it printed no document.
    Interrupted.
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
        raise ended(shlex.join(plan.argv[1:4]), process.returncode, [], "its results") from None
    if "error" in document:
        raise from_dict(document["error"])
    return document


class _Signals:
    """While active, SIGINT and SIGTERM are noted instead of raised.

    `count` of them; `again`: a person pressed Ctrl-C once more, and not at the same moment: `timeout` sends its signal
    twice, and a scheduler that repeats SIGTERM still wants the checkpoint.
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
    """Run a plan to its end; logs and errors of its processes are in `logs`. `watch` is called a few times a second.

    The first SIGINT or SIGTERM is passed to the ranks, which write a checkpoint; a second SIGINT, or the end of their
    time for it (`ranks.grace_s`), kills them.

    Raises R1VError: of the class and exit code that the first failed rank left, else with the log's tail. Interrupted.
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
                    console.log("stopping after this step, with a checkpoint; Ctrl-C once more stops at once")
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
def serving(recipe: Recipe, logs: Path) -> "Iterator[Server | None]":
    """Run the recipe's reward server, if it has one, while the body runs. Raises UsageError: its port is taken; it
    ended, or was not healthy in time; with its log's errors and tail. Interrupted: a signal came while it was starting.
    """
    if recipe.served is None:
        yield None
        return
    logs.mkdir(parents=True, exist_ok=True)
    port = recipe.served.port or free_port()
    console.log(f"starting the reward server with {recipe.served.model}, log in {logs / 'reward-server.log'}")
    with server(server_plan(recipe, port), port, logs / "reward-server.log", "reward server") as started:
        yield started


@contextmanager
def server(plan: Plan, port: int, log: Path, what: str) -> "Iterator[Server]":
    """Run an HTTP server that answers /health while the body runs. Raises as `serving`."""
    if not port_is_free(port):  # else whatever is there would be taken for it
        hint = "another port, or none: a free one"
        raise UsageError(f"port {port} of the {what} is in use on this machine", hint=hint)
    started = Server(plan, port, log, what)
    try:
        started.wait_healthy()
        yield started
    finally:
        _kill(started.process)


class Server:
    """A server on loopback that is started again once if it ends while it is needed."""

    def __init__(self, plan: Plan, port: int, log: Path, what: str):
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self._plan, self._what = plan, what
        self._deaths = 0
        self._start()

    def _start(self) -> None:
        with open(self.log, "ab") as out:
            self.process = _start(self._plan, out)
        threading.Thread(target=_end_with_leader, args=(self.process.pid,), daemon=True).start()

    def wait_healthy(self) -> None:
        """Return once it answers. Raises as `serving`."""
        deadline = time.monotonic() + SERVER_START_S
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy would not find this machine
        why = f"was not ready after {SERVER_START_S} s"
        with _Signals() as signals:
            for _ in _ticks(self.process):
                if signals.count:
                    raise Interrupted(f"interrupted while the {self._what} was starting")
                with contextlib.suppress(OSError), direct.open(f"{self.url}/health", timeout=2) as reply:
                    if reply.status == 200:
                        return
                if time.monotonic() > deadline:
                    break
            else:
                cause = ended("it", self.process.wait(), tail(self.log), self.log.parent)
                why = "ended before it was ready" + (f": {cause.message}" if isinstance(cause, UsageError) else "")
        # The last few messages of exceptions stand before the log's tail: vLLM ends with "see root cause above".
        said = [m.group() for line in tail(self.log, 400)[:-15] if (m := _ERROR.search(line))]
        details = [*list(dict.fromkeys(said))[-3:], *tail(self.log)]
        raise UsageError(f"the {self._what} {why}", details=details, hint=f"the whole log: {self.log}")

    def watch(self) -> bool:
        """Whether it runs; starts it again once. Who asks it waits for it, and stops the run if it stays away."""
        if self.process.poll() is not None and self._deaths < 2:
            self._deaths += 1
            how = f"the {self._what} {how_ended(self.process.returncode)}, its log: {self.log}"
            again = self._deaths == 1
            console.warn(f"{how}; {'it is started again, once' if again else 'for the second time, it stays down'}")
            _kill(self.process)  # what it left behind holds GPUs
            if again:
                self._start()
        return self._deaths < 2


def _start(plan: Plan, out: IO[bytes], *, stderr: int | None = subprocess.STDOUT, launcher: bool = False):
    # Also where the file is there and the interpreter of its first line is not.
    hint = "make its environment again if that moved; R1V_VLLM names another vllm"
    with library(f"cannot run {plan.argv[0]}", UsageError, hint):
        return subprocess.Popen(
            plan.argv,
            env={**os.environ, **plan.env},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=stderr,
            start_new_session=True,  # Ctrl-C in the terminal reaches r1v alone, which passes it on
            preexec_fn=_outlive_signals if launcher else functools.partial(ranks.die_with_parent, signal.SIGTERM),
        )


def _ticks(process: subprocess.Popen, watch: Callable[[], None] | None = None) -> Iterator[None]:
    """A few times a second as long as the process runs; `watch` is called each time, and once after its end."""
    while process.poll() is None:
        time.sleep(ranks.POLL_S)
        if watch:
            watch()
        yield
    if watch:
        watch()


def _outlive_signals() -> None:
    """The launcher waits for its ranks, which stop at a signal by themselves; it ends with r1v, however that ends."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ranks.die_with_parent(signal.SIGKILL)


def _kill(process: subprocess.Popen, first: int = signal.SIGTERM) -> None:
    """End a process group: politely unless `first` says otherwise, then not."""
    for number in (first, signal.SIGKILL, signal.SIGKILL):  # the last: for what the leader left behind in its group
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)


def _end_with_leader(pid: int) -> None:
    """End a group when its leader ends. vLLM's engine holds the server's listening socket: callers would hang on it."""
    with contextlib.suppress(ChildProcessError, ProcessLookupError):  # reaped already, nothing left
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # the zombie keeps its number until Popen reaps it
        os.killpg(pid, signal.SIGKILL)


def _cause(logs: Path, code: int) -> R1VError:
    """The first failure among the ranks; where none left a cause (killed, out of memory), the logs' tails."""
    files = sorted(logs.glob("rank-*.error.json"), key=lambda f: f.stat().st_mtime)
    for file in files:
        try:
            error = from_dict(read_json(file))
        except DataError:  # damaged: another rank's, or the logs, say more
            continue
        if error.exit_code == 1:
            log = file.with_name(file.name.replace(".error.json", ".log"))
            error.details = error.details + tail(log)
            error.hint = error.hint or f"this looks like a bug; the whole log: {log}"
        return error
    if shutil.disk_usage(logs).free < 1e6:  # too little for a rank to say so itself
        return disk_full(logs)
    log = max(logs.glob("rank-*.log"), key=lambda f: f.stat().st_mtime, default=logs / "launcher.log")
    said = tail(log) + tail(logs / "launcher.log", 60)
    error = ended("a training process", code, said, logs)
    error.hint = "; ".join(filter(None, [error.hint, f"logs: {logs}"]))
    return error


def tail(log: Path, lines: int = 15) -> list[str]:
    """The last lines of a log, [] when there is none."""
    try:
        return log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
    except OSError:
        return []
