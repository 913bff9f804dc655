"""`r1v eval-hallusion`: generate, judge, score. Stages exchange files in the eval dir, so each can be run alone.

The eval dir: `eval.json` (what and how), `predictions.jsonl`, `judgements.jsonl`, `judged.json` (the official result
format), `scores.json` (what `--json` prints).
"""

from __future__ import annotations

import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from ..core import console
from ..core.errors import DataError
from ..core.files import read_json, write_json, write_text
from ..core.prompts import template_hash
from ..run import contract
from . import predict, reading
from .endpoint import Endpoint
from .hallusion import judge, questions, score
from .hallusion.judge import Outcome
from .hallusion.questions import Question, QuestionSet
from .hallusion.result import Other, build, dump_judged, load_other, same_questions
from .options import EvalOptions, check, check_gates
from .show import print_scores

__all__ = ["EvalOptions", "check_gates", "evaluate", "print_scores"]


def evaluate(o: EvalOptions) -> dict:
    """Run the asked stages; returns what `--json` prints: scores, or for a stage alone what it made.

    Call `check_gates(doc, o.fail_under)` after printing.

    Raises:
        UsageError: wrong options, an endpoint that is down, an eval dir of something else.
        DataError: bad questions, figures, predictions or checkpoint; unjudged questions without `allow_unjudged`.
    """
    check(o)
    other = load_other(o.compare_to, o.protocol) if o.compare_to else None
    if o.judged:
        return _score_judged(o, o.judged, other)
    out = o.out or _default_out(o)
    chat = _chat(o) if o.asks_judge else None
    if chat and not o.estimate:
        chat.endpoint.check()
    planned, asked, records = _open(o, out)
    if chat:
        judge.check_references(asked.questions)  # known before anything is generated
    if other:
        same_questions([q.item for q in asked.questions], other)
    if o.estimate:
        return {"estimate": _estimate(o, out, planned, asked, records)}
    return _stages(o, out, planned, asked, records, other)


def _stages(
    o: EvalOptions,
    out: Path,
    planned: predict.Plan,
    asked: QuestionSet,
    records: dict[str, dict] | None,
    other: Other | None,
) -> dict:
    state = _state(out) | {
        "schema": 1,
        "identity": planned.identity,
        "versions": contract.versions(),
        "git_commit": contract.git_commit(Path.cwd()),
    }
    times, commands = state.setdefault("times", {}), state.setdefault("commands", {})
    started = time.monotonic()

    def save(stage: str) -> None:
        nonlocal started
        times[f"{stage}_s"] = round(times.get(f"{stage}_s", 0) + time.monotonic() - started, 3)
        commands[stage] = sys.argv  # by stage: judging again must not hide how the replies were made
        started = time.monotonic()
        write_json(out / "eval.json", state)

    if records is None:
        state |= {
            "contract": planned.checkpoint.contract if planned.checkpoint else {},
            "warnings": planned.warnings,
            "asked": {
                "source": asked.source,
                "images": str(o.images) if o.images else None,
                "n": len(asked.questions),
                "sha256": asked.sha256,
            },
        }
        save("generate")
        records = predict.generate(o, planned, asked, out / "predictions.jsonl")
        state["runtime"] = planned.runtime or state.get("runtime", {})
        save("generate")
    if o.stage == "generate":
        return {"stage": "generate", "out": str(out), "n_questions": len(records)}

    outcome = _judge(o, out, asked.questions, records, state)
    if o.stage != "score":
        save("judge")
    items = outcome.items(asked.questions)
    official = [
        {k: v for k, v in records[i.id].items() if k not in ("id", "key")}
        | {score.CODE: None if i.code is None else str(i.code), score.SAME: None if i.same is None else str(i.same)}
        for i in items
    ]
    text = dump_judged(official)
    if not (out / "judged.json").is_file() or (out / "judged.json").read_text(encoding="utf-8") != text:
        (out / "scores.json").unlink(missing_ok=True)  # of other verdicts
        write_text(out / "judged.json", text)
    if outcome.unjudged and not o.allow_unjudged:
        raise DataError(
            f"{out}: {len(outcome.unjudged)} questions are unjudged, so there is no score",
            details=[f"{n} calls failed: {kind}" for kind, n in outcome.failed.items()] or outcome.unjudged[:5],
            hint="the same command asks only for these again; --allow-unjudged counts them as not right",
        )
    if o.stage == "judge":
        return {"stage": "judge", "out": str(out), "n_questions": len(items), "unjudged": len(outcome.unjudged)}

    settings = {**planned.identity, **state.get("runtime", {}), "judge": state["judge"], "questions": asked.source}
    doc = build(o, items, records, settings, other, list(state.get("warnings") or []), len(outcome.unjudged))
    doc["times"] = times
    doc["out"] = str(out)
    write_json(out / "scores.json", doc)
    return doc


