"""prepare-data: any source to parquet shards of rows, atomically, with a count of what was dropped and why."""

import hashlib
import os
import random
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from ..core import console
from ..core.errors import DataError, UsageError, did_you_mean
from ..core.files import cannot_write, lock, sha256_file, staged, sync, write_json
from . import layouts
from .drops import Drops, RowProblem
from .rows import COLUMNS, SCHEMA_VERSION, RawRow, make_row
from .sources import Source, find_source, open_source
from .tables import Table

SUMMARY = "data.json"
GROUP_BYTES, GROUP_ROWS = 16 * 2**20, 100  # held in memory, then written as one row group
SHARD_BYTES = 256 * 2**20
THREADS = min(4, os.cpu_count() or 1)


def prepare(
    source: str,
    out: Path,
    *,
    input: str | None = None,
    images: Path | Sequence[Path] | None = (),
    columns: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> dict:
    """Turn a source into a folder of parquet shards with a `data.json`, whose content it returns.

    The same input, limit and seed give the same files, byte for byte, with the same versions of the libraries.

    Args:
        input: a local file or folder in the source's layout; None takes the hub.
        images: folder or folders that image paths are looked for in; by default that of the file that names them.
            None: images must be there as bytes.
        columns: `problem=question,image=img`: the input's columns where r1v does not know their names.
        limit: rows a split at most: a random subset chosen by `seed`, in which another record takes the place of a
            dropped one. For `shapes`, how many are drawn.

    Raises UsageError: unknown source, impossible arguments, an output folder that is in use, a full disk.
    DataError: unreadable input, or not one row left.
    """
    out = Path(os.path.abspath(out))
    roots = [Path(images)] if isinstance(images, str | Path) else images
    found = find_source(source)
    if limit is not None and limit < 1:
        raise UsageError(f"limit must be at least 1, found {limit}")
    names = layouts.parse_columns(columns) if columns else None
    if names:
        found = replace(found, convert=layouts.named(names))
    check_out(out, [*([Path(input)] if input is not None else []), *(roots or ())], overwrite)
    tables = open_source(found, input=input, images=roots, split=split, limit=limit, seed=seed)
    if names:
        _check_columns(names, tables)
    drops = Drops()
    readers = {name: Reader(found, name, tables[name], limit, seed, drops) for name in sorted(tables)}
    try:
        with lock(out, "data folder"), staged(out) as temporary:
            check_out(out, [], overwrite)
            splits = {name: _write_split(temporary, name, reader) for name, reader in readers.items()}
            if not any(s["rows"] for s in splits.values()):
                raise _nothing_left(found, tables, drops, names)
            summary = {"schema_version": SCHEMA_VERSION, "source": found.name, "columns": names}
            summary |= {"limit": limit, "seed": seed} | _counted(readers, drops, splits)
            write_json(temporary / SUMMARY, summary)
            for path in temporary.iterdir():
                sync(path)
    except OSError as e:
        raise cannot_write(out, e) from None
    return summary


def _counted(readers: "dict[str, Reader]", drops: Drops, splits: dict[str, dict]) -> dict[str, Any]:
    """What data.json says of what was read, dropped and written."""
    read_as: Counter[str] = sum((reader.layouts for reader in readers.values()), Counter())
    return {
        "layout": ", ".join(name for name, _ in read_as.most_common()),
        "read": sum(reader.read for reader in readers.values()),
        "rows": sum(s["rows"] for s in splits.values()),
        "dropped": dict(sorted(drops.counts.items())),
        "dropped_places": dict(sorted(drops.places.items())),
        "splits": splits,
        "sha256": digest([f for s in splits.values() for f in s["files"]]),
        "versions": {name: version(name) for name in ("pillow", "pyarrow")},
    }


def _check_columns(names: dict[str, str], tables: dict[str, list[Table]]) -> None:
    """A column that none of the first records has is a mistyped one."""
    for table in (table for found in tables.values() for table in found):
        first = [record for _, record in islice(table.read(None), 100) if isinstance(record, dict)]
        for column in names.values() if first else ():
            if all(layouts.column_of(record, column) is None for record in first):
                has = f"--columns: {table.name} has no column {column}; it has {', '.join(first[0])}"
                raise UsageError(has, hint=did_you_mean(column, first[0]))


def digest(files: Iterable[dict]) -> str:
    """One sha256 (hex) for several files, from their names and sha256: what `sha256sum *.parquet | sha256sum` says."""
    lines = [f"{f['sha256']}  {f['name']}\n" for f in sorted(files, key=lambda f: f["name"])]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _nothing_left(source: Source, tables: dict[str, list[Table]], drops: Drops, named: Any) -> DataError:
    names = ", ".join(t.name for ts in tables.values() for t in ts)
    if not drops.total:
        return DataError(f"no records in {names}")
    first = next((r for ts in tables.values() for t in ts for _, r in t.read([0]) if isinstance(r, dict)), None)
    details = drops.lines() + ([f"columns of the first record: {', '.join(map(str, first))}"] if first else [])
    own, hint = first and source.hub is None, None
    unknown = own and not named and not layouts.is_record(first or {})
    details += [f"accepted: {layout}" for layout in layouts.ACCEPTED] if unknown else []
    if unknown or (own and drops.counts["no image"] + drops.counts["question missing"]):
        hint = "--columns problem=COLUMN,image=COLUMN,solution=COLUMN says which is which"
    elif drops.counts["missing image"] + drops.counts["image path leaves the root"]:
        hint = "--images names the folder that image paths are relative to; it may be given several times"
    what = f"source {source.name}: none of {drops.total} records can be used ({names})"
    return DataError(what, details=details, hint=hint)


class Reader:
    """The checked rows of one split: iterate once. What fails is added to `drops`."""

    def __init__(self, source: Source, split: str, tables: list[Table], limit: int | None, seed: int, drops: Drops):
        self.source, self.split, self.tables, self.limit, self.drops = source, split, tables, limit, drops
        self.total = sum(table.rows for table in tables)
        self.random = random.Random(f"prepare/{seed}")
        self.read = 0
        self.layouts: Counter[str] = Counter()

    def __iter__(self) -> Iterator[dict]:
        ids: set[str] = set()
        goal = self.total if self.limit is None else min(self.limit, self.total)
        with console.progress(f"reading {self.source.name}", goal) as bar:
            for positions in self._passes(goal, lambda: len(ids)):
                for place, raw, row in self._checked(positions):
                    self.read += 1
                    if isinstance(row, RowProblem):
                        self.drops.add(row.reason, f"{place} ({row.detail})" if row.detail else place)
                    elif row["id"] in ids:
                        self.drops.add("duplicate id", place)
                    else:
                        ids.add(row["id"])
                        self.layouts[raw.layout if self.source.hub is None else self.source.name] += 1
                        for reason in raw.left_out:
                            self.drops.add(reason, place)
                        yield row
                        if self.limit is not None and len(ids) == self.limit:
                            return
                    bar.advance(1, f"{self.drops.total} dropped" if self.drops.total else "")

    def _passes(self, goal: int, kept: Callable[[], int]) -> Iterator[list[int] | None]:
        """Which positions to read in each pass over the tables; later passes replace what was dropped."""
        if goal == self.total:
            yield None
            return
        order = self.random.sample(range(self.total), self.total)
        start, size = 0, goal
        while start < self.total and kept() < goal:
            yield sorted(order[start : start + size])
            # Doubling: data where nearly all fails must not take one pass a row.
            start, size = start + size, max(2 * size, goal - kept())

    def _checked(self, positions: list[int] | None) -> Iterator[tuple[str, RawRow, dict | RowProblem]]:
        """(place, record, row or problem) in order; a few are decoded at once, and no more are held."""
        waiting: deque[tuple[str, Future]] = deque()
        with ThreadPoolExecutor(THREADS) as pool:
            try:
                for table, number, position, record in self._records(positions):
                    place = f"{table.name}:{position + 1}"
                    waiting.append((place, pool.submit(self._check, table, number, record)))
                    if len(waiting) > 2 * THREADS:
                        yield waiting[0][0], *waiting.popleft()[1].result()
                while waiting:
                    yield waiting[0][0], *waiting.popleft()[1].result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _records(self, positions: list[int] | None) -> Iterator[tuple[Table, int, int, dict | RowProblem]]:
        """(table, number in all of them, position in it, record)"""
        start = 0
        for table in self.tables:
            here = None if positions is None else [p - start for p in positions if 0 <= p - start < table.rows]
            for position, record in table.read(here) if here != [] else ():
                yield table, start + position, position, record
            start += table.rows

    def _check(self, table: Table, number: int, record: dict | RowProblem) -> tuple[RawRow, dict | RowProblem]:
        raw = RawRow()
        try:
            if isinstance(record, RowProblem):
                raise record
            if self.source.hub is None and layouts.is_train(record) not in (None, self.split == "train"):
                raise RowProblem("record of another split")
            raw, name = self.source.convert(record), self.source.name
            fallback, text_only = f"{name}-{number:07d}", self.source.text_only
            return raw, make_row(raw, source=name, fallback_id=fallback, roots=table.roots, text_only=text_only)
        except RowProblem as problem:
            return raw, problem


def arrow_schema():
    """The parquet schema of rows, with the `datasets` features in its metadata so that images load as images."""
    from datasets import Features, Image, List, Value

    return Features({name: List(Image()) if name == "images" else Value("string") for name in COLUMNS}).arrow_schema


def _groups(rows: Iterable[dict]) -> Iterator[list[dict]]:
    """Rows as they are written, a row group at a time: no more are held in memory."""
    group: list[dict] = []
    size = 0
    for row in rows:
        size += sum(len(image) for image in row["images"])
        group.append(row | {"images": [{"bytes": image, "path": None} for image in row["images"]]})
        if len(group) == GROUP_ROWS or size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _write_split(folder: Path, split: str, rows: Iterable[dict]) -> dict:
    """Write `SPLIT-00000.parquet`, ..."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = arrow_schema()
    files: list[dict] = []
    counts = {"rows": 0, "solution": 0, "thinking": 0}
    writer: pq.ParquetWriter | None = None
    with warnings.catch_warnings(), ExitStack() as opened:
        warnings.simplefilter("ignore")  # Pillow's, about files that are dropped and counted here
        for group in _groups(rows):
            if writer is None:
                path = folder / f"{split}-{len(files):05d}.parquet"
                files.append({"name": path.name, "rows": 0})
                # Images are compressed already, and no two are alike.
                writer = pq.ParquetWriter(path, schema, use_dictionary=["source"], compression="snappy")
                opened.callback(writer.close)
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
            files[-1]["rows"] += len(group)
            counts["rows"] += len(group)
            for name in ("solution", "thinking"):
                counts[name] += sum(row[name] is not None for row in group)
            if path.stat().st_size >= SHARD_BYTES:
                opened.close()
                writer = None
    for file in files:
        file |= {"bytes": (folder / file["name"]).stat().st_size, "sha256": sha256_file(folder / file["name"])}
    return counts | {"sha256": digest(files), "files": files}


def check_out(out: Path, inputs: list[Path], overwrite: bool) -> None:
    """Raises UsageError: a folder that holds something, or with `overwrite` something else than prepared data."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file, not a folder", hint="choose another --out")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not overwrite:
        raise UsageError(f"{out} is not empty", hint="--overwrite replaces prepared data, --out names another folder")
    if not (out / SUMMARY).is_file():
        raise UsageError(f"{out} holds something else than prepared data: not replaced", hint="choose another --out")
    if any(path.resolve().is_relative_to(out.resolve()) for path in inputs):
        raise UsageError(f"{out} holds the input: not replaced", hint="choose another --out")
