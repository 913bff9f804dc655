"""prepare-data: any source to parquet shards of rows, whole or not at all, with a count of what was dropped and why."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from ..core import console
from ..core.errors import DataError, UsageError
from ..core.files import lock, sha256_file, write_json
from . import layouts
from .rows import SCHEMA_VERSION, Drops, RawRow, RowProblem, make_row
from .sources import Source, Table, find_source, open_source

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
    """Turn a source into a folder of parquet shards with a `data.json`.

    Records are checked one by one (`rows.make_row`); what fails is counted by reason. Rows keep the source's order.
    The same input, limit and seed give the same files, byte for byte, with the same versions of the libraries.

    Args:
        source: a name in `sources.SOURCES`.
        out: the folder to make; it appears only when it is complete.
        input: a local file or folder in the source's layout; None takes the hub.
        images: folder or folders that image paths are looked for in, and that absolute paths and links may lead to;
            by default the folder of the file that names them. None: images must be there as bytes.
        columns: `problem=question,image=img`: the input's columns where r1v does not know their names.
        split: prepare only this split.
        limit: rows a split at most: a random subset chosen by `seed`; a chosen record that is dropped is replaced by
            another, so that `limit` rows result where there are that many. For `shapes`, how many are drawn.
        seed: of the choice (nothing else depends on it without `limit`), and of what `shapes` draws.
        overwrite: replace a folder of prepared data.

    Returns:
        The summary, which is also in `data.json`: `schema_version`, `source`, `layout` (as what the records were
        read), `columns`, `limit`, `seed`, `read`, `rows`, `dropped` {reason: n}, `dropped_places` {reason: the first
        few}, `splits` {name: {rows, sha256, solution and thinking (how many rows have one), files: [{name, rows,
        bytes, sha256}]}}, `sha256`, `versions`.

    Raises:
        UsageError: unknown source, impossible arguments, an output folder that is in use, a full disk.
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
    try:
        _check_out(out, [*([Path(input)] if input is not None else []), *(roots or ())], overwrite)
    except OSError as e:
        raise UsageError(f"cannot use {out}: {e.strerror}") from None
    tables = open_source(found, input=input, images=roots, split=split, limit=limit, seed=seed)
    if names:
        _check_columns(names, tables)
    drops = Drops()
    summary: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "source": found.name, "layout": "", "columns": names}
    summary |= {"limit": limit, "seed": seed, "rows": 0, "read": 0}
    readers = {name: Reader(found, tables[name], limit, seed, drops) for name in sorted(tables)}
    try:
        with lock(out, "data folder"), _work_dir(out) as temporary:
            _check_out(out, [], overwrite)
            splits = {name: _write_split(temporary, name, reader) for name, reader in readers.items()}
            summary["rows"] = sum(s["rows"] for s in splits.values())
            summary["read"] = sum(reader.read for reader in readers.values())
            if not summary["rows"]:
                raise _nothing_left(found, tables, drops)
            read_as: Counter[str] = sum((reader.layouts for reader in readers.values()), Counter())
            summary["layout"] = ", ".join(name for name, _ in read_as.most_common())
            summary["dropped"] = dict(sorted(drops.counts.items()))
            summary["dropped_places"] = dict(sorted(drops.places.items()))
            summary["splits"] = splits
            summary["sha256"] = digest([f for s in splits.values() for f in s["files"]])
            summary["versions"] = _versions()
            write_json(temporary / SUMMARY, summary)
            _publish(temporary, out)
    except OSError as e:
        raise UsageError(f"cannot write {out}: {e.strerror or e}") from None
    return summary


def _check_columns(names: dict[str, str], tables: dict[str, list[Table]]) -> None:
    """A column that none of the first records has is a mistyped one."""
    for table in (table for found in tables.values() for table in found):
        first = [record for _, record in islice(table.read(None), 100) if isinstance(record, dict)]
        for column in names.values() if first else ():
            if all(layouts.column_of(record, column) is None for record in first):
                raise UsageError(f"--columns: {table.name} has no column {column}; it has {', '.join(first[0])}")


def digest(files: Iterable[dict]) -> str:
    """One sha256 (hex) for several files, from their names and sha256: what `sha256sum *.parquet | sha256sum` says."""
    lines = [f"{f['sha256']}  {f['name']}\n" for f in sorted(files, key=lambda f: f["name"])]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _nothing_left(source: Source, tables: dict[str, list[Table]], drops: Drops) -> DataError:
    names = ", ".join(t.name for ts in tables.values() for t in ts)
    if not drops.total:
        return DataError(f"no records in {names}")
    first = next((r for ts in tables.values() for t in ts for _, r in t.read([0]) if isinstance(r, dict)), None)
    columns = [f"columns of the first record: {', '.join(map(str, first))}"] if first else []
    hint = None
    if first and source.hub is None and not layouts.is_record(first):
        columns += [f"accepted: {layout}" for layout in layouts.ACCEPTED]
        hint = "--columns problem=COLUMN,image=COLUMN,solution=COLUMN says which is which"
    elif drops.counts["missing image"] + drops.counts["image path leaves the root"]:
        hint = "--images names the folder that image paths are relative to; it may be given several times"
    return DataError(
        f"source {source.name}: none of {drops.total} records can be used ({names})",
        details=drops.lines() + columns,
        hint=hint,
    )


