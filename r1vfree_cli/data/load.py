"""Rows for the stages: a recipe's `data.path` becomes a folder of rows, and that a `datasets.Dataset`.

`path` is a folder written by prepare-data, a parquet file or a folder of parquet files with the row's columns, the
repository of a known source on the hub, or `shapes`, also as `shapes?seed=1&n=512`. The last two are prepared once,
into the cache.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from ..core.errors import DataError, UsageError, nearest
from ..core.files import cache_dir, read_json, sha256_file, write_json
from . import sources
from .prepare import SUMMARY, Reader, digest, prepare
from .rows import COLUMNS, REQUIRED_COLUMNS, SCHEMA_VERSION, Drops
from .tables import parquet_table, split_of

if TYPE_CHECKING:
    import datasets


def ensure_rows(path: str, split: str = "train") -> Path:
    """The folder or parquet file that holds the rows of `path`, prepared first where it must be.

    Several processes may call it at once: one prepares, the others wait for it.

    Raises:
        UsageError: there is no such data, or no such split of a source.
        DataError: the folder or file does not hold rows, is damaged, or lacks the split.
    """
    cached = _cached(path, split)
    if cached is not None:
        name, arguments = cached
        out = cache_dir("data", name)
        with _locked(cache_dir("data", f"{name}.lock")):
            if not _intact(out, split):
                prepare(out=out, overwrite=True, **arguments)
        return out
    here = Path(path if "\0" in path else os.path.expanduser(path))
    if not os.path.exists(here):
        raise UsageError(f"no such data: {path}", hint=_hint(path))
    _files(here, split)
    return here


def find_rows(path: str, split: str = "train") -> Path | None:
    """Where `ensure_rows` has the rows or would take them from; None when they are not there yet. Prepares nothing."""
    cached = _cached(path, split)
    here = cache_dir("data", cached[0]) if cached else Path(os.path.expanduser(path))
    return here if os.path.exists(here) else None


def load_rows(path: str, split: str = "train", limit: int | None = None) -> datasets.Dataset:
    """The rows of a split, the first `limit` of them.

    Returns:
        A memory-mapped dataset with exactly the columns id, images (a list of images, decoded to PIL when a row is
        fetched), problem, solution, thinking, source; solution and thinking may be None.

    Raises:
        UsageError, DataError: as `ensure_rows`; or the columns have other types than a row's.
    """
    import datasets
    import pyarrow as pa

    here = ensure_rows(path, split)
    files = [str(file) for file in _files(here, split)]
    text = datasets.Value("string")
    features = {name: text for name in COLUMNS} | {"images": datasets.List(datasets.Image())}
    try:
        with _no_bars():
            rows = datasets.Dataset.from_parquet(files, cache_dir=str(cache_dir("datasets")))
            _check_images(rows.data.column("images"), path)
            _check_content(here, split)
            for name in set(COLUMNS) - set(rows.column_names):
                rows = rows.add_column(name, [None] * len(rows), feature=text)
            if limit is not None:
                rows = rows.select(range(min(limit, len(rows))))
            rows = rows.select_columns(list(COLUMNS))
            wanted = datasets.Features({name: features[name] for name in COLUMNS})
            return rows if rows.features == wanted else rows.cast(wanted)
    except (pa.ArrowException, TypeError, ValueError, datasets.exceptions.DatasetsError) as e:
        reason = next(iter(str(e.__cause__ or e).splitlines()), type(e).__name__)
        raise DataError(
            f"cannot read the rows of {path}: {reason}", hint="r1v prepare-data parquet makes rows of it"
        ) from None


def _check_images(column: Any, path: str) -> None:
    """Refuse images that are no bytes: decoding those would open any path, or fetch a URL."""
    import pyarrow as pa
    import pyarrow.compute as pc

    def all_bytes(chunk: Any) -> bool:
        items = pc.list_flatten(chunk)
        if pa.types.is_struct(items.type) and items.type.get_field_index("bytes") >= 0:
            items = pc.struct_field(items, "bytes")
        return items.null_count == 0 and (pa.types.is_binary(items.type) or pa.types.is_large_binary(items.type))

    is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    if not is_list or not all(all_bytes(chunk) for chunk in column.chunks):
        raise DataError(
            f"{path}: the column images must hold lists of image bytes, found {column.type}",
            hint="r1v prepare-data parquet makes rows of it",
        )


def _check_content(path: Path, split: str) -> None:
    """Read all rows once, before training and not during it: a damaged image would end a run hours later.

    Prepared data has the sha256 it was written with; every row of other files is checked as prepare-data would.
    Files that passed are remembered by name, size and time.
    """
    files = _files(path, split)
    stats = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    key = hashlib.sha256(json.dumps([SCHEMA_VERSION, stats]).encode()).hexdigest()
    passed = cache_dir("checked", f"{key}.json")
    if passed.exists():
        return
    if (path / SUMMARY).is_file():
        recorded = {f["name"]: f.get("sha256") for f in _summary(path)["splits"][split]["files"]}
        for file in files:
            if sha256_file(file) != recorded[file.name]:
                raise DataError(f"{file} was changed since it was prepared", hint="prepare the data again")
    else:
        tables = [parquet_table(file, file.name, None) for file in files]
        drops = Drops()
        total = sum(1 for _ in Reader(sources.SOURCES["parquet"], tables, None, 0, drops)) + drops.total
        if drops.total:
            raise DataError(
                f"{path}: {drops.total} of {total} rows cannot be used",
                details=drops.lines(),
                hint="r1v prepare-data parquet --input leaves them out",
            )
    write_json(passed, stats)


@contextmanager
def _no_bars() -> Iterator[None]:
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def data_sha256(path: str, split: str = "train") -> str:
    """sha256 (hex) of a split's files; for prepared data as recorded when it was written."""
    here = ensure_rows(path, split)
    if (here / SUMMARY).is_file():
        return _summary(here)["splits"][split]["sha256"]
    return digest([{"name": file.name, "sha256": sha256_file(file)} for file in _files(here, split)])


