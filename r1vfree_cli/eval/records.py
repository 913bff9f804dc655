"""Records of files that r1v or other tools wrote: JSON (a list, or a table in an object), JSON Lines, TSV, CSV, XLSX."""

import csv
import re
import sys
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ..core.errors import DataError
from ..core.files import parse_json, read_json, read_jsonl

READ = "read are JSON, JSON Lines, CSV, TSV (UTF-8) and XLSX, each with a record a question"


def named(files: list[Path]) -> str:
    return ", ".join(map(str, files))


def found_in(record: dict) -> str:
    """What a record has, for an error about what it lacks."""
    return f"found: {', '.join(map(str, record)) or 'nothing'}"


def read_records(*files: Path) -> Iterator[tuple[str, dict]]:
    """(where, record) of all records of all files, in order. What a file is, its content says, not its name.
    Raises DataError: no such file, damaged, or no list of objects."""
    try:
        for path in files:
            yield from _records_of(path)
    except DataError as e:
        raise DataError(e.message, details=e.details, hint=e.hint or READ) from None


def _records_of(path: Path) -> Iterator[tuple[str, dict]]:
    kind = "row"
    numbered: Iterable[tuple[int, Any]]
    if zipfile.is_zipfile(path):
        numbered = _sheet(path)
    elif path.suffix in (".tsv", ".csv"):
        numbered = _table(path)
    elif path.suffix in (".jsonl", ".ndjson") or _is_lines(path):
        numbered, kind = read_jsonl(path), "line"
    else:
        numbered, kind = enumerate(_listed(read_json(path), path), 1), "record"
    for number, record in numbered:
        if not isinstance(record, dict):
            raise DataError(f"{path}, {kind} {number}: expected an object, found {type(record).__name__}")
        yield f"{path}, {kind} {number}", record


def _is_lines(path: Path) -> bool:
    """Whether the first of several lines is an object of its own."""
    try:
        with open(path, "rb") as f:
            return isinstance(parse_json(f.readline()), dict) and bool(f.readline().strip())
    except (OSError, ValueError, RecursionError):
        return False


def _listed(document: Any, path: Path) -> list:
    """The records of a document: a list, the one list in an object (a log), an object of columns, an object of objects."""
    if isinstance(document, list):
        return document
    found = type(document).__name__
    if isinstance(document, dict):
        values = list(document.values())
        lists = [v for v in values if isinstance(v, list) and v and all(isinstance(r, dict) for r in v)]
        if len(lists) == 1:
            return lists[0]
        if {"index", "question", "question_id"} & document.keys():  # columns, as pandas writes them
            columns = [list(v.values()) if isinstance(v, dict) else v for v in values]
            if all(isinstance(c, list) and len(c) == len(columns[0]) for c in columns):
                return [dict(zip(document, row)) for row in zip(*columns)]
        elif values and all(isinstance(v, dict) for v in values):
            return [{"index": key} | record for key, record in document.items()]
        names = ", ".join(map(str, list(document)[:8])) + (", ..." if len(document) > 8 else "")
        found = f"an object with {names or 'nothing'}"
    raise DataError(f"{path}: expected a list of records, found {found}")


def _table(path: Path) -> Iterator[tuple[int, dict]]:
    csv.field_size_limit(sys.maxsize)  # images in base64
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            head = f.readline()
            delimiter = next((mark for mark in "\t,;" if mark in head), ",")  # whatever it is called
            f.seek(0)
            for number, row in enumerate(csv.DictReader(f, delimiter=delimiter), 2):
                yield number, {_name(k): v for k, v in row.items()}
    except (OSError, ValueError, csv.Error) as e:
        raise DataError(f"cannot read {path}: {e}") from None


def _name(column: object) -> str:
    """A column as other tables call it: `Prediction ` is `prediction`."""
    return str(column).strip().lower()


def _sheet(path: Path) -> Iterator[tuple[int, dict]]:
    """(row number, record) of the first sheet; its first row names the columns."""
    from ..data.archives import zip_members

    members = zip_members(path)
    sheets = [name for name in members if re.fullmatch(r"xl/worksheets/[^/]+\.xml", name)]
    if not sheets:
        raise DataError(f"{path}: a zip archive that is no .xlsx workbook")
    try:
        strings = members.get("xl/sharedStrings.xml")
        shared = [_text(item) for item in ElementTree.fromstring(strings()).iterfind("{*}si")] if strings else []
        sheet = ElementTree.fromstring(
            members[min(sheets, key=lambda name: (name != "xl/worksheets/sheet1.xml", name))]()
        )
        names: dict[int, Any] = {}
        for number, row in enumerate(sheet.iterfind("{*}sheetData/{*}row"), 1):
            here = enumerate(row.iterfind("{*}c"))
            cells = {_column(cell.get("r") or "", position): _value(cell, shared) for position, cell in here}
            if names:
                yield int(row.get("r") or number), {name: cells.get(column) for column, name in names.items()}
            names = names or {column: _name(name) for column, name in cells.items() if name is not None}
    except (ElementTree.ParseError, ValueError, IndexError) as e:
        raise DataError(f"cannot read {path}: {e}") from None


def _column(place: str, position: int) -> int:
    """The number of a cell's column: "AB12" is 27; its place in the row where the cell does not say."""
    number = 0
    for letter in re.match(r"[A-Z]*", place).group():  # type: ignore[union-attr]
        number = 26 * number + ord(letter) - 64
    return number - 1 if number else position


def _text(item: ElementTree.Element) -> str:
    """A string and its runs, without the phonetic readings beside it."""
    return _unescaped("".join(part.text or "" for place in ("{*}t", "{*}r/{*}t") for part in item.iterfind(place)))


def _unescaped(text: str) -> str:
    """Control characters as Excel's format writes them, `_x000D_`."""
    return re.sub(r"_x([0-9A-Fa-f]{4})_", lambda m: chr(int(m[1], 16)), text)


def _value(cell: ElementTree.Element, shared: list[str]) -> str | None:
    kind, value, inline = cell.get("t"), cell.findtext("{*}v"), cell.find("{*}is")
    if inline is not None:
        return _text(inline)
    if value is None or kind == "e":
        return None
    return shared[int(value)] if kind == "s" else _unescaped(value)
