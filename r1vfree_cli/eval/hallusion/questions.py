"""HallusionBench's questions and figures, from any of the layouts in which they are passed around.

Official JSON with an image folder or zip; the hub dataset's parquet (splits image, non_image); VLMEvalKit's TSV.
"""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import re
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ...core.errors import DataError, UsageError
from ..benchmark import QuestionSet, Reader, read_records
from . import score
from .score import Item

HUB = "lmms-lab/HallusionBench"
_FIGURE = re.compile(r"(?:^|.*/)((?:VD|VS)/[^/]+/[^/]+\.(?:png|jpe?g|webp))$", re.IGNORECASE)
_FILES = (".json", ".jsonl", ".ndjson", ".tsv", ".parquet", ".zip")  # a mistyped path is no hub name
_SHOWN = 5  # examples in an error


@dataclass(frozen=True)
class Question:
    """One question. `item` is its key and labels, `reference` the official `gt_answer_details` (None in a TSV)."""

    item: Item
    text: str
    reference: str | None
    filename: str | None

    @property
    def id(self) -> str:
        return self.item.id

    @property
    def needs_image(self) -> bool:
        return self.item.visual_input != 0

    @property
    def figure(self) -> tuple | None:
        """What tells its figure from others; None for a text-only question."""
        return (*self.item.set_key, self.item.figure_id) if self.needs_image else None

    @property
    def content(self) -> str:
        """All that decides what a reply is worth."""
        return f"{self.id}\0{self.text}\0{self.reference}\0{self.item.gt}\0{self.item.visual_input}"

    def record(self) -> dict:
        """The question in the official result format, without what models and judges add."""
        i = self.item
        return {
            "category": i.category,
            "subcategory": i.subcategory,
            "visual_input": str(i.visual_input),
            "set_id": i.set_id,
            "figure_id": i.figure_id,
            "question_id": i.question_id,
            "question": self.text,
            "gt_answer_details": self.reference,
            "gt_answer": str(i.gt),
            "filename": self.filename,
        }


# --- records ---------------------------------------------------------------------------------------------------


def from_record(record: dict, where: str) -> Question:
    """A question of the official JSON or result format.

    Raises:
        DataError: a field is missing or impossible.
    """
    item = score.from_record(record, where, judged=False)
    text = record.get("question")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: no question text")
    reference, filename = record.get("gt_answer_details"), record.get("filename")
    return Question(item, text, str(reference) if reference else None, str(filename) if filename else None)


def _checked(questions: list[Question], source: str) -> list[Question]:
    score.unique((q.item for q in questions), source)
    return questions


# --- loading ---------------------------------------------------------------------------------------------------


def load(
    source: str | None, images: Path | None = None, *, needed: Callable[[Question], bool] = lambda q: True
) -> QuestionSet:
    """Read a question set.

    Args:
        source: official JSON (or JSONL), VLMEvalKit TSV, folder of parquet files, or hub name; None is the hub's copy.
        images: folder or zip of the figures, for the official JSON.
        needed: which questions will be asked of a model; their figures must be there. Judging and scoring need none.

    Raises:
        UsageError: nothing there, or figures are needed and `images` is not given.
        DataError: damaged or inconsistent content; missing figures, named.
    """
    path = Path(source) if source else None
    if path and path.is_dir():
        found = _parquet(path)
    elif path and path.suffix == ".tsv":
        found = _tsv(path)
    elif path and path.is_file():
        found = _official(path, images, needed)
    elif source is None or (re.fullmatch(r"[\w.-]+/[\w.-]+", source) and path and path.suffix not in _FILES):
        found = _parquet(_download(source or HUB))
    else:
        raise UsageError(
            f"no questions at {source}",
            hint="--questions takes HallusionBench.json, a .tsv, a folder of parquet files or a hub name",
        )
    found.need_figures(needed, "give the folder or zip that holds VD/ and VS/ with --images")
    return found


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=["*.parquet"]))
    except Exception as e:  # the hub client raises its own, requests' and OS errors
        raise UsageError(
            f"cannot download {name}: {str(e).splitlines()[0] if str(e) else type(e).__name__}",
            hint="give local questions with --questions HallusionBench.json --images FOLDER_OR_ZIP",
        ) from None


