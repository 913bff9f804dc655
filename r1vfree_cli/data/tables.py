"""Local copies as tables: parquet, CSV and TSV, `save_to_disk` folders, JSON, JSON lines and image folders.

A record that cannot be decoded is a `RowProblem` of its own: one bad line does not cost the others. That is why
`datasets` reads only what it saved: it refuses a file for one bad line, and guesses types (an id of 007 becomes 7).
"""

import csv
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..core import console
from ..core.errors import DataError, UsageError, first_line
from ..core.machine import library
from .drops import RowProblem
from .layouts import SPLIT_COLUMNS, is_record

BATCH = 16  # records decoded together
_SHARD = re.compile(r"(?P<split>[a-z]\w*?)-\d{5}-of-\d{5}(-[0-9a-f]+)?", re.IGNORECASE)
_NO_SPLIT = ("data", "part", "shard", "chunk")  # what shards are called that belong to no split
_ALIASES = {"training": "train", "训练": "train", "testing": "test", "测试": "test"}
_ALIASES |= dict.fromkeys(("val", "valid", "validate", "验证"), "validation")
_ALIASES |= dict.fromkeys(("devel", "development"), "dev") | dict.fromkeys(("evaluate", "evaluation"), "eval")
_WORDS = r"train|training|minitest|testing|test|testmini|testdev|val|valid|validation|validate|minival|dev|devel|"
_WORDS += r"development|eval|evaluate|evaluation|h[eo]ld[-_ ]?out|训练|测试|验证"
_NOUN = r"(?:[-_ ]?(?:set|split|data|file|row|question|image|annotation|example|sample|pair|record|qa)s?|集|s)?"
# ^ what may follow the word: testset, tests, val_data, testquestions
_HUMP = re.compile(r"(?<=[a-z\d])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")  # between the words of `geoTest`, `VQATest`
_CELLS = {"": None, "NaN": None, "nan": None, "inf": math.inf, "-inf": -math.inf}
_NOT_ROWS = {"data.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_SAVED = ("dataset_dict.json", "state.json")
_WANTED = "want UTF-8, with a line of headers; a spreadsheet writes it as CSV UTF-8"
_WRAPPED = (".parquet", ".jsonl", ".ndjson", ".json", ".csv", ".tsv")


@dataclass(frozen=True)
class Table:
    """Records that can be read again and again.

    name: what messages call it. rows: how many positions there are. roots: where its image paths start.
    batches: yields lists of records (None: an empty line) or Arrow batches, in order.
    """

    name: str
    rows: int
    roots: Sequence[Path]
    batches: Callable[[], Iterable[Any]]

    def read(self, positions: list[int] | None) -> Iterator[tuple[int, dict | RowProblem]]:
        """(position, record) of `positions`, of all for None; only batches that hold one of them are decoded."""
        wanted = range(self.rows) if positions is None else set(positions)
        start = 0
        for batch in self.batches():
            if here := [i for i in range(len(batch)) if start + i in wanted]:
                records = batch if isinstance(batch, list) else _records(batch)
                yield from ((start + i, records[i]) for i in here if records[i] is not None)
            start += len(batch)


def canonical(split: str) -> str:
    """`val` and `valid` are `validation`, `training` is `train`, `testing` is `test`."""
    return _ALIASES.get(split.lower(), split)


def split_of(name: str, more: Sequence[str] = ()) -> str | None:
    """The split that a path says, as `datasets` calls it; the file's name goes before its folders, nearest first.

    A split is a word between anything but letters, or with a capital that begins it or follows it: `geo_test.jsonl`,
    `x/val2017/rows.csv`, `TestSet.json`, `testA.json`; `more` are words of the source's own. Of several in one name one
    that is not train counts. Without one, a shard's first part is its split, as the hub names them.
    """
    own = "|".join((*sorted(map(re.escape, more), key=len, reverse=True), _WORDS))
    words = re.compile(rf"(?<![a-zà-ɏ])({own}){_NOUN}(?![a-zà-ɏ])", re.IGNORECASE)
    for part in reversed(Path(name).with_suffix("").parts):
        found = [canonical(word.lower()) for word in words.findall(_HUMP.sub("_", part))]
        if found:
            return next((word for word in found if word != "train"), "train")
        shard = _SHARD.fullmatch(part)
        if shard and shard["split"].lower() not in _NO_SPLIT:
            return shard["split"]
    return None


def open_local(path: Path, images: Sequence[Path] | None, splits: Sequence[str] = ()) -> list[tuple[str | None, Table]]:
    """Find the tables of a file or folder: (split or None where no name says it, table), sorted by file name.

    `images` are where image paths start, none: the folder of the file that names them; None: no path is read.

    Raises UsageError: a kind of file that is not read. DataError: nothing in it, or unreadable.
    """
    if is_saved(path):
        return _saved(path, images)
    files = data_files(path) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path} has no parquet, JSON or CSV files", hint="unpack archives first")
    names = [str(file.relative_to(path)) if path.is_dir() else file.name for file in files]
    tables = [_open_file(file, name, _roots(images, file.parent)) for file, name in zip(files, names)]
    return [(split_of(counted_name(path, file), splits), table) for file, table in zip(files, tables)]


