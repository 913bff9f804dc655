"""Bad input through the real command line, in this process: what a case is, and what must hold after it.

Whatever the input: exit 2 or 3 (or 0 where the input is acceptable), one message that names the thing, no traceback,
no hang; on failure nothing on stdout with --json, no output folder, no temporary files, every input as it was.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis.strategies import SearchStrategy

from r1vfree_cli import cli
from r1vfree_cli.core.errors import UsageError
from r1vfree_cli.launch import job as jobs

LIMIT_S = 20.0  # a case takes milliseconds, or about a second where a model is loaded


@dataclass(frozen=True)
class Link:
    """A symbolic link among a case's files."""

    target: str


@dataclass
class Case:
    """One run of the command line in a folder of its own.

    argv: arguments of `r1v`; paths in it are relative to the folder.
    files: relative path -> content, written first. base: a folder whose content is copied there before that.
    out: what the command makes; absent, or as `whole` wants it, after a failure.
    names: a failure's message holds one of these. call: run this instead of the command line's app.
    keeps: files under these prefixes may be changed or added even by a failure.
    env, machine: variables, and a call that takes something from the machine: for `run_forked`.
    """

    name: str
    argv: list[str] = field(default_factory=list)
    files: dict[str, bytes | Link] = field(default_factory=dict)
    base: Path | None = None
    out: str | None = None
    names: tuple[str, ...] = ()
    keeps: tuple[str, ...] = ()
    codes: tuple[int, ...] = (0, 2, 3)
    call: Callable[[], Any] | None = None
    env: dict[str, str] = field(default_factory=dict)
    machine: Callable[[], None] | None = None

    def __repr__(self) -> str:
        files = {k: v if isinstance(v, Link) else v[:600] for k, v in self.files.items()}
        return f"Case({self.name!r}, argv={self.argv!r}, files={files!r})"


@dataclass(frozen=True)
class Outcome:
    """What a case did: exit code (-1: no end within the limit), streams, seconds."""

    code: int
    stdout: str
    stderr: str
    seconds: float


class Hang(BaseException):
    """The time limit; not an Exception, so that no handler takes it for an error of the input."""


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    def stop(number, frame):
        raise Hang(f"no end after {seconds:g} s")

    # Code that never comes back to Python cannot be stopped: the whole process ends, with its stack.
    faulthandler.dump_traceback_later(4 * seconds, exit=True, file=sys.__stderr__)
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _merge_here(*args: Any, **options: Any) -> dict:
    """`jobs.merge` without a process of its own, which would import torch each time."""
    from r1vfree_cli.training import merge

    with contextlib.redirect_stdout(sys.stderr):
        return merge.merge(*args, **options)


def _no_training(*_: Any, **__: Any) -> None:
    raise UsageError("run: training is not started in this test")


@contextlib.contextmanager
def _patched(case: Case) -> Iterator[None]:
    """The command line without worker processes; `case.call` in place of the app."""
    saved = cli.app, jobs.merge, jobs.prepare
    cli.app, jobs.merge, jobs.prepare = case.call or cli.app, _merge_here, _no_training  # type: ignore[assignment]
    try:
        yield
    finally:
        cli.app, jobs.merge, jobs.prepare = saved


def run_here(case: Case, folder: Path) -> Outcome:
    """Run the case's command line in this process, with `folder` as the working directory."""
    out, err = io.StringIO(), io.StringIO()
    here, argv = os.getcwd(), sys.argv
    start = time.monotonic()
    os.chdir(folder)
    sys.argv = ["r1v", *case.argv]
    code = 0
    try:
        with _patched(case), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _limited(LIMIT_S):
            cli.main()
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except Hang:
        code = -1
        err.write(traceback.format_exc())
    finally:
        sys.argv = argv
        os.chdir(here)
    return Outcome(code, out.getvalue(), err.getvalue(), time.monotonic() - start)


