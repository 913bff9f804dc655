"""Run dirs: names, the guard against overwriting, attempts, status, provenance, and safe small files.

Every file is written to a temporary name in the same folder and renamed, so a reader never sees half of one;
JSONL files are appended to a whole line at a time.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..core.errors import DataError, UsageError

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

SAID = "said.jsonl"  # in an attempt's logs: what rank 0 says to people, for r1v to repeat

FINISHED, RUNNING, STARTING, FAILED, INTERRUPTED, STOPPED = (
    "finished",
    "running",
    "starting",
    "failed",
    "interrupted",
    "stopped",
)


# --- small files -----------------------------------------------------------------------------------------------


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file or nothing: temporary name, fsync, rename.

    Raises:
        UsageError: the disk is full, the place is a file's, no permission.
    """
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
        raise UsageError(f"cannot write {path}: {e.strerror}") from e


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, document: Any) -> None:
    """Indented JSON; NaN and infinity are refused because they are not JSON."""
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Parse a JSON file, with or without a byte order mark.

    Raises:
        DataError: missing, unreadable or not JSON.
    """
    try:
        return parse_json(path.read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise DataError(f"cannot read {path}: {e}") from None


def read_object(path: Path) -> dict:
    """`read_json` of a file that must hold an object.

    Raises:
        DataError: as `read_json`, or it holds something else.
    """
    document = read_json(path)
    if not isinstance(document, dict):
        raise DataError(f"{path} holds no JSON object")
    return document


def parse_json(data: bytes) -> Any:
    """Parse JSON in UTF-8, with or without a byte order mark.

    Raises:
        ValueError: not JSON, or text that cannot be written again: half of a surrogate pair, which only escapes make.
        RecursionError: nested too deeply.
    """
    document = json.loads(data.decode("utf-8-sig"))
    if _SURROGATE.search(data):
        json.dumps(document, ensure_ascii=False).encode("utf-8")
    return document


def append_jsonl(path: Path, document: Any) -> None:
    """Append one line, in one write call.

    Raises:
        UsageError: as `write_bytes`.
    """
    line = json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab", buffering=0) as f:
            f.write(line.encode("utf-8"))
    except OSError as e:
        raise UsageError(f"cannot write {path}: {e.strerror}") from e


def read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number from 1, document). A last line without a newline (a killed writer) is left out.

    Raises:
        DataError: a whole line that is not JSON, or an unreadable file.
    """
    try:
        with open(path, "rb") as f:
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
    except OSError as e:
        raise DataError(f"cannot read {path}: {e}") from None


def no_space(error: BaseException) -> bool:
    """Whether it says that a disk, quota or file-size limit is full."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    # safetensors wraps the system's error in its own; torch.save's zip writer says only that it failed.
    return "inline_container.cc" in str(error) or any(
        os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    )


def disk_full(path: Path | str) -> UsageError:
    """The error of a write that found no space."""
    return UsageError(
        f"no space left on the disk while writing {path}",
        hint="earlier checkpoints are intact: free some space and go on with --resume; train.save_total_limit bounds it",
    )


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def cache_dir(*parts: str) -> Path:
    """`$R1V_CACHE`, else `$XDG_CACHE_HOME/r1v`, else `~/.cache/r1v`; subfolders are not made."""
    root = os.environ.get("R1V_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "r1v"
    )
    return Path(root, *parts)


# --- the run dir -----------------------------------------------------------------------------------------------


class RunDir:
    """Paths and small state of one run.

    `attempt` counts the starts of this run from 1; each has its own `logs/attempt-N/`.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.launch = self.path / "launch.json"
        self.status_file = self.path / "status.json"
        self.metrics = self.path / "metrics.jsonl"
        self.summary = self.path / "summary.json"
        self.rollouts = self.path / "rollouts"
        self.checkpoints = self.path / "checkpoints"
        self.final = self.path / "final"

    @property
    def status(self) -> dict:
        """`status.json`, or {} when there is none."""
        return read_object(self.status_file) if self.status_file.is_file() else {}

    @property
    def attempt(self) -> int:
        number = self.status.get("attempt", 0)
        if not isinstance(number, int) or not 0 <= number < 10**6:
            raise DataError(f"{self.status_file}: attempt is {str(number)[:40]!r}, not a count")
        return number

    @property
    def logs(self) -> Path:
        """The folder of the current attempt's logs."""
        return self.path / "logs" / f"attempt-{self.attempt}"

    @property
    def holds_run(self) -> bool:
        return self.recipe.exists() or self.status_file.exists()

    def set_status(self, state: str, **fields: Any) -> None:
        """Replace `status.json`, keeping what is not named: state, step, attempt, reason, time (s, epoch)."""
        write_json(self.status_file, self.status | {"state": state, "time": round(time.time(), 3)} | fields)

    def _own(self) -> list[Path]:
        """What is in the folder, but for what nodes above 0, which may be faster, have put there for themselves."""
        return [child for child in self.path.iterdir() if child.name != "nodes"]

    def begin(self, recipe_yaml: str, *, resume: bool = False, overwrite: bool = False) -> None:
        """Claim the folder for a new attempt, of this recipe from now on: `jobs` tells what a resume changes.

        It may be killed at any moment: what is left is always a run dir that the next call accepts.

        Raises:
            UsageError: it holds a run and neither resume nor overwrite was asked; or it holds something else.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"{self.path} is a file, not a folder", hint="choose another --run-dir")
        if self.holds_run and overwrite:
            for child in sorted(self._own(), key=lambda c: c == self.recipe):  # what says "a run dir" goes last
                shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()
        for half in (*self.path.glob(".*.tmp"), *self.rollouts.glob(".*.tmp")):  # of a killed writer
            half.unlink(missing_ok=True)
        if self.holds_run and not resume:
            state = self.status.get("state", "unknown state")
            raise UsageError(
                f"{self.path} holds a run already ({state})",
                hint="--resume continues it, --run-dir names another folder, --overwrite deletes it first",
            )
        if resume and not self.holds_run:
            raise UsageError(f"{self.path} holds no run to resume", hint="leave out --resume to start one")
        if not self.holds_run and self.path.is_dir() and self._own():
            raise UsageError(f"{self.path} is not empty and is no run dir", hint="choose another --run-dir")
        attempt = self.attempt + 1
        write_text(self.recipe, recipe_yaml)
        (self.path / "logs" / f"attempt-{attempt}").mkdir(parents=True, exist_ok=True)
        self.set_status(STARTING, attempt=attempt, reason=None)
