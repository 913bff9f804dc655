"""Judgements on disk, by content hash: what was judged once is not paid for again. Failures never get here."""

import contextlib
import json
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core import console
from ..core.files import parse_json
from .protocol import Failure, checked

BUSY_S = 30.0


class JudgementCache:
    """Scores in one SQLite file that several processes may use at once; rewards and evaluations share it.

    A cache that cannot be read or written is given up with a warning: nothing depends on it. A record that cannot be
    a judgement is named and asked again. `folder` None: no cache.
    """

    def __init__(self, folder: Path | None):
        self._path = folder / "judgements.sqlite" if folder else None
        self._connection: sqlite3.Connection | None = None

    def get(self, keys: Sequence[str], *, bounded: bool = False) -> dict[str, float]:
        """The known scores among `keys`; with `bounded` they are probabilities."""
        return self._read(keys, lambda score, _: checked(score, bounded))

    def get_labels(self, keys: Sequence[str], labels: Mapping[str, int]) -> dict[str, dict]:
        """The known labels among `keys`: {label, raw, model}."""

        def read(score: Any, note: Any) -> dict:
            said = parse_json(note.encode())
            if score not in labels.values() or not all(isinstance(said[k], str) for k in ("raw", "model")):
                raise ValueError
            return {"label": int(score), "raw": said["raw"], "model": said["model"]}

        return self._read(keys, read)

    def put(self, scores: Mapping[str, float], note: dict | None = None) -> None:
        """Add scores, in one transaction; `note` is kept beside them."""
        text = None if note is None else json.dumps(note)
        rows = [(key, score, text) for key, score in scores.items()]
        try:
            if rows and (connection := self._open()):
                with connection:
                    connection.executemany("INSERT OR REPLACE INTO judgements VALUES (?, ?, ?)", rows)
        except (sqlite3.Error, OSError) as e:
            self._give_up(e)

    def close(self) -> None:
        """Let go of the file; the next use opens it again."""
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
        self._connection = None

    def _read(self, keys: Sequence[str], read: Callable[[Any, Any], Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        bad: list[str] = []
        try:
            connection = self._open()
            for start in range(0, len(keys) if connection else 0, 500):
                part = keys[start : start + 500]
                marks = ",".join("?" * len(part))
                query = f"SELECT key, score, note FROM judgements WHERE key IN ({marks})"  # only question marks
                for key, score, note in connection.execute(query, part):  # type: ignore[union-attr]
                    try:
                        found[key] = read(score, note)
                    except (Failure, ValueError, RecursionError, LookupError, TypeError, AttributeError):
                        bad.append(key)
        except (sqlite3.Error, OSError) as e:
            self._give_up(e)
        if bad:
            console.warn(f"{self._path}: {len(bad)} records are no judgements and are asked again: {bad[0]}, ...")
        return found

    def _open(self) -> sqlite3.Connection | None:
        if self._path is None or self._connection is not None:
            return self._connection
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._connection = sqlite3.connect(self._path, timeout=BUSY_S, check_same_thread=False)
        with self._connection as connection:
            connection.execute(
                "CREATE TABLE IF NOT EXISTS judgements (key TEXT PRIMARY KEY, score REAL NOT NULL, note TEXT)"
            )
        return self._connection

    def _give_up(self, error: Exception) -> None:
        console.warn(f"judgement cache {self._path} cannot be used ({error}); going on without it")
        self.close()
        self._path = None