def run_forked(case: Case, folder: Path) -> Outcome:
    """Run it in a fork, which may lose its memory, its disk or its files."""
    start = time.monotonic()
    streams = [os.pipe(), os.pipe()]
    if not (pid := os.fork()):
        code = 70
        try:
            _become(case, folder, [write for _, write in streams])
            cli.main()
            code = 0
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else int(e.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
            os._exit(code)
    for _, write in streams:
        os.close(write)
    with ThreadPoolExecutor(2) as pool:
        texts = [pool.submit(_all_of, read) for read, _ in streams]
        until = start + 3 * LIMIT_S
        while not (done := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() < until:
            time.sleep(0.005)
        if not done[0]:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(done[1]) if done[0] else -1
        return Outcome(code, texts[0].result(), texts[1].result(), time.monotonic() - start)


def _all_of(stream: int) -> str:
    with open(stream, errors="replace") as f:
        return f.read()


def _become(case: Case, folder: Path, streams: list[int]) -> None:
    """In the fork: the case's command line, environment and machine."""
    os.chdir(folder)
    os.environ.update(case.env)
    tempfile.tempdir = None
    for number, stream in enumerate(streams, 1):
        os.dup2(stream, number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    sys.argv = ["r1v", *case.argv]
    jobs.merge, jobs.prepare = _merge_here, _no_training  # type: ignore[assignment]
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)  # the parent's threads are not in the fork
    if case.machine:
        case.machine()


def run_process(case: Case, folder: Path) -> Outcome:
    """The same through a real process."""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", "from r1vfree_cli.cli import main; main()", *case.argv],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return Outcome(done.returncode, done.stdout, done.stderr, time.monotonic() - start)


def problems(case: Case, run: Callable[[Case, Path], Outcome] = run_here) -> list[str]:
    """Run a case in a fresh folder; one line for each thing that must not be."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        _write(case, folder)
        before = snapshot(folder)
        outcome = run(case, folder)
        return [f"{line} [{case.name}]" for line in _judge(case, outcome, before, snapshot(folder), folder)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(case: Case, folder: Path) -> None:
    if case.base is not None:
        shutil.copytree(case.base, folder, symlinks=True, dirs_exist_ok=True)
    for name, content in case.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() or path.is_symlink():
            path.unlink()
        if isinstance(content, Link):
            path.symlink_to(content.target)
        else:
            path.write_bytes(content)


def snapshot(folder: Path) -> dict[str, str]:
    """Relative path -> what is there: a hash of a file's bytes, a link's target."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _judge(case: Case, o: Outcome, before: dict, after: dict, folder: Path) -> Iterator[str]:
    if o.code not in case.codes:
        yield f"exit {o.code}: {o.stderr.strip()[-600:]}"
        return
    if "Traceback" in o.stdout + o.stderr:
        yield "a traceback is shown"
    if o.code:
        said = [line for line in o.stderr.splitlines() if line.lower().startswith("error: ")]
        if len(said) != 1:
            yield f"{len(said)} error lines: {o.stderr[-300:]!r}"
        elif case.names and not any(name in o.stderr for name in case.names):
            yield f"the message names none of {case.names}: {o.stderr[:300]!r}"
        if "--json" in case.argv and o.stdout:
            yield f"stdout is not empty: {o.stdout[:100]!r}"
        if any(ord(c) < 32 and c not in "\n\r\t\x1b" for c in o.stderr):
            yield f"control characters in the message: {o.stderr[:200]!r}"
    elif "--json" in case.argv:
        try:
            json.loads(o.stdout, parse_constant=_not_json)
        except ValueError as e:
            yield f"stdout is no JSON document: {e}"
    for name in sorted(before.keys() | after.keys()):
        mine = case.out is not None and name.startswith(case.out)
        if any(mark in name for mark in (".tmp", ".staging", ".writing")) and name not in before:
            yield f"a temporary file is left: {name}"
        elif before.get(name) != after.get(name) and not name.startswith(case.keeps or "\0"):
            if name in before:
                yield f"changed: {name}"
            elif o.code or (case.out is not None and not mine):
                yield f"left behind: {name}"
    if o.code == 0 and case.out:
        yield from _halves(folder / case.out)


def _halves(out: Path) -> Iterator[str]:
    """Files of a finished output that cannot be read."""
    for path in [p for p in out.rglob("*") if p.is_file()]:
        try:
            if path.suffix == ".json":
                json.loads(path.read_bytes(), parse_constant=_not_json)
            elif path.suffix == ".parquet":
                pq.ParquetFile(path).read()
            elif not path.stat().st_size:
                raise ValueError("empty")
        except (ValueError, OSError, pa.ArrowException) as e:
            yield f"half a file: {path.name}: {e}"


def _not_json(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


class Tally:
    """Runs cases and keeps what went wrong; `count` is the number that were run."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()
        self.codes: Counter[int] = Counter()
        self.slowest: tuple[float, str] = (0.0, "")
        self.found: dict[str, tuple[str, Case]] = {}

    def check(self, category: str, case: Case, run: Callable[[Case, Path], Outcome] | None = None) -> list[str]:
        """Run one case; returns its problems, which are also kept (the first case of each kind)."""
        run = run or (run_forked if case.env or case.machine else run_here)

        def watched(case: Case, folder: Path) -> Outcome:
            outcome = run(case, folder)
            self.codes[outcome.code] += 1
            self.slowest = max(self.slowest, (outcome.seconds, repr(case)[:300]))
            return outcome

        self.count[category] += 1
        lines = problems(case, watched)
        for line in lines:
            self.found.setdefault(f"{category}: {line}"[:160], (line, case))
        return lines

    def search(self, category: str, cases: SearchStrategy[Case], examples: int, *, seed: int | None = None) -> None:
        """Run `examples` cases that hypothesis makes, always the same ones unless a seed is given."""

        @settings(
            max_examples=examples,
            derandomize=seed is None,
            deadline=None,
            database=None,
            phases=[Phase.generate],  # cases are small; the first of each kind of problem is shown as it is
            suppress_health_check=list(HealthCheck),
        )
        @given(cases)
        def one(case: Case) -> None:
            self.check(category, case)

        (one if seed is None else seeded(seed)(one))()

    def report(self) -> str:
        """What was run, and every kind of problem with its first case."""
        lines = [f"{n:>6} {name}" for name, n in self.count.items()]
        lines.append(f"{self.count.total():>6} cases; exit codes {dict(sorted(self.codes.items()))}")
        lines.append(f"slowest {self.slowest[0]:.1f} s: {self.slowest[1]}")
        for line, case in self.found.values():
            lines.append(f"\nPROBLEM {line}\n  {case!r}")
        return "\n".join(lines)
