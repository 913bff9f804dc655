"""What the machine refuses is an error of its own, in whichever library's words; a process that was killed is named."""

import errno
import os
import sys

import pytest

from r1vfree_cli.core import files
from r1vfree_cli.core.errors import R1VError, UsageError
from r1vfree_cli.core.machine import ended, refused
from r1vfree_cli.launch import processes
from r1vfree_cli.launch.plan import Plan

OutOfMemoryError = type("OutOfMemoryError", (RuntimeError,), {})


@pytest.mark.parametrize(
    "error, said",
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a/b"), "no space left on the disk while writing a/b"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "no space left"),
        (OSError("Error writing bytes to file. Detail: [errno 122] Disk quota exceeded"), "no space left"),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"), "no space left"),
        (MemoryError(), "not enough memory: MemoryError"),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "not enough memory: OutOfMemoryError: CUDA"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory"), "memory"),
        (RuntimeError("can't start new thread"), "not enough memory"),
        (ImportError("libtorch.so: failed to map segment from shared object"), "not enough memory"),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "not enough memory"),
        (RuntimeError("DataLoader worker (pid 9) is killed by signal: Killed. "), "not enough memory"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/x"), "cannot use /x: Permission denied"),
        (OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), "y" * 5000), "yyy: File name too long"),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "Too many open files"),
    ],
)
def test_what_the_machine_refuses_is_no_bug(error, said):
    for raised in (error, _because_of(error)):
        found = refused(raised)
        assert found and found.exit_code == 2 and said in found.message and len(found.message) < 400 and found.hint


def _because_of(error: Exception) -> Exception:
    try:
        raise ValueError("a library's words") from error
    except ValueError as e:
        return e


@pytest.mark.parametrize("bug", [ValueError("x"), KeyError("errno"), OSError("no such model"), RuntimeError("28")])
def test_what_is_a_bug_stays_one(bug):
    assert refused(bug) is None and refused(_because_of(bug)) is None


@pytest.mark.parametrize(
    "code, log, said, exit_code",
    [
        (-9, [], "was killed by SIGKILL, as the system does when memory runs out", 2),
        (1, ["died with <Signals.SIGKILL: 9>."], "was killed by SIGKILL", 2),
        (1, ["  exitcode  : -9 (pid: 77)"], "was killed by SIGKILL", 2),
        (-6, ["memory allocation of 4096 bytes failed"], "not enough memory: it was killed by SIGABRT", 2),
        (1, ["torch.OutOfMemoryError: CUDA out of memory."], "not enough memory: it ended with exit code 1", 2),
        (1, ["OSError: [Errno 28] No space left on device"], "no space left on the disk while writing w", 2),
        (-11, ["x"], "it was killed by SIGSEGV and left no cause", 1),
        (7, ["x"], "it ended with exit code 7 and left no cause", 1),
    ],
)
def test_how_a_process_ended(code, log, said, exit_code):
    found = ended("it", code, log, "w")
    assert said in found.message and found.exit_code == exit_code and found.details == log


def test_a_worker_that_the_system_killed_is_named(tmp_path):
    """As the launcher leaves it: its own exit code is 1, its log has what became of the rank."""
    died = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {died!r}], check=True)"
    with pytest.raises(UsageError, match="a training process was killed by SIGKILL") as caught:
        processes.execute(Plan([sys.executable, "-c", launcher], {}, 1), tmp_path / "logs")
    assert str(tmp_path / "logs") in caught.value.hint
    with pytest.raises(UsageError, match="was killed by SIGKILL"):
        processes.run_json(Plan([sys.executable, "-c", died], {}, 1))
    with pytest.raises(R1VError, match="exit code 3 and left no cause"):
        processes.run_json(Plan([sys.executable, "-c", "raise SystemExit(3)"], {}, 1))


def test_a_line_that_does_not_fit_on_the_disk_is_not_begun(tmp_path):
    path = tmp_path / "lines.jsonl"
    files.append_jsonl(path, {"line": 1})
    whole = path.read_bytes()
    if not (pid := os.fork()):
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 7,) * 2)
        try:
            files.append_jsonl(path, {"line": "x" * 100})
        except UsageError as e:
            os._exit(41 if "No space left" in e.message else 42)
        finally:
            os._exit(43)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 41 and path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_says_how_to_name_another(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("R1V_CACHE", str(tmp_path / "file"))
    with pytest.raises(UsageError, match=r"cannot write .*file/x.json: a file is where") as caught:
        files.write_json(files.cache_dir("x.json"), {})
    assert "R1V_CACHE" in caught.value.hint
