"""The result document: scores, what they rest on, and the paired comparison with another result."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from ..core.errors import DataError, UsageError, counted
from ..core.files import read_object
from ..core.prompts import parse
from . import reading, stats
from .benchmark import UNCLEAR, Benchmark, content_key
from .predict import Work

WARN_EMPTY = 1.0  # percent of empty replies


def load_other(path: Path, benchmark: Benchmark, protocol: str) -> tuple[list[Any], Any]:
    """(judged questions, who judged them) of an eval dir, or of a judged file (the benchmark's first protocol).
    Raises UsageError: another protocol, or nothing there. DataError: damaged, or partly unjudged."""
    judge: Any = {"kind": "file"}
    file, found = path, (*benchmark.protocols, protocol)[0]
    if path.is_dir():
        file, scores = path / "judged.json", path / "scores.json"
        if not scores.is_file() or not file.is_file():
            raise UsageError(f"--compare-to {path}: no finished evaluation there (scores.json, judged.json)")
        document = read_object(scores)
        found, judge = str(document.get("protocol")), (document.get("settings") or {}).get("judge")
    elif not path.is_file():
        raise UsageError(f"--compare-to {path}: no such eval dir or judged file")
    if found != protocol:
        what = f"--compare-to {path} has protocol {found}, this evaluation {protocol}: they cannot be compared"
        raise UsageError(what, hint="score both by the same --protocol")
    judged, _ = benchmark.load_judged([file])
    if unjudged := sum(j.code is None for j in judged):
        raise DataError(f"--compare-to {path}: {unjudged} of its questions are unjudged")
    return judged, judge


def same_questions(ours: list[Any], theirs: list[Any], source: object) -> None:
    """Raises DataError when the judged questions of `source` are others than ours, or have another answer key."""
    here, there = ({j.key for j in some} for some in (ours, theirs))
    if here != there:
        counts = f"{len(there - here)} questions only there, {len(here - there)} only here"
        ids = list(dict.fromkeys(key[0] for key in sorted(here ^ there)))[:5]
        hint = "both must be of the same questions, with the same answer key and the same --limit"
        raise DataError(f"{source} is about another question set: {counts}", details=ids, hint=hint)


def build(w: Work, judged: list[Any], settings: dict, unjudged: int) -> dict:
    """The `--json` document. `unjudged`: questions without a verdict, or without a part of it.
    Raises DataError: more replies are empty than `--max-empty` allows."""
    o, benchmark, judge = w.o, w.benchmark, settings["judge"]
    doc: dict[str, Any] = {"benchmark": o.benchmark, "title": benchmark.title or benchmark.name}
    doc |= benchmark.document(judged, w.protocol)
    doc["unjudged"] = unjudged
    doc["questions_sha256"] = content_key(sorted(j.key for j in judged))
    doc["intervals"] = stats.intervals(judged, benchmark.score, seed=o.seed)
    replies = _replies(w)
    unanswered = Counter(r["unanswered"] for r in replies.values() if r.get("unanswered"))
    doc["unanswered"] = {"n": unanswered.total(), "causes": dict(unanswered)}
    doc["empty"] = empty_replies(w, settings.get("judged") or str(w.out))
    if len(replies) == len(judged):
        asked = [(q, r) for q in w.asked.questions if not (r := replies[q.id]).get("unanswered")]
        codes = [benchmark.code(q, r["model_prediction"]) for q, r in asked]
        doc["answer_format"] = answer_format([r for _, r in asked], codes)
        if judge.get("kind") != "rule":
            what = judge.get("judge_input", o.judge_input)
            read = [(q, reading.judged_text(r["model_prediction"], what, benchmark.reader)) for q, r in asked]
            rule = {q.id: benchmark.code(q, text) for q, text in read if text is not None}
            doc["judge_agreement"] = agreement(rule, {j.id: j.code for j in judged})
    doc["settings"] = settings
    doc["warnings"] = _first(doc) + list(dict.fromkeys(w.warnings)) + benchmark.warnings(doc)
    if w.other:
        theirs, other_judge = w.other
        same_questions(judged, theirs, o.compare_to)
        compared = stats.compare(judged, theirs, benchmark.score, seed=o.seed)
        doc["comparison"] = {"with": str(o.compare_to), **compared}
        if _who(other_judge) != _who(judge):
            doc["warnings"].append("the two results were judged differently: their difference is partly the judges'")
    return doc


def _replies(w: Work) -> dict[str, dict]:
    """The records that have a reply: those of a file of verdicts need not."""
    return {id_: r for id_, r in (w.records or {}).items() if isinstance(r.get("model_prediction"), str)}


def empty_replies(w: Work, source: str) -> dict:
    """{n, causes} of the replies that say nothing: as the endpoint told, cut in their reasoning, or reasoning alone.
    Raises DataError: they are more than `--max-empty` allows; told before a judge is asked."""
    found: Counter[str] = Counter()
    records = _replies(w).values()
    for record in records:
        text = record["model_prediction"]
        if not record.get("unanswered") and reading.judged_text(text, "answer", w.benchmark.reader) is None:
            cut = "length" if record.get("finish") == "length" else "reasoning" if text.strip() else "empty"
            found[record.get("cause") or cut] += 1
    empty: dict[str, Any] = {"n": found.total(), "causes": dict(found)}
    if 100 * empty["n"] > w.o.max_empty * len(records):
        what = f"{source}: {empty['n']} of {len(records)} replies are empty ({causes(empty)}), so there is no score"
        hint = f"--max-empty is {w.o.max_empty:g} (percent); a reasoning model may need more --max-new-tokens"
        raise DataError(what, hint=hint)
    return empty


def _who(judge: Any) -> tuple:
    judge = judge if isinstance(judge, dict) else {}
    found = tuple(judge.get(key) for key in ("kind", "model", "judge_input", "prompt_sha256"))
    return (*found, judge.get("reader", "r1v"))


def causes(counted: dict) -> str:
    """`3 x content_filter, 1 x empty`."""
    return ", ".join(f"{n} x {kind}" for kind, n in counted["causes"].items())


def _first(doc: dict) -> list[str]:
    """What makes the scores mean little, or less than they seem to."""
    found = []
    if n := doc["unanswered"]["n"]:
        asked = counted(n, "question has", "questions have")
        found.append(f"{asked} no answer, which counts as not right: {causes(doc['unanswered'])}")
    if doc["unjudged"]:
        asked = counted(doc["unjudged"], "question is", "questions are")
        found.append(f"{asked} unjudged; what has no verdict counts as not right")
    if 100 * (n := doc["empty"]["n"]) > WARN_EMPTY * doc["n_questions"]:
        found.append(f"{n} of {doc['n_questions']} replies are empty: {causes(doc['empty'])}")
    return found


def agreement(rule: dict[str, int], judged: dict[str, int | None]) -> dict:
    """Judge against rule: how often the judge's verdict is the rule's, over judged questions. `readable` counts only
    replies in which the rule finds an answer."""
    both = [(code, judged[id_]) for id_, code in rule.items() if judged[id_] is not None]
    readable = [pair for pair in both if pair[0] != UNCLEAR]
    found = {"n": len(both), "agree": sum(a == b for a, b in both)}
    return found | {"readable": len(readable), "agree_readable": sum(a == b for a, b in readable)}


def answer_format(records: list[dict], codes: list[int]) -> dict:
    """How the replies look: without a usable `<answer>`, cut at the length limit (None: not known), unreadable (and as
    a share from 0 to 1)."""
    problems = Counter(p.problem for r in records if (p := parse(r["model_prediction"])).answer is None)
    finishes = [r.get("finish") for r in records]
    unreadable = codes.count(UNCLEAR)
    return {
        "n": len(records),
        "no_answer_tags": problems.total(),
        "problems": {str(k): n for k, n in problems.items()},
        "cut_at_length": finishes.count("length") if any(finishes) else None,
        "unreadable": unreadable,
        "unreadable_share": unreadable / len(codes) if codes else None,
    }


def dump_judged(records: list[dict]) -> str:
    """judged.json as text; NaN, which some writers leave for nothing, becomes null."""
    plain = json.loads(json.dumps(records), parse_constant=lambda name: None)
    return json.dumps(plain, indent=1, ensure_ascii=False) + "\n"