def _official(path: Path, images: Path | None, needed: Callable[[Question], bool]) -> QuestionSet:
    questions = _checked([from_record(record, where) for where, record in read_records(path)], str(path))
    readers: dict[str, Reader] = {}
    if images is None and any(q.needs_image and needed(q) for q in questions):
        beside = path.parent / "hallusion_bench"
        images = beside if beside.is_dir() else path.parent
    if images is not None:
        figures = figure_readers(images)
        for q in questions:
            key = _figure_key(q.filename)
            if q.needs_image and key in figures:
                readers[q.id] = figures[key]
    return QuestionSet(questions, readers, str(path))


def _figure_key(name: str | None) -> str:
    """`VD/figure/0_0.png` for both path habits, `./VD/...` and `./hallusion_bench/VD/...`; empty when neither."""
    match = _FIGURE.match((name or "").replace("\\", "/"))
    return match[1] if match and ".." not in match[1] else ""


def figure_readers(images: Path) -> dict[str, Reader]:
    """Figure path from VD/ or VS/ on -> reader, of a folder or a zip.

    Raises:
        UsageError: there is no such folder or zip, or it is no zip.
    """
    found: dict[str, Reader] = {}
    if images.is_dir():
        root = images.resolve()
        for file in sorted(root.rglob("*")):
            key = _figure_key(file.relative_to(root).as_posix()) or _figure_key(
                f"{root.name}/{file.relative_to(root).as_posix()}"
            )
            # A link to outside the folder is not followed: a shared question file must not choose what is read.
            if key and file.is_file() and file.resolve().is_relative_to(root):
                found.setdefault(key, file.read_bytes)
        return found
    try:
        archive = zipfile.ZipFile(images)
    except (OSError, zipfile.BadZipFile) as e:
        raise UsageError(f"--images {images}: neither a folder nor a zip ({e})") from None
    for name in sorted(archive.namelist()):
        if key := _figure_key(name):
            found.setdefault(key, partial(_from_zip, archive, name, images))
    return found


def _from_zip(archive: zipfile.ZipFile, name: str, path: Path) -> bytes:
    from ...data.rows import MAX_FILE_BYTES

    try:
        if archive.getinfo(name).file_size > MAX_FILE_BYTES:  # a bomb is not unpacked
            raise DataError(f"{path}: {name} is too large for a figure")
        return archive.read(name)
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError, NotImplementedError) as e:
        raise DataError(f"{path}: cannot read {name}: {e}") from None


def _parquet(folder: Path) -> QuestionSet:
    """The hub dataset's layout: parquet files with an `image` struct (bytes, path) in the split image."""
    import pyarrow
    import pyarrow.parquet

    questions: list[Question] = []
    readers: dict[str, Reader] = {}
    held: dict[str, bytes] = {}  # a figure comes once with each of its questions
    files = sorted(folder.rglob("*.parquet"))
    if not files:
        raise DataError(f"{folder} holds no parquet files", hint="give the official JSON with --questions")
    for file in files:
        try:
            for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=64):
                for record in batch.to_pylist():
                    image = record.pop("image", None)
                    question = from_record(record, f"{file}, question {len(questions) + 1}")
                    questions.append(question)
                    data = image.get("bytes") if isinstance(image, dict) else None
                    if question.needs_image and data:
                        data = held.setdefault(hashlib.sha256(data).hexdigest(), data)
                        readers[question.id] = partial(bytes, data)
        except (OSError, pyarrow.ArrowException) as e:
            raise DataError(f"cannot read {file}: {e}") from None
    return QuestionSet(_checked(questions, str(folder)), readers, str(folder))