def _versions() -> dict[str, str]:
    import PIL
    import pyarrow

    return {"pillow": PIL.__version__, "pyarrow": pyarrow.__version__}


# --- reading and checking --------------------------------------------------------------------------------------


class Reader:
    """The checked rows of one split: iterate once. What fails is added to `drops`."""

    def __init__(self, source: Source, tables: list[Table], limit: int | None, seed: int, drops: Drops):
        self.source, self.tables, self.limit, self.drops = source, tables, limit, drops
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
                for _, future in waiting:
                    future.cancel()

    def _records(self, positions: list[int] | None) -> Iterator[tuple[Table, int, int, dict | RowProblem]]:
        start = 0
        for table in self.tables:
            end = start + table.rows
            here = None if positions is None else [p - start for p in positions if start <= p < end]
            if here is None or here:
                for position, record in table.read(here):
                    yield table, start + position, position, record
            start = end

    def _check(self, table: Table, number: int, record: dict | RowProblem) -> tuple[RawRow, dict | RowProblem]:
        raw = RawRow()
        try:
            if isinstance(record, RowProblem):
                raise record
            raw = self.source.convert(record)
            name = self.source.name
            return raw, make_row(
                raw,
                source=name,
                fallback_id=f"{name}-{number:07d}",
                roots=table.roots,
                text_only=self.source.text_only,
            )
        except RowProblem as problem:
            return raw, problem


# --- writing ---------------------------------------------------------------------------------------------------


def arrow_schema():
    """The parquet schema of rows, with the `datasets` features in its metadata so that images load as images."""
    import json

    import pyarrow as pa

    texts = ("problem", "solution", "thinking", "source")
    features: dict[str, Any] = {"id": {"dtype": "string", "_type": "Value"}}
    features["images"] = {"feature": {"_type": "Image"}, "_type": "List"}
    features |= {name: {"dtype": "string", "_type": "Value"} for name in texts}
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.schema(
        [("id", pa.string()), ("images", pa.list_(image)), *[(name, pa.string()) for name in texts]],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )


def _write_split(folder: Path, split: str, rows: Iterable[dict]) -> dict:
    """Write `SPLIT-00000.parquet`, ...; at most one row group is held in memory."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = arrow_schema()
    files: list[dict] = []
    counts = {"rows": 0, "solution": 0, "thinking": 0}
    group: list[dict] = []
    group_bytes = 0
    writer: pq.ParquetWriter | None = None

    def write_group() -> None:
        nonlocal writer, group_bytes
        if writer is None:
            files.append({"name": f"{split}-{len(files):05d}.parquet", "rows": 0})
            # Images are compressed already, and no two are alike.
            writer = pq.ParquetWriter(
                folder / files[-1]["name"], schema, use_dictionary=["source"], compression="snappy"
            )
        writer.write_table(pa.Table.from_pylist(group, schema=schema))
        files[-1]["rows"] += len(group)
        group.clear()
        group_bytes = 0
        if (folder / files[-1]["name"]).stat().st_size >= SHARD_BYTES:
            close()

    def close() -> None:
        nonlocal writer
        if writer is not None:
            writer.close()
            path = folder / files[-1]["name"]
            files[-1] |= {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
            writer = None

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about files that are dropped and counted here
            for row in rows:
                counts["rows"] += 1
                for name in ("solution", "thinking"):
                    counts[name] += row[name] is not None
                group_bytes += sum(len(image) for image in row["images"])
                group.append(row | {"images": [{"bytes": image, "path": None} for image in row["images"]]})
                if len(group) == GROUP_ROWS or group_bytes >= GROUP_BYTES:
                    write_group()
        if group:
            write_group()
    finally:
        close()
    return counts | {"sha256": digest(files), "files": files}


# --- whole or not at all ---------------------------------------------------------------------------------------


def _check_out(out: Path, inputs: list[Path], overwrite: bool) -> None:
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


@contextmanager
def _work_dir(out: Path) -> Iterator[Path]:
    """A folder beside `out`, gone at the end. Under `out`'s lock, what a killed run left of one is nobody's."""
    path = out.with_name(f".{out.name}.preparing")
    for left in (path, _old(out)):
        if left.exists():
            console.log(f"removing {left.name}, left by a run that was killed")
            shutil.rmtree(left, ignore_errors=True)
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _old(out: Path) -> Path:
    return out.with_name(f".{out.name}.preparing-old")


def _publish(temporary: Path, out: Path) -> None:
    """Move what is complete to its place; what was there goes aside, then away."""
    for path in temporary.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    if out.exists() and any(out.iterdir()):
        out.rename(_old(out))
    temporary.rename(out)
    shutil.rmtree(_old(out), ignore_errors=True)
