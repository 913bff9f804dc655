"""The ranks of an attempt as processes: who still runs, signals to them, and those that outlived their r1v process.

A rank locks its pid file as long as it lives; a process id alone may have been given to another process since.
"""

import contextlib
import ctypes
import fcntl
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

import psutil

from . import console
from .errors import UsageError

POLL_S = 0.2


def grace_s() -> float:
    """Seconds that a rank has for its last checkpoint once it was told to stop; r1v waits a quarter longer."""
    text = os.environ.get("R1V_GRACE_S", "120")
    if not re.fullmatch(r"\d{1,6}(\.\d+)?", text):
        raise UsageError(f"the environment variable R1V_GRACE_S is {text!r}, not a number of seconds")
    return float(text)


def orphaned(launcher: int | None) -> bool:
    """Whether the r1v process that had this rank started is gone. Asked once the rank dies with its own parent."""
    if launcher is None:
        return False
    at: psutil.Process | None = psutil.Process()
    try:
        while at is not None and at.pid != launcher:  # no further: what is above is none of ours, and may be hidden
            at = at.parent()
    except psutil.Error:  # it died meanwhile
        return True
    return at is None


def hold_pid_file(file: Path) -> TextIO:
    """Write this process's id into `file` and lock it until the process ends; keep what is returned."""
    held = open(file, "w")  # noqa: SIM115
    fcntl.flock(held, fcntl.LOCK_EX)
    held.write(f"{os.getpid()}\n")
    held.flush()
    return held


def running(logs: Path) -> list[int]:
    """Ids of the ranks that hold a pid file in `logs`. An id alone may have been given to another process since."""
    found = []
    for file in logs.glob("rank-*.pid"):
        with open(file) as f:
            try:
                fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                text = f.read().strip()
                found += [int(text)] if text.isdigit() else []
    return found


def signal_all(logs: Path, number: int) -> int:
    """Send a signal to the ranks that still run; returns how many got it."""
    sent = 0
    for pid in running(logs):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            sent += 1
    return sent


def end_orphans(logs: Path) -> None:
    """Wait for ranks of this machine that outlived an attempt whose r1v process was killed, then kill them.

    They were told to stop when it died and may be writing a last checkpoint.
    """
    deadline = time.monotonic() + 1.25 * grace_s()
    if orphans := running(logs):
        console.log(f"waiting for {len(orphans)} process(es) of the last attempt to write their checkpoint")
    while running(logs) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    signal_all(logs, signal.SIGKILL)


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Ask Linux to send `number` to this process when its parent dies; does nothing elsewhere."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, number)  # PR_SET_PDEATHSIG


def cpu_count() -> int:
    """Cores that this process may use: of a machine's, a scheduler or container may have given it a few."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus() -> list[str] | None:
    """What CUDA_VISIBLE_DEVICES names (numbers, UUIDs, MIG instances), as CUDA reads it; None where it is not set."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in (visible or "").split(",")]
    return None if visible is None else list(itertools.takewhile(lambda name: name not in ("", "-1"), names))


def gpu_names(indices: Iterable[int]) -> str:
    """CUDA_VISIBLE_DEVICES of a process that gets these of the GPUs that this one may use."""
    visible = visible_gpus() or []
    return ",".join(visible[i] if i < len(visible) else str(i) for i in indices)


def gpu_count() -> int:
    """GPUs that this process may use, without asking torch: device files, less what CUDA_VISIBLE_DEVICES hides."""
    present = sum(1 for f in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", f.name))
    visible = visible_gpus()
    if visible is None:
        return present
    parts = present and any(name.startswith("MIG-") for name in visible)  # several of a GPU
    return len(visible) if parts else min(present, len(visible))


def gpu_gigabytes() -> int | None:
    """Memory of the smallest GPU, in GiB, by the driver's own tool; None where that cannot tell."""
    ask = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(ask, capture_output=True, text=True, timeout=10, check=True).stdout
        return min(round(int(line) / 1024) for line in said.split())
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError inside the body, in any thread, when it takes longer; it must be Python that runs there."""

    class TooLong(TimeoutError):
        def __init__(self) -> None:
            super().__init__(f"it took longer than {seconds:g} seconds")

    lock, here, done = threading.Lock(), ctypes.c_ulong(threading.get_ident()), False
    raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc

    def stop() -> None:
        with lock:
            if not done:
                raise_in(here, ctypes.py_object(TooLong))

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        with lock:
            done = True
        raise_in(here, None)  # it came too late to be raised