def columns(path: str, split: str = "train") -> list[str]:
    """The row's columns that hold something, without preparing or downloading: None in every row does not count.

    For a known source they are what the source is known to have.

    Raises:
        UsageError, DataError: as `ensure_rows`.
    """
    source = _source_of(path)
    if source is not None:
        _cached(path, split)
        return list(source.columns)
    files = _files(ensure_rows(path, split), split)
    return [name for name in COLUMNS if any(_holds(file, name) for file in files)]


# --- sources in the cache --------------------------------------------------------------------------------------


def _source_of(path: str) -> sources.Source | None:
    name = path.partition("?")[0]
    return sources.SOURCES["shapes"] if name == "shapes" else sources.BY_HUB.get(name)


def _cached(path: str, split: str) -> tuple[str, dict[str, Any]] | None:
    """(folder name in the cache, arguments for `prepare`) of a known source; None for everything else."""
    source = _source_of(path)
    if source is None:
        return None
    query = path.partition("?")[2]
    arguments: dict[str, Any] = {"source": source.name, "split": split}
    key = [SCHEMA_VERSION, arguments]
    if source.name == "shapes":
        from . import shapes

        if split not in shapes.SPLITS:
            raise UsageError(f"shapes has no split {split!r}; it has {', '.join(shapes.SPLITS)}")
        arguments |= _shapes_query(path, query)
        # Other drawing code draws other data.
        key.append(sha256_file(Path(shapes.__file__)))
    elif query:
        raise UsageError(f"data path {path}: only shapes takes ?seed=...&n=...")
    fingerprint = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return f"{source.name}-{split}-{fingerprint}", arguments


def _shapes_query(path: str, query: str) -> dict[str, int]:
    values = {"seed": 0}
    try:
        for key, found in parse_qs(query, keep_blank_values=True, strict_parsing=bool(query)).items():
            values[{"seed": "seed", "n": "limit"}[key]] = int(found[-1])
    except (KeyError, ValueError):
        raise UsageError(f"data path {path}: want shapes?seed=INT&n=INT") from None
    return values


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file; a process that dies lets go of it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as e:
        raise UsageError(f"cannot write to the cache {path.parent}: {e.strerror}", hint="set R1V_CACHE") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _hint(path: str) -> str:
    known = [*sources.BY_HUB, "shapes"]
    if path in sources.SOURCES and sources.SOURCES[path].hub:
        return f"as a data path this source is called {sources.SOURCES[path].hub}"
    near = nearest(path, known)
    return f"did you mean {near}?" if near else "prepare it with r1v prepare-data, or use one of " + ", ".join(known)


