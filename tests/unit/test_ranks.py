"""Ranks as processes: who still runs, and those that outlived their r1v process."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from r1vfree_cli.core import process as ranks
from r1vfree_cli.core.errors import DataError, UsageError
from r1vfree_cli.launch.processes import _cause

HOLD = """
import sys, time
from pathlib import Path
from r1vfree_cli.core import process as ranks
held = ranks.hold_pid_file(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(float(sys.argv[2]))
"""


def rank(logs, number: int, seconds: float) -> subprocess.Popen:
    """A process that holds its pid file for a while."""
    argv = [sys.executable, "-c", HOLD, str(logs / f"rank-{number}.pid"), str(seconds)]
    process = subprocess.Popen(
        argv, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    return process


def test_only_a_process_that_holds_its_pid_file_gets_a_signal(tmp_path):
    (tmp_path / "rank-0.pid").write_text(f"{os.getpid()}\n")  # of an attempt that is over; the id is another's now
    process = rank(tmp_path, 1, 60)
    assert ranks.running(tmp_path) == [process.pid]
    assert ranks.signal_all(tmp_path, signal.SIGTERM) == 1
    assert process.wait(10) == -signal.SIGTERM and ranks.running(tmp_path) == []


def test_an_orphan_may_finish_its_checkpoint_and_is_killed_when_it_takes_too_long(tmp_path, monkeypatch):
    monkeypatch.setenv("R1V_GRACE_S", "1.2")
    quick, slow = rank(tmp_path, 0, 0.5), rank(tmp_path, 1, 60)
    begin = time.monotonic()
    ranks.end_orphans(tmp_path)
    assert quick.wait(10) == 0 and slow.wait(10) == -signal.SIGKILL
    assert 1.5 <= time.monotonic() - begin < 10
    begin = time.monotonic()
    ranks.end_orphans(tmp_path)
    assert time.monotonic() - begin < 1


def test_a_process_knows_that_its_r1v_is_gone():
    assert not ranks.orphaned(os.getppid()) and not ranks.orphaned(None)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert ranks.orphaned(gone.pid)


def test_what_is_above_its_r1v_is_not_asked(monkeypatch):
    """It may be another user's, hidden, or ending just now."""
    asked = []
    parent = psutil.Process.parent

    def hidden(process):
        asked.append(process.pid)
        if process.pid != os.getpid():
            raise psutil.AccessDenied(process.pid)
        return parent(process)

    monkeypatch.setattr(psutil.Process, "parent", hidden)
    assert not ranks.orphaned(os.getppid()) and asked == [os.getpid()]
    assert ranks.orphaned(2**22 + 1)


def test_a_damaged_cause_of_one_rank_does_not_hide_anothers(tmp_path):
    (tmp_path / "rank-0.error.json").write_text("")
    (tmp_path / "rank-1.error.json").write_text(json.dumps(DataError("no rows left").to_dict()))
    os.utime(tmp_path / "rank-0.error.json", (0, 0))
    assert _cause(tmp_path, 1).message == "no rows left"


def test_a_grace_time_that_is_none_is_told(monkeypatch):
    for text in ("2 min", "", "-1", "nan", "1e999"):
        monkeypatch.setenv("R1V_GRACE_S", text)
        with pytest.raises(UsageError, match="R1V_GRACE_S"):
            ranks.grace_s()
