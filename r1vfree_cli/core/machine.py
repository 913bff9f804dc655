"""What the machine refused: disk, memory, permission. That is no bug, whichever library found out."""

import errno
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import DataError, R1VError, UsageError, first_line

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SYSTEM = re.compile(r"\[?(?:os error|errno) (\d+)", re.IGNORECASE)  # Rust's and Arrow's words for the system's error
_MEMORY = re.compile(
    r"(?i)out of memory|can(?:no|')t allocate memory|not enough memory|bad_alloc|memory allocation of \d+ bytes failed"
    r"|can't start new thread|failed to map segment|killed by signal: (?:Killed|Bus error)|out of shared memory"
)
_KILLED = re.compile(r"Signals\.SIGKILL|exitcode\s*:\s*-9|return code = -9")


def _number(error: BaseException) -> int | None:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = _SYSTEM.search(str(error))
    return int(found[1]) if found else None


def no_space(error: BaseException) -> bool:
    """Whether it says that a disk, quota or file-size limit is full."""
    texts = ["inline_container.cc", *map(os.strerror, FULL)]  # torch.save's zip writer says only that it failed
    return _number(error) in FULL or any(text in str(error) for text in texts)


def disk_full(path: object) -> UsageError:
    """The error of a write that found no space."""
    hint = "earlier checkpoints are intact: free some space and go on with --resume; train.save_total_limit bounds it"
    return UsageError(f"no space left on the disk while writing {path}", hint=hint)


def no_memory(error: BaseException) -> bool:
    """Whether it says that memory, of the machine or of a GPU, is used up."""
    told = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return told or _number(error) == errno.ENOMEM or bool(_MEMORY.search(str(error)))


def memory_full(what: str) -> UsageError:
    """The error of a process that found no memory."""
    hint = "end other programs, or take fewer at a time (--batch-size, train.prompts_per_device, model.max_pixels)"
    return UsageError(f"not enough memory: {what}", hint=hint)


def refused(error: BaseException | None, writing: object = "its results") -> UsageError | None:
    """What the machine refused, where that is what an exception or its cause says; else None.

    `writing`: what a full disk stopped, where the exception does not name it.
    """
    while error is not None:
        name = getattr(error, "filename", None)
        if no_space(error):
            return disk_full(name or writing)
        if no_memory(error):
            return memory_full(f"{type(error).__name__}: {first_line(error)}"[:300])
        if isinstance(error, OSError) and error.errno is not None and error.strerror:
            where = f"cannot use {os.fsdecode(name)[:300]}: " if isinstance(name, str | bytes) else ""
            return UsageError(f"{where}{error.strerror}", hint="--debug shows what was being done")
        error = error.__cause__
    return None


@contextmanager
def library(what: str, kind: type[R1VError] = DataError, hint: str | None = None) -> Iterator[None]:
    """What a library or the system raises in the body as our error: `what: its first line`. Lack of memory passes."""
    try:
        yield
    except Exception as e:
        if isinstance(e, R1VError) or no_memory(e):
            raise
        named = isinstance(e, OSError) and e.strerror and str(e.filename or "") in what
        raise kind(f"{what}: {e.strerror if named else first_line(e)}", hint=hint) from None  # type: ignore[attr-defined]


def how_ended(code: int) -> str:
    """What became of a process with this exit code."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def ended(what: str, code: int, log: list[str], writing: object) -> R1VError:
    """The error of a process that ended and left no cause, from its exit code and the end of its log."""
    said, how = RuntimeError("\n".join(log)), how_ended(code)
    if code == -signal.SIGKILL or _KILLED.search(str(said)):
        error: R1VError = memory_full(f"{what} was killed by SIGKILL, as the system does when memory runs out")
    elif no_memory(said):
        error = memory_full(f"{what} {how}")
    else:
        error = disk_full(writing) if no_space(said) else R1VError(f"{what} {how} and left no cause")
    error.details = log[-30:]
    return error
