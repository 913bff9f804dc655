"""`r1v eval NAME`: generate, judge, score. Stages exchange files in the eval dir, so each can be run alone.

The eval dir: `eval.json` (what and how), `predictions.jsonl`, `judgements.jsonl`, `judged.json` (questions, replies and
verdicts; HallusionBench's in the official result format), `scores.json` (what `--json` prints).
"""

import hashlib
import re
import sys
import time
from collections import Counter
from contextlib import nullcontext
from copy import copy
from pathlib import Path
from typing import Any

from ..core import console
from ..core.errors import DataError, UsageError, counted, did_you_mean
from ..core.files import lock, read_object, write_json, write_text
from ..core.prompts import template_hash
from ..run import contract
from . import judgements, predict, reading
from .benchmark import Benchmark, content_key, find
from .hallusion import judge
from .judgements import Found, Replies
from .options import EvalOptions, check, parse_gates
from .predict import Work
from .questions import QuestionSet, unique
from .records import named
from .result import build, dump_judged, empty_replies, load_other, same_questions


def evaluate(o: EvalOptions) -> dict:
    """Run the asked stages; returns what `--json` prints: scores, or for a stage alone what it made.

    Call `check_gates(doc, o.fail_under)` after printing.

    Raises UsageError: wrong options, an endpoint that is down, an eval dir of something else or in use. DataError: bad
    questions, figures, predictions or checkpoint; unjudged questions without `allow_unjudged`; too many empty replies.
    """
    check(o)
    benchmark = copy(find(o.benchmark))
    benchmark.reader = o.reader
    if o.reader not in (benchmark.readers or ("r1v",)):
        raise UsageError(f"--reader {o.reader}: the benchmark {o.benchmark} is not about yes and no")
    parse_gates(o.fail_under, benchmark.metrics)
    if o.judge == "chat" and not benchmark.chat:
        raise UsageError(f"the benchmark {o.benchmark} has no chat judge", hint="leave out --judge chat")
    protocol = _protocol(o, benchmark)
    w = Work(o, benchmark, protocol, o.out or _default_out(o, protocol))
    if o.compare_to:
        w.other = load_other(o.compare_to, benchmark, protocol)
    writes = bool(o.out) if o.judged else not o.estimate
    with lock(w.out, "eval dir") if writes else nullcontext():
        if o.judged:
            return _score_judged(w, o.judged)
        if o.asks_judge and not o.estimate:
            _chat(o).endpoint.check()
        _open(w)
        if o.asks_judge:
            judge.check_references(w.asked.questions)  # known before anything is generated
        if w.other:
            same_questions([benchmark.judged(q, None) for q in w.asked.questions], w.other[0], o.compare_to)
        return {"estimate": _estimate(w)} if o.estimate else _stages(w)


def _protocol(o: EvalOptions, benchmark: Benchmark) -> str:
    if not benchmark.protocols:
        if o.protocol:
            raise UsageError(f"--protocol is {o.protocol!r}; the benchmark {o.benchmark} has one way to score only")
        return benchmark.name
    found, allowed = o.protocol or benchmark.protocols[0], benchmark.protocols
    if found not in allowed:
        hint = did_you_mean(found, allowed)
        raise UsageError(f"--protocol is {found!r}; allowed: {', '.join(allowed)}", hint=hint)
    return found


def _default_out(o: EvalOptions, protocol: str) -> Path:
    name = str(o.checkpoint or o.model or (o.predictions[0] if o.predictions else None))
    parts = [p for p in re.split(r"[^\w.-]+", name) if p.strip(".")]
    return Path("evals", "-".join(parts[-2:]) + ("" if protocol == "official" else f"-{protocol}"))


