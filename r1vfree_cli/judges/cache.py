"""Judgements on disk, by content hash: what was judged once is not paid for again. Failures never get here."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..core import console

BUSY_S = 30.0


class JudgementCache:
    """Scores in one SQLite file that several processes may use at once.

    A cache that cannot be read or written is given up with a warning: training does not depend on it.

    Args:
        folder: where `judgements.sqlite` is or will be; None for no cache.
    """

    def __init__(self, folder: Path | None):
        self._path = folder / "judgements.sqlite" if folder else None
        self._connection: sqlite3.Connection | None = None

    def get(self, keys: Sequence[str]) -> dict[str, float]:
        """The known scores among `keys`."""
        found: dict[str, float] = {}
        try:
            connection = self._open()
            for start in range(0, len(keys) if connection else 0, 500):
                part = keys[start : start + 500]
                marks = ",".join("?" * len(part))
                query = f"SELECT key, score FROM judgements WHERE key IN ({marks})"  # only question marks
                found.update(connection.execute(query, part))  # type: ignore[union-attr]
        except (sqlite3.Error, OSError) as e:
            self._give_up(e)
        return found

    def put(self, scores: Mapping[str, float]) -> None:
        """Add scores, in one transaction."""
        try:
            connection = self._open() if scores else None
            if connection:
                with connection:
                    connection.executemany("INSERT OR REPLACE INTO judgements VALUES (?, ?)", scores.items())
        except (sqlite3.Error, OSError) as e:
            self._give_up(e)

    def close(self) -> None:
        """Let go of the file; the next use opens it again."""
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
        self._connection = None

    def _open(self) -> sqlite3.Connection | None:
        if self._path is None or self._connection is not None:
            return self._connection
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._connection = sqlite3.connect(self._path, timeout=BUSY_S, check_same_thread=False)
        with self._connection as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS judgements (key TEXT PRIMARY KEY, score REAL NOT NULL)")
        return self._connection

    def _give_up(self, error: Exception) -> None:
        console.warn(f"judgement cache {self._path} cannot be used ({error}); going on without it")
        self.close()
        self._path = None