def counted_name(path: Path, file: Path) -> str:
    """The part of the name of a file in `path`, or of `path` itself, that may say its split.

    Of the folder of a single file, or of what `datasets` saved, the name's end counts: `my_test_set/`, not
    `test_project/`.
    """
    if path.is_dir() and file != path:
        return f"{path.name}/{file.relative_to(path)}"
    folder = _HUMP.sub("_", path.absolute().parent.name)
    end = rf"(.*[^a-zà-ɏ])?({_WORDS}){_NOUN}[\W\d_]*"
    return f"{folder if re.fullmatch(end, folder, re.IGNORECASE) else ''}/{file.name}"


def _roots(images: Sequence[Path] | None, folder: Path) -> Sequence[Path]:
    return () if images is None else images or (folder,)


def is_saved(path: Path) -> bool:
    """Whether `save_to_disk` of `datasets` wrote the folder."""
    return any((path / name).is_file() for name in _SAVED)


def data_files(folder: Path) -> list[Path]:
    """The files of the first kind that there is, hidden ones left out. Raises DataError: a folder cannot be read."""
    chosen: list[Path] = []
    others: list[str] = []
    for pattern in ("*.parquet", "*.jsonl", "metadata.csv", "*.json", "*.csv", "*.tsv"):
        with library(f"cannot read {folder}"):
            found = sorted(file for file in folder.rglob(pattern) if file.is_file() and file.name not in _NOT_ROWS)
        files = [f for f in found if not any(part.startswith(".") for part in f.relative_to(folder).parts)]
        others += [str(f.relative_to(folder)) for f in files if chosen and f not in chosen]
        chosen = chosen or files
    if others:
        console.warn(f"{folder}: only {chosen[0].suffix} files are read; left out: {', '.join(others[:5])}")
    return chosen


def _open_file(path: Path, name: str, roots: Sequence[Path]) -> Table:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return parquet_table(path, name, roots)
    if suffix not in _WRAPPED:
        hint = "save the sheet as CSV UTF-8" if suffix in (".xlsx", ".xls", ".ods", ".numbers") else None
        raise UsageError(f"cannot read {path}: want {', '.join(_WRAPPED)} or a folder of these", hint=hint)
    with library(f"cannot read {path}"), open(path, "rb") as file:
        head = file.read(4096)
    encoding = json.detect_encoding(head[:4])
    if not encoding.startswith("utf-8"):
        hint = f"iconv -f {encoding} -t utf-8 {path.name} converts it"
        raise DataError(f"{path} is {encoding}, not UTF-8", hint=hint)
    read: Callable[[], Iterator[dict | RowProblem | None]] = partial(_lines, path)
    if suffix in (".csv", ".tsv"):
        read = partial(_cells, path, ",;\t" if suffix == ".csv" else "\t")
    elif suffix == ".json" or head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
        records = _document(path)
        read = read if records is None else partial(map, _object, records)
    return Table(name, sum(1 for _ in read()), roots, lambda: ([record] for record in read()))