def _open(w: Work) -> None:
    """Set identity, asked and records; the latter stay None when they have to be generated."""
    o, benchmark = w.o, w.benchmark
    if o.predictions:
        records, source = benchmark.records(o.predictions), named(o.predictions)
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in o.predictions)).hexdigest()
        w.identity = {"model": o.predictions[0].stem, "predictions": digest, "protocol": w.protocol}
        predict.claim(w)
        w.records = _take(w, records, source)
        if not o.estimate:
            judgements.write_lines(w.file, w.records.values())
        return
    if o.sources:
        predict.plan(w)
        predict.claim(w)
        for warning in w.warnings:
            console.warn(warning)
        if o.stage in ("generate", "all"):
            w.asked = _chosen(w, benchmark.questions(o.questions, o.images, lambda q: benchmark.wanted(q, w.protocol)))
            return
    # What an earlier generate stage left in the eval dir.
    state = _state(w.out)
    if not isinstance(state.get("identity"), dict) or not w.file.is_file():
        raise DataError(f"{w.out} holds no predictions", hint="run --stage generate first, or give --predictions")
    w.identity, w.warnings = state["identity"] | {"protocol": w.protocol}, state.get("warnings") or []
    predict.claim(w)
    found = predict.read_predictions(w.file)
    n = (state.get("asked") or {}).get("n", 0)
    if len(found) < n:
        raise DataError(f"{w.file} holds {len(found)} of {n} answers", hint="run the generate stage to its end")
    w.records = _take(w, [(str(w.file), record) for record in found.values()], str(w.file))


def _state(out: Path) -> dict:
    """`eval.json`, {} when there is none."""
    return read_object(out / "eval.json") if (out / "eval.json").is_file() else {}


def _take(w: Work, records: list[tuple[str, dict]], source: str) -> dict[str, dict]:
    """The records of predictions, by question; the questions are `--questions`', else those that they carry."""
    o, benchmark = w.o, w.benchmark
    if o.questions:
        known = benchmark.questions(o.questions, None, lambda q: False)
    else:
        known = QuestionSet(unique([benchmark.from_record(r, where) for where, r in records], source), {}, source)
    w.asked = _chosen(w, known)
    found = benchmark.load_predictions(records, known.questions, source)
    missing = [q.id for q in w.asked.questions if q.id not in found]
    if missing and benchmark.has_key(records):
        what = f"{source}: {counted(len(missing), 'question has', 'questions have')} no prediction"
        raise DataError(what, details=missing[:5], hint="were the predictions made for another question set?")
    if missing:
        w.warnings.append(_part(source, len(found), len(known.questions)))
        w.asked = _chosen(w, known.only(lambda q: q.id in found))
    w.records = {
        q.id: {"id": q.id, **found[q.id], **{k: v for k, v in q.record().items() if v is not None}}
        for q in w.asked.questions
    }
    unanswered = sum(bool(r.get("unanswered")) for r in w.records.values())
    if unanswered and not o.count_unanswered_wrong:
        hint = "run the generate stage again, or --count-unanswered-wrong counts them as not right"
        raise DataError(f"{counted(unanswered, 'question')} of {source} have no answer", hint=hint)
    empty_replies(w, source)
    return w.records


def _chosen(w: Work, known: QuestionSet) -> QuestionSet:
    """The protocol's questions, the first `limit` of them."""
    asked = known.only(lambda q: w.benchmark.wanted(q, w.protocol), w.o.limit)
    if not asked.questions:
        raise DataError(f"{known.source} has no image questions, which protocol {w.protocol} is about")
    return asked


def _part(source: str, n: int, of: int) -> str:
    """The warning of a file without an answer key of its own, which says itself which questions it is about."""
    return f"{source} has {n} of the {of} questions: only those are scored"


