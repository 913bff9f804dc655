"""Local copies as tables: parquet, CSV and TSV, `save_to_disk` folders, JSON, JSON lines and image folders.

Reading is streaming and repeatable; a record that cannot be decoded is a `RowProblem` of its own, so that one bad
line does not cost the others. That is why `datasets` reads only what it saved: of other files it makes a copy first,
guesses types (an id of 007 becomes 7), and refuses them for one bad line.
"""

import csv
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..core import console
from ..core.errors import DataError, UsageError, first_line
from .drops import RowProblem
from .layouts import SPLIT_COLUMNS, is_record
from .sources import Table

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


def canonical(split: str) -> str:
    """`val` and `valid` are `validation`, `training` is `train`, `testing` is `test`."""
    return _ALIASES.get(split.lower(), split)


def split_of(name: str, more: Sequence[str] = ()) -> str | None:
    """The split that a path says, as `datasets` calls it; the file's name goes before its folders, nearest first.

    A split is a word between anything but letters, or with a capital that begins it or follows it:
    `test-00000-of-00002-1f2e.parquet`, `geo_test.jsonl`, `x/val2017/rows.csv`, `TestSet.json`, `testA.json`. Of
    several in one name one that is not train counts. Without one, a shard's first part is its split, as the hub names
    them. `more` are words of the source's own.
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

    `images` are where image paths start, none: the folder of the file that names them; None: no path is read. `splits` are names of
    splits beside the usual ones.

    Raises UsageError: a kind of file that is not read. DataError: nothing in it, or unreadable.
    """
    if is_saved(path):
        return _saved(path, images)
    files = data_files(path) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path} has no parquet, JSON or CSV files", hint="unpack archives first")
    found: list[tuple[str | None, Table]] = []
    for file in files:
        name = str(file.relative_to(path)) if path.is_dir() else file.name
        found.append((split_of(counted_name(path, file), splits), _open_file(file, name, _roots(images, file.parent))))
    return found


def counted_name(path: Path, file: Path) -> str:
    """The part of the name of a file in `path`, or of `path` itself, that may say its split.

    Of the folder of a single file, or of what `datasets` saved, the name's end counts: `my_test_set/rows.jsonl`, not `test_project/rows.jsonl`.
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
        try:
            found = sorted(file for file in folder.rglob(pattern) if file.is_file() and file.name not in _NOT_ROWS)
        except OSError as e:
            raise DataError(f"cannot read {folder}: {e}") from None
        files = [f for f in found if not any(part.startswith(".") for part in f.relative_to(folder).parts)]
        if chosen:
            others += [str(f.relative_to(folder)) for f in files if f not in chosen]
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
    try:
        with open(path, "rb") as file:
            head = file.read(4096)
    except OSError as e:
        raise DataError(f"cannot read {path}: {e.strerror}") from None
    encoding = json.detect_encoding(head[:4])
    if not encoding.startswith("utf-8"):
        hint = f"iconv -f {encoding} -t utf-8 {path.name} converts it"
        raise DataError(f"{path} is {encoding}, not UTF-8", hint=hint)
    if suffix in (".csv", ".tsv"):
        return _in_turn(name, roots, lambda: _cells(path, ",;\t" if suffix == ".csv" else "\t"))
    if suffix == ".json" or head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
        records = _document(path)
        if records is not None:
            return _in_turn(name, roots, lambda: map(_object, records))
    return _in_turn(name, roots, lambda: _lines(path))


# --- tables ----------------------------------------------------------------------------------------------------


@contextmanager
def _reading(path: Path | str) -> Iterator[None]:
    """The errors of pyarrow, pandas and `datasets` as a DataError."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as e:
        raise DataError(f"cannot read {path}: {first_line(e)}") from None


def parquet_table(path: Path, name: str, roots: Sequence[Path]) -> Table:
    """One parquet file, read a few records at a time, and never copied as `datasets` would do.

    Raises DataError: not parquet, here or while it is read.
    """
    import pyarrow.parquet as pq

    def open_file() -> pq.ParquetFile:
        # Buffered: a column chunk of images can be larger than what may be held at once.
        return pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False)

    def read(positions: list[int] | None) -> Iterator[tuple[int, dict | RowProblem]]:
        wanted = None if positions is None else set(positions)
        with _reading(path), open_file() as file:
            start = 0
            for batch in file.iter_batches(batch_size=BATCH):
                here = [i for i in range(batch.num_rows) if wanted is None or start + i in wanted]
                if here:
                    records = _records(batch)
                    yield from ((start + i, records[i]) for i in here)
                start += batch.num_rows

    with _reading(path), open_file() as file:
        return Table(name, file.metadata.num_rows, roots, read)


def dataset_table(dataset: Any, name: str, roots: Sequence[Path]) -> Table:
    """A `datasets.Dataset`, read as stored: images are not decoded."""

    def read(positions: list[int] | None) -> Iterator[tuple[int, dict | RowProblem]]:
        chosen = dataset if positions is None else dataset.select(positions)
        at = iter(range(len(dataset)) if positions is None else positions)
        with _reading(name):
            for table in chosen.with_format("arrow").iter(batch_size=BATCH):
                yield from zip(at, _records(table))

    return Table(name, len(dataset), roots, read)


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


def _saved(path: Path, images: Sequence[Path] | None) -> list[tuple[str | None, Table]]:
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except Exception as e:  # its readers raise anything on a damaged folder
        raise DataError(f"cannot read {path}, saved by datasets: {first_line(e)}") from None
    if not isinstance(found, datasets.DatasetDict):
        found = {split_of(counted_name(path, path)) or str(found.split or "train"): found}
    return [
        (canonical(name), dataset_table(dataset, f"{path.name}/{name}", _roots(images, path)))
        for name, dataset in found.items()
    ]


def _in_turn(name: str, roots: Sequence[Path], records: Callable[[], Iterator[dict | RowProblem | None]]) -> Table:
    """Records that can only be read one after the other; None (an empty line) is passed over."""

    def read(positions: list[int] | None) -> Iterator[tuple[int, dict | RowProblem]]:
        wanted = None if positions is None else set(positions)
        for position, record in enumerate(records()):
            if record is not None and (wanted is None or position in wanted):
                yield position, record

    return Table(name, sum(1 for _ in records()), roots, read)


def _cells(path: Path, separators: str) -> Iterator[dict | RowProblem]:
    """Lines of CSV, separated by what the header has most of; all cells are text, but empty ones and NaN are none, and
    inf is the number."""
    csv.field_size_limit(2**31 - 1)  # images may be among them, in base64
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            header = re.sub(r'"[^"]*"', "", file.readline())
            file.seek(0)
            for record in csv.DictReader(file, delimiter=max(separators, key=header.count)):
                cells = {k: _CELLS.get(v, v) if isinstance(v, str) else v for k, v in record.items()}
                yield RowProblem("line has more cells than the header") if None in record else cells
    except (OSError, ValueError, csv.Error) as e:
        raise DataError(f"cannot read {path}: {first_line(e)}", hint=_WANTED) from None


def _lines(path: Path) -> Iterator[dict | RowProblem | None]:
    try:
        with open(path, "rb") as file:
            for line in file:
                yield _parse(line.removeprefix(b"\xef\xbb\xbf")) if line.strip() else None
    except OSError as e:
        raise DataError(f"cannot read {path}: {e.strerror}") from None


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