def _intact(folder: Path, split: str) -> bool:
    try:
        return bool(_files(folder, split))
    except DataError:
        return False


# --- folders and files -----------------------------------------------------------------------------------------


def _summary(folder: Path) -> dict:
    """`data.json`, checked as far as it is used here."""
    document = read_json(folder / SUMMARY)
    if not isinstance(document, dict) or not isinstance(document.get("splits"), dict):
        raise DataError(f"{folder / SUMMARY} is not a summary written by prepare-data")
    if document.get("schema_version") != SCHEMA_VERSION:
        raise DataError(
            f"{folder} has rows of schema {document.get('schema_version')!r}, this version reads {SCHEMA_VERSION}",
            hint="prepare the data again",
        )
    return document


def _files(path: Path, split: str) -> list[Path]:
    """The parquet files of a split, in order, with footers read and columns checked."""
    try:
        if path.is_file():
            files = [path]
        elif (path / SUMMARY).is_file():
            files = _prepared_files(path, split)
        else:
            files = _bare_files(path, split)
        rows = sum(_check_file(file) for file in files)
    except OSError as e:
        raise DataError(f"cannot read {path}: {e.strerror or e}") from None
    if not rows:
        raise DataError(f"{path} has no rows in split {split!r}")
    return files


def _bare_files(folder: Path, split: str) -> list[Path]:
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise DataError(
            f"{folder} holds no rows: neither {SUMMARY} nor parquet files", hint="make it with r1v prepare-data"
        )
    found = [file for file in files if split_of(file) == split]
    if not found:
        names = sorted({split_of(file) for file in files})
        raise DataError(f"{folder} has no split {split!r}; it has {', '.join(names)}")
    return found


def _prepared_files(folder: Path, split: str) -> list[Path]:
    splits = _summary(folder)["splits"]
    if split not in splits:
        raise DataError(f"{folder} has no split {split!r}; it has {', '.join(splits)}")
    try:
        entries = [(str(f["name"]), int(f["bytes"])) for f in splits[split]["files"]]
        str(splits[split]["sha256"])
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{folder / SUMMARY} is not a summary written by prepare-data") from None
    for name, size in entries:
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise DataError(f"{folder} is not complete: {name} is missing", hint="prepare the data again")
        if path.stat().st_size != size:
            raise DataError(f"{path} was changed since it was prepared", hint="prepare the data again")
    return [folder / name for name, _ in entries]


def _check_file(path: Path) -> int:
    """How many rows the file has, once its columns are those of rows."""
    metadata = _footer(path)
    names = [field.name for field in metadata.schema.to_arrow_schema()]
    missing = [name for name in REQUIRED_COLUMNS if name not in names]
    if missing:
        raise DataError(
            f"{path} has no column {', '.join(missing)}; it has {', '.join(names)}",
            hint="r1v prepare-data parquet makes rows of it",
        )
    return metadata.num_rows


def _footer(path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path)
        metadata.schema.to_arrow_schema()
        return metadata
    except (pa.ArrowException, OSError) as e:
        raise DataError(f"cannot read {path}: {next(iter(str(e).splitlines()), type(e).__name__)}") from None


def _holds(path: Path, column: str) -> bool:
    """Whether a column has a value that is not null, as far as the footer says."""
    metadata = _footer(path)
    for g in range(metadata.num_row_groups):
        group = metadata.row_group(g)
        for c in range(group.num_columns):
            chunk = group.column(c)
            if chunk.path_in_schema.partition(".")[0] == column:
                known = chunk.statistics is not None and chunk.statistics.has_null_count
                if not known or chunk.statistics.null_count < chunk.num_values:
                    return True
    return False