def _stages(w: Work) -> dict:
    o, out, log = w.o, w.out, _Log(w)
    if w.records is None:
        asked: dict[str, Any] = {"source": w.asked.source, "images": o.images and str(o.images)}
        asked |= {"n": len(w.asked.questions), "sha256": w.asked.sha256}
        log.state |= {"contract": w.checkpoint.contract if w.checkpoint else {}, "asked": asked}
        log.save("generate")
        failed = log.state["failures"].get("generate", {})
        w.failed_before = {id_ for kind in failed.values() for id_ in kind.get("questions", [])}
        try:
            w.records = predict.generate(w)
        finally:
            log.state["runtime"] = w.runtime or log.state.get("runtime", {})
            log.save("generate", w.failures)
    if o.stage == "generate":
        return {"stage": "generate", "out": str(out), "n_questions": len(w.records)}

    empty_replies(w, str(w.file))
    found, unjudged, failures = _judge(w, w.records, log.state)
    if o.stage != "score":
        log.save("judge", failures)
    judged = judgements.judged(w.benchmark, w.asked.questions, found)
    records, verdict = w.records, w.benchmark.verdict
    kept = [{k: v for k, v in records[j.id].items() if k not in ("id", "key")} | verdict(j) for j in judged]
    text, file = dump_judged(kept), out / "judged.json"
    if not file.is_file() or file.read_text(encoding="utf-8") != text:  # scores of other verdicts go
        (out / "scores.json").unlink(missing_ok=True)
        write_text(file, text)
    lines = predict.failure_lines(failures)
    if unjudged and not o.allow_unjudged:
        what = f"{out}: {counted(len(unjudged), 'question is', 'questions are')} unjudged, so there is no score"
        hint = "the same command asks only for these again; --allow-unjudged counts them as not right"
        raise DataError(what, details=lines or unjudged[:5], hint=hint)
    for line in lines:
        console.warn(f"unjudged: {line}")
    if o.stage == "judge":
        return {"stage": "judge", "out": str(out), "n_questions": len(judged), "unjudged": len(unjudged)}

    settings = w.identity | log.state.get("runtime", {})
    settings |= {"judge": log.state["judge"], "questions": w.asked.source}
    doc = build(w, judged, settings, len(unjudged))
    doc |= {"times": log.state["times"], "out": str(out)}
    write_json(out / "scores.json", doc)
    return doc


class _Log:
    """`eval.json`: what was run how, and how long each stage took."""

    def __init__(self, w: Work):
        self.file = w.out / "eval.json"
        self.started = time.monotonic()
        self.state: dict[str, Any] = {"times": {}, "commands": {}, "failures": {}} | _state(w.out)
        self.state |= {
            "schema": 1,
            "benchmark": w.o.benchmark,
            "identity": w.identity,
            "warnings": w.warnings,
            "options": w.o.model_dump(mode="json"),
            "versions": contract.versions(),
            "git_commit": contract.git_commit(Path.cwd()),
        }

    def save(self, stage: str, failed: dict[str, dict] | None = None) -> None:
        """`failed`: the calls that failed for good, with an example of each kind; None: as before."""
        now, times, failures = time.monotonic(), self.state["times"], self.state["failures"]
        times[f"{stage}_s"] = round(times.get(f"{stage}_s", 0) + now - self.started, 3)
        self.state["commands"][stage] = sys.argv  # by stage: judging again must not hide how the replies were made
        if failed is not None:
            failures.pop(stage, None)
            failures |= {stage: failed} if failed else {}
        self.started = now
        write_json(self.file, self.state)


def _replies(w: Work, records: dict[str, dict]) -> Replies:
    return {
        id_: None if r.get("unanswered") else reading.judged_text(r["model_prediction"], _judge_input(w.o), w.o.reader)
        for id_, r in records.items()
    }


def _judge_input(o: EvalOptions) -> str:
    """VLMEvalKit's rule reads replies as they are, tags and all: else its figures could not be matched."""
    return "reply" if o.reader == "vlmevalkit" else o.judge_input


