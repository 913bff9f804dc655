"""The result document: scores, what they rest on, and the paired comparison with another result."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.errors import DataError, UsageError
from ...core.files import read_json
from ...core.prompts import parse
from .. import reading, stats
from ..options import EvalOptions
from . import questions, score
from .score import Item


@dataclass(frozen=True)
class Other:
    """A result to compare with."""

    path: Path
    items: list[Item]
    judge: Any


def load_other(path: Path, protocol: str) -> Other:
    """An eval dir, or a judged file (protocol official).

    Raises:
        UsageError: another protocol, or nothing there.
        DataError: damaged, or partly unjudged.
    """
    document: Any
    file, document = path, {"protocol": "official", "settings": {"judge": {"kind": "file"}}}
    if path.is_dir():
        if not (path / "scores.json").is_file() or not (path / "judged.json").is_file():
            raise UsageError(f"--compare-to {path}: no finished evaluation there (scores.json, judged.json)")
        file, document = path / "judged.json", read_json(path / "scores.json")
    elif not path.is_file():
        raise UsageError(f"--compare-to {path}: no such eval dir or judged file")
    found = document.get("protocol") if isinstance(document, dict) else None
    if found != protocol:
        raise UsageError(
            f"--compare-to {path} has protocol {found}, this evaluation {protocol}: they cannot be compared",
            hint="score both by the same --protocol",
        )
    items, _ = questions.load_judged(file)
    unjudged = sum(i.code is None for i in items)
    if unjudged:
        raise DataError(f"--compare-to {path}: {unjudged} of its questions are unjudged")
    return Other(path, items, (document.get("settings") or {}).get("judge"))


def same_questions(items: list[Item], other: Other) -> None:
    """Raises DataError when the other result is about other questions or has another answer key."""
    here, there = ({(i.id, i.gt) for i in some} for some in (items, other.items))
    if here != there:
        raise DataError(
            f"{other.path} is about another question set: {len(there - here)} questions only there, "
            f"{len(here - there)} only here",
            details=[id_ for id_, _ in sorted(here ^ there)[:5]],
            hint="compare evaluations of the same questions, with the same --limit",
        )


def build(
    o: EvalOptions,
    items: list[Item],
    records: dict[str, dict],
    settings: dict,
    other: Other | None,
    warnings: list[str],
    unjudged: int,
) -> dict:
    """The `--json` document.

    Args:
        records: question id -> record with `model_prediction` (and `finish`), as far as there are predictions.
        unjudged: questions without a verdict, or without the `same` that their label needs.
    """
    doc = score.score(items, o.protocol)
    doc["unjudged"] = unjudged
    doc["intervals"] = stats.intervals(items, seed=o.seed)
    replies = {i.id: records[i.id].get("model_prediction") for i in items if i.id in records}
    texts = {id_: text for id_, text in replies.items() if isinstance(text, str)}
    judge_input = (settings.get("judge") or {}).get("judge_input", o.judge_input)
    if len(texts) == len(items):
        doc["answer_format"] = answer_format(texts, records)
        doc["judge_agreement"] = reading.agreement(
            {id_: reading.judged_text(text, judge_input) for id_, text in texts.items()},
            {i.id: i.gt for i in items},
            {i.id: i.code for i in items},
        )
    doc["settings"] = settings
    doc["warnings"] = warnings + _warnings(doc, o.protocol)
    if other:
        same_questions(items, other)
        doc["comparison"] = {"with": str(other.path), **stats.compare(items, other.items, seed=o.seed)}
        if _who(other.judge) != _who(settings.get("judge")):
            doc["warnings"].append("the two results were judged differently: their difference is partly the judges'")
    return doc


def _who(judge: Any) -> tuple:
    judge = judge if isinstance(judge, dict) else {}
    return tuple(judge.get(key) for key in ("kind", "model", "judge_input", "prompt_sha256"))


def _warnings(doc: dict, protocol: str) -> list[str]:
    found = []
    totals = {metric: total for metric, (_, total) in doc["counts"].items()}
    expected = score.OFFICIAL_COUNTS["aAcc"] if protocol == "official" else score.IMAGE_QUESTIONS
    whole = totals == score.OFFICIAL_COUNTS if protocol == "official" else totals["aAcc"] == expected
    if not whole:
        found.append(
            f"{totals['aAcc']} questions, the published benchmark has {expected}: not comparable with published figures"
        )
    if doc["unjudged"]:
        found.append(f"{doc['unjudged']} questions are unjudged; those without a verdict count as not right")
    if protocol == "official" and doc["diagnostics"]["unlabelled"]:
        found.append(
            f"{doc['diagnostics']['unlabelled']} wrong questions cannot be labelled language, illusion or mixed: "
            "`same`, or the verdict on figure 0 of the pair, is missing"
        )
    return found


def answer_format(texts: dict[str, str], records: dict[str, dict]) -> dict:
    """How the replies look: without a usable `<answer>`, cut at the length limit (None: not known), unreadable."""
    problems = Counter(p.problem for text in texts.values() if (p := parse(text)).answer is None)
    finishes = [records[id_].get("finish") for id_ in texts]
    return {
        "n": len(texts),
        "no_answer_tags": problems.total(),
        "problems": {str(k): n for k, n in problems.items()},
        "cut_at_length": finishes.count("length") if any(finishes) else None,
        "unreadable": sum(reading.read_yes_no(text) is None for text in texts.values()),
    }


def dump_judged(records: list[dict]) -> str:
    """The official result format as text; NaN, which some writers leave for nothing, becomes null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, list):
            return [plain(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(records), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
