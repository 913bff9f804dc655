"""Local copies: parquet files, `save_to_disk` folders, JSON arrays, JSON lines and image folders as tables.

Reading is streaming and repeatable; a record that cannot be decoded is a `RowProblem` of its own, so that one bad
line does not cost the others.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..core.errors import DataError, UsageError
from .rows import RowProblem
from .sources import Table

MAX_LINE = 64 * 2**20  # bytes; a longer line is counted as a drop, not read
BATCH = 16  # records decoded together
_SHARD = re.compile(r"(?P<split>\w+?)-\d{5}(?:-of-\d{5})?")
_SPLIT_NAMES = {"train", "test", "validation", "val", "dev", "image", "non_image", "sft", "judge"}
_NOT_ROWS = {"data.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


def split_of(path: Path) -> str:
    """The split that a file name says: `test-00000-of-00002.parquet`, `test.jsonl`, `test/metadata.jsonl`."""
    match = _SHARD.fullmatch(path.stem)
    if match:
        return match["split"]
    return next((name for name in (path.stem, path.parent.name) if name in _SPLIT_NAMES), "train")


def open_local(path: Path, images: Path | None) -> list[tuple[str, Table]]:
    """Find the tables of a file or folder: (split, table), sorted by file name.

    `images` is where image paths start; by default the folder of the file that names them.

    Raises:
        UsageError: a kind of file that is not read. DataError: nothing in it, or unreadable.
    """
    if path.is_dir() and any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _saved(path, images)
    files = _data_files(path) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path} has no parquet, JSON or JSON lines files", hint="unpack archives first")
    found: list[tuple[str, Table]] = []
    for file in files:
        root = images or file.parent
        name = str(file.relative_to(path)) if path.is_dir() else file.name
        if file.suffix == ".parquet":
            table = parquet_table(file, name, root)
        elif file.suffix == ".csv":
            table = _csv_table(file, name, root)
        elif file.suffix in (".json", ".jsonl", ".ndjson"):
            table = _json_table(file, name, root)
        else:
            raise UsageError(f"cannot read {file}: want .parquet, .jsonl, .json or a folder of these")
        found.append((split_of(file), table))
    return found


def _data_files(folder: Path) -> list[Path]:
    for pattern in ("*.parquet", "*.jsonl", "metadata.csv", "*.json"):
        files = [
            file
            for file in sorted(folder.rglob(pattern))
            if file.is_file()
            and file.name not in _NOT_ROWS
            and not any(part.startswith(".") for part in file.relative_to(folder).parts)
        ]
        if files:
            return files
    return []


# --- tables ----------------------------------------------------------------------------------------------------


def parquet_table(path: Path, name: str, root: Path | None) -> Table:
    """One parquet file, read a few records at a time.

    Raises:
        DataError: not parquet, here or while it is read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    def open_file() -> pq.ParquetFile:
        # Buffered: a column chunk of images can be larger than what may be held at once.
        return pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False)

    def read(positions: list[int] | None) -> Iterator[tuple[int, dict | RowProblem]]:
        wanted = None if positions is None else set(positions)
        try:
            with open_file() as file:
                start = 0
                for batch in file.iter_batches(batch_size=BATCH):
                    here = [i for i in range(batch.num_rows) if wanted is None or start + i in wanted]
                    if here:
                        records = _records(batch)
                        yield from ((start + i, records[i]) for i in here)
                    start += batch.num_rows
        except (pa.ArrowException, OSError) as e:
            raise DataError(f"cannot read {path}: {_first_line(e)}") from None

    try:
        with open_file() as file:
            rows = file.metadata.num_rows
    except (pa.ArrowException, OSError) as e:
        raise DataError(f"cannot read {path}: {_first_line(e)}") from None
    return Table(name, rows, root, read)


def dataset_table(dataset: Any, name: str, root: Path | None) -> Table:
    """A `datasets.Dataset`, read as stored: images are not decoded."""

    import pyarrow as pa

    def read(positions: list[int] | None) -> Iterator[tuple[int, dict | RowProblem]]:
        chosen = dataset if positions is None else dataset.select(positions)
        at = iter(range(len(dataset)) if positions is None else positions)
        try:
            for table in chosen.with_format("arrow").iter(batch_size=BATCH):
                yield from zip(at, _records(table))
        except (pa.ArrowException, OSError) as e:
            raise DataError(f"cannot read {name}: {_first_line(e)}") from None

    return Table(name, len(dataset), root, read)


def _records(batch: Any) -> list[dict | RowProblem]:
    """A record batch or table as dicts; a record that cannot be decoded alone becomes a `RowProblem`."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):  # bytes that are no UTF-8, dates out of range
        found: list[dict | RowProblem] = []
        for i in range(batch.num_rows):
            try:
                found += batch.slice(i, 1).to_pylist()
            except (ValueError, OverflowError):
                found.append(RowProblem("record cannot be decoded"))
        return found


def _saved(path: Path, images: Path | None) -> list[tuple[str, Table]]:
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except Exception as e:  # its readers raise anything on a damaged folder
        raise DataError(f"cannot read {path}, saved by datasets: {_first_line(e)}") from None
    splits = found if isinstance(found, datasets.DatasetDict) else {"train": found}
    return [(name, dataset_table(dataset, f"{path.name}/{name}", images or path)) for name, dataset in splits.items()]


def _json_table(path: Path, name: str, root: Path) -> Table:
    """JSON lines, or one JSON array, told apart by the first character."""
    try:
        with open(path, "rb") as file:
            is_array = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
    except OSError as e:
        raise DataError(f"cannot read {path}: {e.strerror}") from None
    return _array_table(path, name, root) if is_array else _lines_table(path, name, root)


def _lines_table(path: Path, name: str, root: Path) -> Table:
    def read(positions: list[int] | None) -> Iterator[tuple[int, dict | RowProblem]]:
        wanted = None if positions is None else set(positions)
        for position, line in enumerate(_lines(path)):
            if (wanted is None or position in wanted) and line.strip():
                yield position, _parse(line)

    return Table(name, sum(1 for _ in _lines(path)), root, read)


def _lines(path: Path) -> Iterator[bytes]:
    """Lines with their end; one above `MAX_LINE` comes as what JSON never is."""
    try:
        with open(path, "rb") as file:
            while line := file.readline(MAX_LINE):
                whole = line.endswith(b"\n") or len(line) < MAX_LINE
                while not whole:
                    rest = file.readline(MAX_LINE)
                    whole = rest.endswith(b"\n") or len(rest) < MAX_LINE
                    line = b"too long"
                yield line
    except OSError as e:
        raise DataError(f"cannot read {path}: {e.strerror}") from None


def _parse(line: bytes) -> dict | RowProblem:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return RowProblem("line is not JSON")
    return record if isinstance(record, dict) else RowProblem("record is not an object")


def _array_table(path: Path, name: str, root: Path) -> Table:
    try:
        records = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise DataError(f"cannot read {path}: not JSON: {_first_line(e)}") from None

    def read(positions: list[int] | None) -> Iterator[tuple[int, dict | RowProblem]]:
        for position in range(len(records)) if positions is None else positions:
            record = records[position]
            yield position, record if isinstance(record, dict) else RowProblem("record is not an object")

    return Table(name, len(records), root, read)


def _csv_table(path: Path, name: str, root: Path) -> Table:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            records = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as e:
        raise DataError(f"cannot read {path}: {_first_line(e)}") from None

    def read(positions: list[int] | None) -> Iterator[tuple[int, dict | RowProblem]]:
        for position in range(len(records)) if positions is None else positions:
            yield position, records[position]

    return Table(name, len(records), root, read)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
