"""Rows for the stages: a recipe's `data.path` becomes a folder of rows, and that a `datasets.Dataset`.

`path` is a folder written by prepare-data; parquet files or a folder saved by `datasets`, in any layout that
prepare-data reads; a known source's repository; or `shapes?seed=1&n=512`. All but the first are prepared once.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from pydantic import BaseModel, ValidationError

from ..core import console
from ..core.errors import DataError, UsageError, counted, did_you_mean, first_line
from ..core.files import cache_dir, lock, read_json, read_object, remembered, sha256_file
from ..core.machine import library, refused
from . import images, layouts, rows, sources
from .prepare import SUMMARY, prepare
from .rows import COLUMNS, SCHEMA_VERSION
from .tables import canonical, counted_name, data_files, is_saved, split_of

if TYPE_CHECKING:
    import datasets

READER = 2  # of hub sources: the first lost a row with every batch


class _File(BaseModel):
    name: str
    bytes: int
    sha256: str


class _Split(BaseModel):
    rows: int
    sha256: str
    solution: int = 0
    thinking: int = 0
    files: list[_File]


class _Summary(BaseModel):
    """`data.json`, as far as it is used here."""

    schema_version: int
    splits: dict[str, _Split]


@dataclass(frozen=True)
class _Place:
    """What a data path means: a known source, if it is one, where its rows are or will be, and the arguments with
    which `prepare` makes them there; None for what prepare-data wrote itself."""

    source: sources.Source | None
    folder: Path
    arguments: dict[str, Any] | None = None


def ensure_rows(path: str, split: str = "train") -> Path:
    """The folder that holds the rows of `path`, prepared first where it must be; several processes may call it at once.

    Raises UsageError: there is no such data, or no such split of a source. DataError: it does not hold rows, is
    damaged, or lacks the split.
    """
    place = _place(path, split)
    out, arguments = place.folder, place.arguments
    if arguments is None:
        _split(out, split)
        return out
    with lock(out.with_name(f"{out.name}.cached"), "data cache", wait=True):
        try:
            _split(out, arguments["split"])
        except DataError:  # not there, or not intact
            summary = prepare(out=out, overwrite=True, **arguments)
            for reason, count in summary["dropped"].items():
                console.log(f"{path}: dropped {count} records: {reason}")
    return out


def find_rows(path: str, split: str = "train") -> Path | None:
    """Where `ensure_rows` has the rows or would take them from; None when they are not there yet. Prepares nothing."""
    try:
        folder = _place(path, split).folder
    except UsageError:
        return None
    return folder if folder.exists() else None


def load_rows(path: str, split: str = "train", limit: int | None = None) -> datasets.Dataset:
    """The rows of a split that have an image, the first `limit` of them: a memory-mapped dataset of `COLUMNS`.

    Images are decoded to PIL when a row is fetched; solution and thinking may be None.

    Raises UsageError, DataError: as `ensure_rows`; or the files are not as they were written.
    """
    import datasets
    import pyarrow as pa
    import pyarrow.compute as pc

    folder = ensure_rows(path, split)
    written = _split(folder, split).files
    files = [folder / file.name for file in written]
    for file, as_written, (_, sha256) in zip(files, written, _hashes(files), strict=True):
        if sha256 != as_written.sha256:
            raise DataError(f"{file} was changed since it was prepared", hint="prepare the data again")
    datasets.disable_progress_bars()
    try:
        found = datasets.Dataset.from_parquet([str(file) for file in files], cache_dir=str(cache_dir("datasets")))
        found = found.select_columns(list(COLUMNS))
        shown = pc.greater(pc.list_value_length(found.data.column("images")), 0).to_numpy()
    except (pa.ArrowException, TypeError, ValueError, datasets.exceptions.DatasetsError) as e:
        # `datasets` copies them into its cache first.
        raise refused(e) or DataError(f"cannot read the rows of {path}: {first_line(e.__cause__ or e)}") from None
    if not shown.all():
        console.log(f"{path}: dropped {counted((~shown).sum(), 'row')} without an image, which training does not take")
        found = found.select(shown.nonzero()[0])
    return found if limit is None else found.select(range(min(limit, len(found))))


def data_sha256(path: str, split: str = "train") -> str:
    """sha256 (hex) of a split's files, as recorded when they were written."""
    return _split(ensure_rows(path, split), split).sha256


def columns(path: str, split: str = "train") -> list[str]:
    """The row's columns that hold something in at least one row; of a source, without downloading, what it should have.

    Raises UsageError, DataError: as `ensure_rows`.
    """
    if source := _place(path, split).source:
        return list(source.columns)
    found = _split(ensure_rows(path, split), split)
    return [name for name in COLUMNS if getattr(found, name, True)]


def source_name(path: str, split: str = "train") -> str | None:
    """The source that rows come from, `files` for a user's own; None where they are not here yet."""
    place = _place(path, split)
    if place.source:
        return place.source.name
    return read_json(place.folder / SUMMARY).get("source") if (place.folder / SUMMARY).is_file() else None


