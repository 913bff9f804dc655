"""Small files: JSON and JSON lines, hashes, locks; where caches are.

Files and folders are written beside and renamed, so a reader never sees half of one; JSONL grows a line at a time.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from . import console
from .errors import DataError, UsageError, first_line
from .machine import library

T = TypeVar("T")

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically: temporary name, fsync, rename. Raises UsageError: what the system refused."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as e:
        raise cannot_write(path, e) from e


def cannot_write(path: object, error: BaseException) -> UsageError:
    """The error of a write that the system refused."""
    cache = Path(str(path)).is_relative_to(cache_dir())
    reason = getattr(error, "strerror", None) or first_line(error)
    if isinstance(error, FileExistsError | NotADirectoryError):
        reason = "a file is where a folder must be"
    hint = "the environment variable R1V_CACHE names another cache" if cache else None
    return UsageError(f"cannot write {path}: {reason}", hint=hint)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, document: Any) -> None:
    """Indented JSON; NaN and infinity are refused because they are not JSON."""
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Parse a JSON file, with or without a byte order mark. Raises DataError: missing, unreadable or not JSON."""
    with library(f"cannot read {path}"):
        return parse_json(path.read_bytes())


def read_object(path: Path) -> dict:
    """`read_json` of a file that must hold an object. Raises DataError: as `read_json`, or it holds something else."""
    document = read_json(path)
    if not isinstance(document, dict):
        raise DataError(f"{path} holds no JSON object")
    return document


def parse_json(data: bytes) -> Any:
    """Parse JSON in UTF-8, with or without a byte order mark. Raises RecursionError: nested too deeply. ValueError: not
    JSON, or text that cannot be written again: half of a surrogate pair, which only escapes make.
    """
    document = json.loads(data.decode("utf-8-sig"))
    if _SURROGATE.search(data):
        json.dumps(document, ensure_ascii=False).encode("utf-8")
    return document


def append_jsonl(path: Path, document: Any) -> None:
    """Append one line, in one write call, or nothing. Raises UsageError: as `write_bytes`."""
    line = (json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab", buffering=0) as f:
            end = f.tell()
            if f.write(line) != len(line):  # the disk is full now
                f.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as e:
        raise cannot_write(path, e) from e


def repair_tail(path: Path) -> None:
    """Cut a half-written last line, which a killed writer can leave, so that the next line starts on its own."""
    if path.is_file() and not (data := path.read_bytes()).endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)


def read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number from 1, document). A last line without a newline (a killed writer) is left out.

    Raises DataError: a complete line that is not JSON, or an unreadable file.
    """
    with library(f"cannot read {path}"), open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                document = parse_json(line)
            except (ValueError, RecursionError) as e:
                if not line.endswith(b"\n"):
                    return
                raise DataError(f"{path}, line {number}: not JSON: {e}") from None
            yield number, document


def read_records(path: Path, read: Callable[[Any], T], what: str) -> Iterator[tuple[Any, T | None]]:
    """(document, what `read` makes of it) for each line of a file that is appended to; nothing where there is none.

    (document, None) where a line is not `what`: damaged, edited, or `read` raised. Such lines are named.

    Raises DataError: an unreadable file.
    """
    bad = []
    with library(f"cannot read {path}"):
        lines = path.read_bytes().splitlines(True) if path.is_file() else []
    for number, line in enumerate(lines, 1):
        document = found = None
        try:
            document = parse_json(line)
            found = read(document)
        except (ValueError, RecursionError, TypeError, LookupError, AttributeError):
            if line.endswith(b"\n") and line.strip():  # what a killed writer left is no record
                bad.append(str(number))
        yield document, found
    if bad:
        console.warn(f"{path}: no {what} in line {', '.join(bad[:5])} ({len(bad)} in all): left out")


def remembered(path: Path, sound: Callable[[Any], bool], make: Callable[[], Any]) -> Any:
    """The JSON of a cache file; what `make` gives, which is kept there, where there is none or none that is `sound`."""
    if path.is_file():
        with suppress(DataError, TypeError, ValueError, LookupError):
            if sound(found := read_json(path)):
                return found
        console.warn(f"{path} is damaged: made again")
    made = make()
    write_json(path, made)
    return made


@contextmanager
def lock(path: Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a folder, which lies beside it: the folder may be deleted and made again. A killed process lets
    go.

    With `wait`, another holder is waited for. Raises UsageError: another process holds it; or it cannot be written.
    """
    path = path.resolve()
    file = path.with_name(f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(file, timeout=-1 if wait else 0)
        held.acquire()
    except Timeout:
        if not file.is_file():  # a place like /proc, where no file can be made; or somebody's pipe
            raise UsageError(f"cannot write {file}, the lock of the {what}", hint="name another folder") from None
        pid = ""
        with suppress(OSError):  # its holder has just ended
            pid = file.read_text(encoding="utf-8", errors="replace").strip()
        who = "another r1v process" + f" (pid {pid})" * pid.isdigit()
        raise UsageError(f"{who} is using the {what} {path}", hint="wait for it, or name another folder") from None
    except OSError as e:
        raise cannot_write(f"the {what} {path}, whose lock is {file.name} beside it", e) from e
    try:
        with suppress(OSError):
            file.write_text(f"{os.getpid()}\n")
        yield
    finally:
        file.unlink(missing_ok=True)  # while it is held: who waits for it sees that the file is another one
        held.release()


@contextmanager
def staged(folder: Path, *, keep: bool = False) -> Iterator[Path]:
    """Yield an empty staging directory that takes the place of `folder` by a rename when the body ends.

    After an error it is removed, or with `keep` left until the next try. Hold the folder's lock.
    """
    staging, old = (folder.with_name(f".{folder.name}.{what}") for what in ("staging", "old"))
    try:
        for left in (staging, old):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        staging.mkdir(parents=True)
    except OSError as e:
        raise cannot_write(staging, e) from e
    try:
        yield staging
        if folder.exists():
            folder.rename(old)
        staging.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        if not keep:
            shutil.rmtree(staging, ignore_errors=True)
        raise


def sync(path: Path) -> None:
    """fsync a file, or a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_free(path: Path) -> int:
    """Free bytes where `path` is, or will be."""
    return shutil.disk_usage(next(place for place in (path, *path.absolute().parents) if place.exists())).free


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def cache_dir(*parts: str) -> Path:
    """`$R1V_CACHE`, else `$XDG_CACHE_HOME/r1v`, else `~/.cache/r1v`; subfolders are not made."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("R1V_CACHE") or os.path.join(home, "r1v"), *parts)