def _judge(w: Work, records: dict[str, dict], state: dict[str, Any]) -> tuple[Found, list[str], dict[str, dict]]:
    """Judge what has no verdict yet; `state["judge"]` is by whom. Returns judgements by question, ids of what is still
    unjudged, and kind -> {n, example} of the calls that failed for good."""
    o, file, asked = w.o, w.out / "judgements.jsonl", w.asked.questions
    if o.stage == "score":
        if not file.is_file() or not isinstance(state.get("judge"), dict):
            raise DataError(f"{w.out} holds no judgements", hint="run --stage judge first")
        found = judgements.read(file)
        return found, judgements.unjudged(w.benchmark, asked, found), {}
    replies = _replies(w, records)
    if o.judge == "rule":
        state["judge"] = {"kind": "rule", "judge_input": _judge_input(o), "reader": o.reader}
        return judgements.by_rule(w.benchmark, asked, replies, file), [], {}
    chat = _chat(o)
    # Written before the first call, so that a stage score after a kill knows whose verdicts these are.
    state["judge"] = {"kind": "chat", "model": o.judge_model, "base_url": o.judge_base_url}
    state["judge"] |= {"judge_input": o.judge_input, "prompt_sha256": content_key(chat.prompt)}
    write_json(w.out / "eval.json", state)
    found, failures = judge.by_chat(w.benchmark, asked, replies, file, chat)
    state["judge"]["answered_as"] = dict(Counter(j.judge for j in found.values() if j.code is not None))
    for name in ("calls", "cache_hits", "prompt_tokens", "completion_tokens"):  # those of earlier attempts included
        state["judge"][name] = sum(getattr(j, name) for j in found.values())
    state["judge"]["failed"] = {kind: f["n"] for kind, f in failures.items()}
    return found, judgements.unjudged(w.benchmark, asked, found), failures


def _chat(o: EvalOptions) -> judge.LabelJudge:
    endpoint = predict.endpoint_of(o, o.judge_base_url, o.judge_model, o.judge_api_key_env, what="judge")
    return judge.LabelJudge(endpoint, judge.load_prompt(o.judge_prompt))


def _estimate(w: Work) -> dict:
    """Calls and tokens by stage; nothing is asked and nothing is written."""
    found: dict[str, Any] = {"n_questions": len(w.asked.questions)}
    records = w.records
    if records is None:
        found["generate"] = predict.estimate(w)
        records = predict.read_predictions(w.file)
    if w.o.asks_judge:
        replies = {id_: text for id_, text in _replies(w, records).items() if text is not None}
        found["judge"] = judge.estimate(w.asked.questions, replies, w.out / "judgements.jsonl", _chat(w.o))
    return found


def _score_judged(w: Work, files: list[Path]) -> dict:
    """Score a file of verdicts; it is kept in the eval dir where one is asked for."""
    o, benchmark, path = w.o, w.benchmark, named(files)
    known = benchmark.questions(o.questions, None, lambda q: False).questions if o.questions else []
    judged, records = benchmark.load_judged(files, known)
    if known:
        ours, asked = [benchmark.judged(q, None) for q in known], {j.id for j in judged}
        if not benchmark.has_key(benchmark.records(files)):
            ours = [j for j in ours if j.id in asked]
        if len(ours) < len(known):
            w.warnings.append(_part(path, len(ours), len(known)))
        same_questions(ours, judged, path)
    judged, records = judged[: o.limit], records[: o.limit]
    unjudged = sum(j.code is None for j in judged)
    if unjudged and not o.allow_unjudged:
        what = f"{path}: {counted(unjudged, 'question is', 'questions are')} unjudged (verdict missing or null), "
        raise DataError(f"{what}so there is no score", hint="--allow-unjudged counts them as not right")
    w.asked = QuestionSet([benchmark.from_record(r, path) for r in records])
    w.records = {j.id: r for j, r in zip(judged, records)}
    w.identity = {"model": files[0].stem, "judged": content_key(records), "protocol": w.protocol}
    settings = {"model": files[0].stem, "judged": path, "judge": {"kind": "file"}}
    doc = build(w, judged, settings, unjudged)
    if o.out:
        doc["out"] = str(o.out)
        predict.claim(w)
        log = _Log(w)
        log.state |= {"template_hash": template_hash(), "judge": settings["judge"]}
        log.save("score")
        write_text(o.out / "judged.json", dump_judged(records))
        write_json(o.out / "scores.json", doc)
    return doc