# --- what to work on -------------------------------------------------------------------------------------------


def _state(out: Path) -> dict:
    """`eval.json`, {} when there is none."""
    file = out / "eval.json"
    found = read_json(file) if file.is_file() else {}
    if not isinstance(found, dict):
        raise DataError(f"{file} is damaged: it holds no object")
    return found


def _open(o: EvalOptions, out: Path) -> tuple[predict.Plan, QuestionSet, dict[str, dict] | None]:
    """(plan, questions, records); records are None when they have to be generated."""
    file = out / "predictions.jsonl"
    if o.predictions:
        planned = predict.Plan(predict.identity_of_file(o.predictions) | {"protocol": o.protocol})
        predict.claim(out, planned.identity)
        known = _given(o) or questions.from_records(o.predictions)
        asked = _chosen(o, known)
        found = questions.load_predictions(o.predictions, known.questions, asked.questions)
        records = {q.id: {"id": q.id, **q.record(), **found[q.id]} for q in asked.questions}
        if not o.estimate:
            predict.write_predictions(file, records)
        return planned, asked, records
    if not o.sources:
        return _go_on(o, out, file)
    planned = predict.plan(o)
    planned.identity["protocol"] = o.protocol
    predict.claim(out, planned.identity)
    for warning in planned.warnings:
        console.warn(warning)
    if o.stage in ("judge", "score"):
        return _go_on(o, out, file)
    return planned, _chosen(o, questions.load(o.questions, o.images, needed=lambda q: _wanted(o, q))), None


def _go_on(o: EvalOptions, out: Path, file: Path) -> tuple[predict.Plan, QuestionSet, dict[str, dict]]:
    """What an earlier generate stage left in the eval dir."""
    state = _state(out)
    if not isinstance(state.get("identity"), dict) or not file.is_file():
        raise DataError(f"{out} holds no predictions", hint="run --stage generate first, or give --predictions")
    planned = predict.Plan(state["identity"])
    if planned.identity.get("protocol") != o.protocol:
        predict.claim(out, planned.identity | {"protocol": o.protocol})
    found = predict.read_predictions(file)
    if len(found) < (state.get("asked") or {}).get("n", 0):
        raise DataError(
            f"{file} holds {len(found)} of {state['asked']['n']} answers", hint="run the generate stage to its end"
        )
    known = _given(o) or questions.from_records(file)
    asked = _chosen(o, known)
    return planned, asked, questions.load_predictions(file, known.questions, asked.questions)


def _given(o: EvalOptions) -> QuestionSet | None:
    return questions.load(o.questions, needed=lambda q: False) if o.questions else None


def _wanted(o: EvalOptions, question: Question) -> bool:
    return o.protocol == "official" or question.needs_image


def _chosen(o: EvalOptions, known: QuestionSet) -> QuestionSet:
    """The protocol's questions, the first `limit` of them."""
    asked = known.only(lambda q: _wanted(o, q))
    if not asked.questions:
        raise DataError(f"{known.source} has no image questions, which protocol {o.protocol} is about")
    asked.questions = asked.questions[: o.limit]
    return asked


def _default_out(o: EvalOptions) -> Path:
    name = str(o.checkpoint or o.model or o.predictions)
    parts = [p for p in re.split(r"[^\w.-]+", name) if p.strip(".")]
    suffix = "" if o.protocol == "official" else f"-{o.protocol}"
    return Path("evals", "-".join(parts[-2:]) + suffix)


# --- judging ---------------------------------------------------------------------------------------------------


