"""HallusionBench's questions and figures, from any of the layouts in which they are passed around.

Official JSON with an image folder or zip; the hub dataset's parquet (splits image, non_image); VLMEvalKit's TSV.
"""

import base64
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ...core.errors import DataError, UsageError, first_line
from ..questions import QuestionSet, Reader, unique
from ..records import read_records
from . import formats, score
from .score import Item

HUB = "lmms-lab/HallusionBench"
_FIGURE = re.compile(r"(?:^|.*/)((?:VD|VS)/[^/]+/[^/]+\.(?:png|jpe?g|webp))$", re.IGNORECASE)
_FILES = (".json", ".jsonl", ".ndjson", ".tsv", ".parquet", ".zip")  # a mistyped path is no hub name


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
        return (*self.item.cluster, self.item.figure_id) if self.needs_image else None

    @property
    def content(self) -> str:
        return f"{self.id}\0{self.text}\0{self.reference}\0{self.item.gt}\0{self.item.visual_input}"

    @property
    def asked(self) -> tuple:
        """What a record of a reply to it must have too; VLMEvalKit may put its request for yes or no after the text."""
        text = re.sub(r"(?i)\s*please answer (?:the question with )?yes or no\W*$", "", self.text)
        return " ".join(text.split()), self.item.gt, self.needs_image

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


def from_record(record: dict, where: str) -> Question:
    """A question of any layout that `formats.official` knows. Raises DataError: a field is missing or impossible."""
    record = formats.official(record, where)
    item = score.from_record(record, where, judged=False)
    text, reference, filename = (record.get(k) for k in ("question", "gt_answer_details", "filename"))
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: no question text")
    return Question(item, text, str(reference) if reference else None, str(filename) if filename else None)


def load(
    source: str | None, images: Path | None = None, needed: Callable[[Question], bool] = lambda q: True
) -> QuestionSet:
    """Read a question set.

    source: official JSON (or JSONL), VLMEvalKit TSV, folder of parquet files, or hub name; None is the hub's copy.
    images: folder or zip of the figures, for the official JSON.
    needed: which questions will be asked of a model; their figures must be there. Judging and scoring need none.

    Raises UsageError: nothing there. DataError: damaged or inconsistent content; missing figures, named.
    """
    name = HUB if source is None else source
    path = Path(name)
    is_name = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and path.suffix not in _FILES
    if source is None or (is_name and not path.exists()):
        path = _download(name)
    if not name or not path.exists():
        hint = "--questions takes HallusionBench.json, a .tsv, a folder of parquet files or a hub name"
        raise UsageError(f"no questions at {source}", hint=hint)
    questions: list[Question] = []
    readers: dict[str, Reader] = {}
    for where, record, read in _parquet(path) if path.is_dir() else _records(path):
        question = from_record(record, where)
        questions.append(question)
        if read and question.needs_image:
            readers[question.id] = read
    if path.is_file() and path.suffix != ".tsv" and (images or any(q.needs_image and needed(q) for q in questions)):
        beside = path.parent / "hallusion_bench"
        figures = figure_readers(images or (beside if beside.is_dir() else path.parent))
        named = {q.id: figures.get(_figure_key(q.filename)) for q in questions if q.needs_image}
        readers = {id_: read for id_, read in named.items() if read}
    found = QuestionSet(unique(questions, str(path)), readers, str(path))
    found.need_figures(needed, "give the folder or zip that holds VD/ and VS/ with --images")
    return found


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=["*.parquet"]))
    except Exception as e:  # the hub client raises its own, requests' and OS errors
        hint = "give local questions with --questions HallusionBench.json --images FOLDER_OR_ZIP"
        raise UsageError(f"cannot download {name}: {first_line(e)}", hint=hint) from None


def _figure_key(name: str | None) -> str:
    """`VD/figure/0_0.png` for both path habits, `./VD/...` and `./hallusion_bench/VD/...`; empty when neither."""
    match = _FIGURE.match((name or "").replace("\\", "/"))
    return match[1] if match and ".." not in match[1] else ""


def figure_readers(images: Path) -> dict[str, Reader]:
    """Figure path from VD/ or VS/ on -> reader, of a folder or a zip.
    Raises UsageError: there is no such folder or zip, or it is no zip."""
    if images.is_dir():
        root = images.resolve()
        # A link to outside the folder is not followed: a shared question file must not choose what is read.
        inside = (f for f in root.rglob("*") if f.is_file() and f.resolve().is_relative_to(root))
        members: dict[str, Reader] = {f.relative_to(root.parent).as_posix(): f.read_bytes for f in inside}
    elif images.is_file():
        from ...data.archives import zip_members

        members = zip_members(images)
    else:
        raise UsageError(f"--images {images}: neither a folder nor a zip")
    # Of two with the same end of their path, the first by name.
    return {key: read for name, read in sorted(members.items(), reverse=True) if (key := _figure_key(name))}


def _parquet(folder: Path) -> Iterator[tuple[str, dict, Reader | None]]:
    """The hub dataset's layout: parquet files with an `image` struct (bytes, path) in the split image."""
    from ...data.drops import RowProblem
    from ...data.tables import parquet_table

    held: dict[bytes, bytes] = {}  # a figure comes once with each of its questions
    files = sorted(folder.rglob("*.parquet"))
    if not files:
        raise DataError(f"{folder} holds no parquet files", hint="give the official JSON with --questions")
    for file in files:
        for position, record in parquet_table(file, file.name, ()).read(None):
            where = f"{file}, question {position + 1}"
            if isinstance(record, RowProblem):
                raise DataError(f"{where}: {record.reason}")
            data = (record.pop("image", None) or {}).get("bytes")
            yield where, record, partial(bytes, held.setdefault(data, data)) if data else None


def _records(path: Path) -> Iterator[tuple[str, dict, Reader | None]]:
    """The records of a file; VLMEvalKit's TSV has `image` in base64, a short one names the row whose image it shares."""
    rows = list(read_records(path))
    images = {row.get("index"): row.get("image") or "" for _, row in rows if path.suffix == ".tsv"}
    for where, row in rows:
        image = (row.get("image") or "") if images else ""
        image = images.get(image, image) if len(image) <= 64 else image
        yield where, row, partial(_decode, image, where) if image else None


def _decode(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text)
    except ValueError as e:
        raise DataError(f"{where}: the image is not base64: {e}") from None