def parquet_table(path: Path, name: str, roots: Sequence[Path]) -> Table:
    """One parquet file, read a few records at a time, and never copied as `datasets` would do.

    Raises DataError: not parquet, here or while it is read.
    """
    import pyarrow.parquet as pq

    def batches() -> Iterator[Any]:
        # Buffered: a column chunk of images can be larger than what may be held at once.
        with library(f"cannot read {path}"), pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
            yield from file.iter_batches(batch_size=BATCH)

    with library(f"cannot read {path}"):
        return Table(name, pq.read_metadata(path).num_rows, roots, batches)


def dataset_table(dataset: Any, name: str, roots: Sequence[Path]) -> Table:
    """A `datasets.Dataset`, read as stored: images are not decoded."""

    def batches() -> Iterator[Any]:
        with library(f"cannot read {name}"):
            yield from dataset.with_format("arrow").iter(batch_size=BATCH)

    return Table(name, len(dataset), roots, batches)


def _records(batch: Any) -> list[dict | RowProblem]:
    """A record batch or table as dicts; a record that cannot be decoded alone becomes a `RowProblem`."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError, NotImplementedError):  # bytes that are no UTF-8, dates out of range
        if len(batch) == 1:
            return [RowProblem("record cannot be decoded")]
        return [record for i in range(len(batch)) for record in _records(batch.slice(i, 1))]


def _saved(path: Path, images: Sequence[Path] | None) -> list[tuple[str | None, Table]]:
    import datasets

    with library(f"cannot read {path}, saved by datasets"):
        found = datasets.load_from_disk(str(path))
    if not isinstance(found, datasets.DatasetDict):
        found = {split_of(counted_name(path, path)) or str(found.split or "train"): found}
    return [
        (canonical(name), dataset_table(dataset, f"{path.name}/{name}", _roots(images, path)))
        for name, dataset in found.items()
    ]


def _cells(path: Path, separators: str) -> Iterator[dict | RowProblem]:
    """Lines of CSV, separated by what the header has most of; cells are text, but none, NaN and inf are those."""
    csv.field_size_limit(2**31 - 1)  # images may be among them, in base64
    with library(f"cannot read {path}", hint=_WANTED), open(path, encoding="utf-8-sig", newline="") as file:
        header = re.sub(r'"[^"]*"', "", file.readline())
        file.seek(0)
        for record in csv.DictReader(file, delimiter=max(separators, key=header.count)):
            cells = {k: _CELLS.get(v, v) if isinstance(v, str) else v for k, v in record.items()}
            yield RowProblem("line has more cells than the header") if None in record else cells


def _lines(path: Path) -> Iterator[dict | RowProblem | None]:
    with library(f"cannot read {path}"), open(path, "rb") as file:
        for line in file:
            yield _parse(line.removeprefix(b"\xef\xbb\xbf")) if line.strip() else None


def _parse(line: bytes) -> dict | RowProblem:
    try:
        return _object(json.loads(line))
    except (ValueError, RecursionError):
        return RowProblem("line is not JSON")


def _object(record: Any) -> dict | RowProblem:
    return record if isinstance(record, dict) else RowProblem("record is not an object")


def _document(path: Path) -> list | None:
    """The records of a JSON array or of an object that holds one, `{"data": [...]}`; None for JSON lines."""
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        if isinstance(e, json.JSONDecodeError) and e.msg == "Extra data":
            return None
        raise DataError(f"cannot read {path}: not JSON: {first_line(e)}") from None
    if isinstance(document, list):
        return document
    if not isinstance(document, dict):
        raise DataError(f"{path} holds {type(document).__name__}, want a list of records")
    lists = [value for value in document.values() if isinstance(value, list) and value]
    if is_record(document) or not lists:
        return [document]
    if len(lists) > 1:
        what = f"{path} holds an object with several lists: {', '.join(document)}"
        raise DataError(what, hint='want an array or {"data": [...]}')
    key = next(name for name, value in document.items() if value is lists[0])
    said = [key, *(document[name] for name in SPLIT_COLUMNS if isinstance(document.get(name), str))]
    split = next((found for text in said if (found := split_of(text)) not in (None, "train")), None)
    if split not in (None, split_of(path.name)):
        raise DataError(f"{path} holds records of {split}, which its name does not say", hint=f"call it {split}.json")
    return lists[0]