def _judge(
    o: EvalOptions, out: Path, asked: list[Question], records: dict[str, dict], state: dict[str, Any]
) -> Outcome:
    """Judge what is not judged yet; `state["judge"]` says by whom."""
    file = out / "judgements.jsonl"
    if o.stage == "score":
        if not file.is_file() or not isinstance(state.get("judge"), dict):
            raise DataError(f"{out} holds no judgements", hint="run --stage judge first")
        return judge.as_judged(asked, judge.read_judgements(file))
    replies = {q.id: reading.judged_text(records[q.id]["model_prediction"], o.judge_input) for q in asked}
    if o.judge == "rule":
        outcome = judge.by_rule(asked, replies, file)
        state["judge"] = {"kind": "rule", "judge_input": o.judge_input}
        return outcome
    chat = _chat(o)
    # Said before the first call, so that a stage score after a kill knows whose verdicts these are.
    state["judge"] = {
        "kind": "chat",
        "model": o.judge_model,
        "base_url": o.judge_base_url,
        "judge_input": o.judge_input,
        "prompt_sha256": judge.content_key(chat.prompt),
    }
    write_json(out / "eval.json", state)
    outcome = judge.by_chat(asked, replies, file, chat)
    answered = Counter(j.judge for j in outcome.judgements.values() if j.code is not None)
    state["judge"] |= {"answered_as": dict(answered), **outcome.cost()}
    return outcome


def _chat(o: EvalOptions) -> judge.ChatJudge:
    endpoint = Endpoint(o.judge_base_url, o.judge_model or "", o.timeout_s, o.max_retries, o.concurrency, o.api_key_env)
    return judge.ChatJudge(endpoint, judge.load_prompt(o.judge_prompt))


def _estimate(
    o: EvalOptions, out: Path, planned: predict.Plan, asked: QuestionSet, records: dict[str, dict] | None
) -> dict:
    """Calls and tokens by stage; nothing is asked and nothing is written."""
    found: dict[str, Any] = {"n_questions": len(asked.questions)}
    if records is None:
        found["generate"] = predict.estimate(planned, asked, out / "predictions.jsonl")
        records = predict.read_predictions(out / "predictions.jsonl")
    if o.judge == "chat" and o.stage != "generate":
        replies = {id_: reading.judged_text(r["model_prediction"], o.judge_input) for id_, r in records.items()}
        found["judge"] = judge.estimate(asked.questions, replies, out / "judgements.jsonl", _chat(o))
    return found


# --- a file judged elsewhere -----------------------------------------------------------------------------------


def _score_judged(o: EvalOptions, path: Path, other: Other | None) -> dict:
    items, records = questions.load_judged(path)
    if o.questions:
        known = {q.id: q.item for q in questions.load(o.questions, needed=lambda q: False).questions}
        wrong = [i.id for i in items if i.id not in known or (known[i.id].gt, known[i.id].visual_input) != (i.gt, i.visual_input)]  # fmt: skip
        missing = known.keys() - {i.id for i in items}
        if wrong or missing:
            raise DataError(
                f"{path} is about another question set: {len(wrong)} questions unknown or different, "
                f"{len(missing)} missing",
                details=[*wrong[:3], *sorted(missing)[:3]],
            )
    if o.limit:
        items = items[: o.limit]
    unjudged = sum(i.code is None for i in items)
    if unjudged and not o.allow_unjudged:
        raise DataError(
            f"{path}: {unjudged} questions are unjudged ({score.CODE} missing or null), so there is no score",
            hint="--allow-unjudged counts them as not right",
        )
    by_id = {i.id: r for i, r in zip(items, records)}
    settings = {"model": path.stem, "judged": str(path), "judge": {"kind": "file"}}
    doc = build(o, items, by_id, settings, other, [], unjudged)
    if o.out:
        doc["out"] = str(o.out)
        identity = {"model": path.stem, "judged": judge.content_key(records), "protocol": o.protocol}
        predict.claim(o.out, identity)
        write_json(
            o.out / "eval.json",
            _state(o.out)
            | {"schema": 1, "identity": identity, "commands": {"score": sys.argv}, "template_hash": template_hash()}
            | {"judge": settings["judge"], "versions": contract.versions()},
        )
        write_text(o.out / "judged.json", dump_judged(records))
        write_json(o.out / "scores.json", doc)
    return doc
