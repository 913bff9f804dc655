"""The questions of an eval dir one by one: what the model replied, how it was judged, which figure it saw."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ..errors import DataError
from ..hallusion.score import CODE, SAME, Item, from_record
from .collect import Eval, clean, json_lines, number, table

_REPLY = ("model_prediction", "prediction", "reply", "response", "text")


@dataclass
class Replies:
    """By question id: the judged item and its record; counts of unreadable answers; agreement with the rule in %."""

    items: dict[str, Item] = field(default_factory=dict)
    records: dict[str, dict] = field(default_factory=dict)
    counts: dict[str, float | None] = field(default_factory=dict)
    agreement: float | None = None

    def reply(self, key: str) -> str:
        record = self.records.get(key, {})
        return next((str(record[k]) for k in _REPLY if record.get(k)), "")


def read_replies(e: Eval) -> Replies:
    """Join predictions.jsonl and judgements.jsonl by question; what does not fit is noted in `e.notes`."""
    found = Replies()
    for name in ("predictions.jsonl", "judgements.jsonl"):
        for record in json_lines(e.path / name, e.notes):
            key = str(record.get("id"))
            found.records[key] = found.records.get(key, {}) | clean(record)
    bad = 0
    for key, record in found.records.items():
        try:
            code = record.get("code", record.get(CODE))
            item = from_record(record | {CODE: code, SAME: record.get(SAME)}, key)
        except DataError:
            bad += 1
            continue
        found.items[item.id] = item
    if bad:
        e.notes.append(f"{bad} questions cannot be read from predictions.jsonl and judgements.jsonl")
    answers = table(e.scores.get("answers"))
    found.counts = {k: number(answers.get(k)) for k in ("no_answer_tags", "cut_at_limit", "unreadable")}
    found.agreement = number(answers.get("rule_agreement"))
    return found


def figure_bytes(e: Eval, record: dict) -> bytes | None:
    """The encoded figure of a question, from the eval's image folder or zip; None when it is not there."""
    name, root = record.get("filename"), e.settings.get("images")
    if not isinstance(name, str) or not name or not isinstance(root, str) or not root:
        return None
    parts = [p for p in PurePosixPath(name).parts if p not in (".", "/")]
    if ".." in parts:
        return None
    place = Path(root)
    tails = [parts[i:] for i in range(len(parts)) if i < 2]
    try:
        if place.is_dir():
            inside = [place.joinpath(*tail) for tail in tails]
            return next(
                (p.read_bytes() for p in inside if p.is_file() and place.resolve() in p.resolve().parents), None
            )
        with zipfile.ZipFile(place) as archive:
            names = set(archive.namelist())
            for prefix in ("", "hallusion_bench/"):
                for tail in tails:
                    if prefix + "/".join(tail) in names:
                        return archive.read(prefix + "/".join(tail))
    except (OSError, zipfile.BadZipFile, RuntimeError):
        return None
    return None
