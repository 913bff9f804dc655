"""One command writes an eval dir at a time."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ..core.errors import UsageError


@contextmanager
def lock(path: Path, what: str) -> Iterator[None]:
    path = path.resolve()
    file = path.with_name(f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(file, timeout=0)
        held.acquire()
    except Timeout:
        pid = file.read_text(encoding="utf-8", errors="replace").strip()
        who = f"another r1v process (pid {pid})" if pid.isdigit() else "another r1v process"
        raise UsageError(f"{who} is using the {what} {path}", hint="wait for it, or name another folder") from None
    except OSError as e:
        raise UsageError(f"cannot write {file}: {e.strerror}", hint="name another folder") from e
    try:
        with suppress(OSError):
            file.write_text(f"{os.getpid()}\n")
        yield
    finally:
        file.unlink(missing_ok=True)
        held.release()