def _tsv(path: Path) -> QuestionSet:
    """VLMEvalKit's TSV: `index` = category_subcategory_visual_set_figure_question, `image` in base64.

    A short `image` names the row whose image it shares. The TSV has image questions only and no reference details.
    """
    csv.field_size_limit(sys.maxsize)
    try:
        with open(path, newline="", encoding="utf-8") as f:
            rows = list(csv.DictReader(f, delimiter="\t"))
    except (OSError, ValueError, csv.Error) as e:
        raise DataError(f"cannot read {path}: {e}") from None
    images = {row.get("index"): row.get("image") or "" for row in rows}
    questions: list[Question] = []
    readers: dict[str, Reader] = {}
    for number, row in enumerate(rows, 2):
        where = f"{path}, line {number}"
        question = from_record(_tsv_record(row, where), where)
        questions.append(question)
        image = row.get("image") or ""
        image = images.get(image, image) if len(image) <= 64 else image
        if image and question.needs_image:
            readers[question.id] = partial(_decode, image, where)
    return QuestionSet(_checked(questions, str(path)), readers, str(path))


def _tsv_record(row: dict[str, Any], where: str) -> dict:
    parts = (row.get("index") or "").split("_")
    if len(parts) < 6:
        raise DataError(f"{where}: index is {row.get('index')!r}, wanted like VD_figure_1_0_0_0")
    category, subcategory, visual, set_id, figure_id, question_id = parts[-6:]
    answer = str(row.get("answer") or row.get("gt_answer") or "").strip().lower()
    return {
        "category": row.get("category") or category,
        "subcategory": subcategory,
        "visual_input": row.get("visual_input") or visual,
        "set_id": set_id,
        "figure_id": figure_id,
        "question_id": question_id,
        "question": row.get("question"),
        "gt_answer": {"yes": "1", "no": "0"}.get(answer, answer),
        "gt_answer_details": row.get("gt_answer_details"),
        "filename": row.get("filename") or row.get("image_path"),
    }


def _decode(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=False)
    except (binascii.Error, ValueError) as e:
        raise DataError(f"{where}: the image is not base64: {e}") from None


# --- predictions and judged files ------------------------------------------------------------------------------


def load_judged(path: Path) -> tuple[list[Item], list[dict]]:
    """A file in the official result format -> items and their records, in file order.

    Raises:
        DataError: not that format, or a question twice.
    """
    records = list(read_records(path))
    items = score.unique((score.from_record(record, where) for where, record in records), str(path))
    return list(items.values()), [record for _, record in records]


def load_predictions(path: Path, known: list[Question], needed: list[Question]) -> dict[str, dict]:
    """Question id -> prediction record, for the needed questions, of a file made elsewhere (official result format).

    Args:
        known: the whole question set; predictions for known questions that are not needed are left out.

    Raises:
        DataError: a question twice, unknown, missing or with another answer key; or no `model_prediction`.
    """
    by_id = {q.id: q for q in known}
    found: dict[str, dict] = {}
    unknown, twice, other = [], [], []
    for where, record in read_records(path):
        item = score.from_record(record, where, judged=False)
        if not isinstance(record.get("model_prediction"), str):
            raise DataError(f"{where}: no model_prediction")
        here = by_id.get(item.id)
        if here is None:
            unknown.append(item.id)
        elif item.id in found:
            twice.append(item.id)
        elif item.gt != here.item.gt or record.get("question", here.text) != here.text:
            other.append(item.id)
        found[item.id] = record
    for problem, ids in (
        ("are not in the question set", unknown),
        ("come twice", twice),
        ("have another text or answer key than the question set", other),
        ("have no prediction", [q.id for q in needed if q.id not in found]),
    ):
        if ids:
            raise DataError(
                f"{path}: {len(ids)} questions {problem}",
                details=ids[:_SHOWN],
                hint="were the predictions made for another question set?",
            )
    return {q.id: found[q.id] for q in needed}


def from_records(path: Path) -> QuestionSet:
    """The question set that a file in the official result format carries itself, without figures."""
    asked = [from_record(record, where) for where, record in read_records(path)]
    return QuestionSet(_checked(asked, str(path)), {}, str(path))