def image_sizes(path: str, split: str = "train", rows: int = 64) -> list[tuple[int, int]]:
    """(width, height) of the images of the first rows, as far as they are here already."""
    import pyarrow.parquet as pq
    from PIL import Image

    folder = find_rows(path, split)
    try:
        first = pq.ParquetFile(folder / _split(folder, split).files[0].name) if folder else None
        batch = next(first.iter_batches(rows, columns=["images"])).to_pylist() if first else []
        return [Image.open(io.BytesIO(i["bytes"])).size for row in batch for i in row["images"] or []]
    except (OSError, ValueError, LookupError, TypeError, DataError):  # damaged: told when the rows are loaded
        return []


def _place(path: str, split: str) -> _Place:
    name, _, query = path.partition("?")
    source = sources.SOURCES["shapes"] if name == "shapes" else sources.BY_HUB.get(name)
    arguments: dict[str, Any] = {"source": source.name if source else "files", "split": split}
    key: list[Any] = [SCHEMA_VERSION, READER, arguments]
    if source is None:
        here = Path(path if "\0" in path else os.path.expanduser(path))
        if not os.path.exists(here):
            known = [*sources.BY_HUB, "shapes"]
            hint = did_you_mean(path, known, "prepare it with r1v prepare-data, or use one of " + ", ".join(known))
            if path in sources.SOURCES and sources.SOURCES[path].hub:
                hint = f"as a data path this source is called {sources.SOURCES[path].hub}"
            raise UsageError(f"no such data: {path}", hint=hint)
        if (here / SUMMARY).is_file():
            return _Place(None, here)
        split = canonical(split)
        arguments |= {"split": split, "input": str(here), "images": None}
        key = [SCHEMA_VERSION, split, _content(here)]
        key += [sha256_file(Path(str(m.__file__))) for m in (rows, images, layouts)]
    elif source.name == "shapes":
        from . import shapes

        if split not in shapes.SPLITS:
            raise UsageError(f"shapes has no split {split!r}; it has {', '.join(shapes.SPLITS)}")
        arguments |= _shapes_query(path, query)
        key.append(sha256_file(Path(shapes.__file__)))  # other drawing code draws other data
    elif query:
        raise UsageError(f"data path {path}: only shapes takes ?seed=...&n=...")
    return _Place(source, cache_dir("data", f"{arguments['source']}-{split}-{_fingerprint(key)}"), arguments)


def _fingerprint(document: Any) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:16]


def _content(path: Path) -> list[list[str]]:
    """Split by name, name and sha256 of the files of data that prepare-data did not write.

    Raises DataError: it names its images by path, so that the content says nothing about them; or it is no data.
    """
    with library(f"cannot read {path}"):
        if not path.is_dir():
            files = [path]
        elif is_saved(path):
            files = sorted(path.rglob("*.arrow"))
        else:  # looked for close by first: a mistaken `~` or `/` is not searched through
            files = data_files(path) if any(any(path.glob(p)) for p in ("*.parquet", "*/*.parquet")) else []
        if not files or {file.suffix for file in files} - {".parquet", ".arrow"}:
            hint = f"r1v prepare-data files --input {path} --out FOLDER makes rows of it"
            raise DataError(f"{path} holds no rows: neither {SUMMARY} nor parquet files", hint=hint)
        files += sorted(path.rglob("*.json")) if is_saved(path) else []  # `datasets` names the splits there
        splits = [str(split_of(counted_name(path, file))) for file in files]
        return [[split, *found] for split, found in zip(splits, _hashes(files), strict=True)]


def _hashes(files: list[Path]) -> list[list[str]]:
    """[name, sha256] of each file, remembered by size and time."""
    stats = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    known = cache_dir("checked", f"{_fingerprint(stats)}.json")

    def sound(found: Any) -> bool:
        return [name for name, sha in found if len(sha) == 64] == [file.name for file in files]

    return remembered(known, sound, lambda: [[file.name, sha256_file(file)] for file in files])


def _shapes_query(path: str, query: str) -> dict[str, int]:
    values = {"seed": 0}
    try:
        for key, found in parse_qs(query, keep_blank_values=True, strict_parsing=bool(query)).items():
            values[{"seed": "seed", "n": "limit"}[key]] = int(found[-1])
    except (KeyError, ValueError):
        raise UsageError(f"data path {path}: want shapes?seed=INT&n=INT") from None
    return values


def _split(folder: Path, split: str) -> _Split:
    """A split of `data.json`, with all its files there in their size.

    Raises DataError: no such summary or split, another schema, a file that is missing or has changed.
    """
    document = read_object(folder / SUMMARY)
    version = document.get("schema_version")
    if version not in (None, SCHEMA_VERSION):
        what = f"{folder} has rows of schema {version!r}, this version reads {SCHEMA_VERSION}"
        raise DataError(what, hint="prepare the data again")
    try:
        splits = _Summary.model_validate(document).splits
    except ValidationError:
        raise DataError(f"{folder / SUMMARY} is not a summary written by prepare-data") from None
    found = splits.get(split) or splits.get(canonical(split))
    if found is None:
        raise DataError(f"{folder} has no split {split!r}; it has {', '.join(splits)}")
    if not found.rows:
        raise DataError(f"{folder} has no rows in split {split!r}")
    for file in found.files:
        path = folder / file.name
        if Path(file.name).name != file.name or not path.is_file():
            raise DataError(f"{folder} is not complete: {file.name} is missing", hint="prepare the data again")
        if path.stat().st_size != file.bytes:
            raise DataError(f"{path} was changed since it was prepared", hint="prepare the data again")
    return found
