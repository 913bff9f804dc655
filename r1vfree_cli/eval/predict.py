"""The generate stage: questions to `predictions.jsonl`, resumable after a kill at any moment."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core import console, prompts
from ..core.errors import DataError, UsageError
from ..core.files import append_jsonl, read_json, read_jsonl, write_text
from ..run import checkpoint
from .benchmark import Benchmark, QuestionSet, content_key
from .endpoint import CallFailed, Endpoint, Reply
from .judgements import repair_tail
from .options import EvalOptions
from .remote import data_url, fitted, with_image


@dataclass
class Plan:
    """What will generate, and how. `identity` is everything that decides a reply, apart from the question.

    prompt: the instruction and system message that the model was trained with.
    runtime: where a local model ran (device, dtype), known once it is loaded.
    """

    identity: dict
    checkpoint: checkpoint.Checkpoint | None = None
    warnings: list[str] = field(default_factory=list)
    prompt: prompts.Prompt = prompts.DEFAULT
    runtime: dict = field(default_factory=dict)


def plan(o: EvalOptions) -> Plan:
    """Resolve the model and the settings: the run contract's pixel limits unless others are asked for.

    Raises:
        DataError: the checkpoint is no model. UsageError: min_pixels above max_pixels.
    """
    warnings: list[str] = []
    found = checkpoint.resolve(o.checkpoint, o.seed) if o.checkpoint else None
    if o.base and (found is None or found.kind not in ("adapter", "hub")):
        raise UsageError("--base is the base model of a LoRA folder, and no LoRA folder is given")
    contract = found.contract if found else {}
    pixels = {}
    for key, asked, default in (
        ("min_pixels", o.min_pixels, checkpoint.MIN_PIXELS),
        ("max_pixels", o.max_pixels, checkpoint.MAX_PIXELS),
    ):
        trained = contract.get(key)
        pixels[key] = asked if asked is not None else trained if trained is not None else default
        if asked is not None and trained is not None and asked != trained:
            warnings.append(f"{key} is {asked} as asked; the model was trained with {trained}")
    if pixels["min_pixels"] > pixels["max_pixels"]:
        raise UsageError(f"min_pixels ({pixels['min_pixels']}) is above max_pixels ({pixels['max_pixels']})")
    prompt = prompts.Prompt(**contract.get("prompt") or {})
    trained_hash = contract.get("template_hash")
    if trained_hash and trained_hash != prompts.template_hash(prompt):
        warnings.append("the model was trained with another prompt template than this version of r1v asks with")
    identity = {
        "model": o.checkpoint or o.model,
        "endpoint": o.endpoint,
        "base": o.base,
        "revision": o.revision,
        "fingerprint": found.fingerprint if found else None,
        "template_hash": prompts.template_hash(prompt),
        **pixels,
        "max_new_tokens": o.max_new_tokens,
        "temperature": o.temperature,
        "seed": o.seed if o.temperature else None,
    }
    return Plan(identity, found, warnings, prompt)


def read_predictions(path: Path) -> dict[str, dict]:
    """Question id -> its record in `predictions.jsonl`.

    Raises:
        DataError: the file holds something else.
    """
    found = {}
    for number, record in read_jsonl(path) if path.is_file() else ():
        if not (isinstance(record, dict) and isinstance(record.get("id"), str) and "model_prediction" in record):
            raise DataError(f"{path}, line {number}: no prediction")
        found[record["id"]] = record
    return found


def write_predictions(path: Path, records: dict[str, dict]) -> None:
    """Replace `predictions.jsonl`."""
    write_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records.values()))


@dataclass(frozen=True)
class Task:
    """One question as it is asked: the conversation, its figure, and the content key of the reply."""

    question: Any
    messages: list[dict]
    image: bytes | None
    key: str


def tasks(benchmark: Benchmark, planned: Plan, questions: QuestionSet) -> Iterator[Task]:
    """All questions as they are asked."""
    for q in questions.questions:
        messages, image = benchmark.messages(q, planned.prompt), questions.image(q)
        key = content_key(planned.identity, messages, hashlib.sha256(image).hexdigest() if image else None)
        yield Task(q, messages, image, key)


def generate(
    o: EvalOptions, benchmark: Benchmark, planned: Plan, questions: QuestionSet, path: Path
) -> dict[str, dict]:
    """Answer what is not in `path` yet; each answer is on disk as soon as its batch or call is finished.

    Returns question id -> record: the question's, plus id, key, finish, token counts, `cause` of an empty reply, and
    `unanswered` (why) where there is none; such a question is asked again the next time.

    Raises:
        UsageError: `path` holds answers made with other settings; or the endpoint is down.
        DataError: some calls failed for good; the rest is kept, and a rerun asks only for these.
    """
    repair_tail(path)
    before = read_predictions(path)
    asked = {t.question.id: t for t in tasks(benchmark, planned, questions)}
    stale = [id_ for id_, record in before.items() if id_ in asked and record.get("key") != asked[id_].key]
    if stale:
        raise UsageError(
            f"{path} holds answers of another model, other figures or other settings",
            details=stale[:3],
            hint="choose another --out, or delete the file",
        )
    found = {id_: record for id_, record in before.items() if id_ in asked and not record.get("unanswered")}
    todo = [t for t in asked.values() if t.question.id not in found]
    if found and todo:
        console.log(f"{len(found)} answers are there already, {len(todo)} to go")

    def keep(t: Task, text: str, **more: Any) -> None:
        found[t.question.id] = {
            "id": t.question.id,
            "key": t.key,
            **t.question.record(),
            "model_prediction": text,
            **more,
        }
        append_jsonl(path, found[t.question.id])

    if todo and o.endpoint:
        _remote(o, planned, todo, keep)
    elif todo:
        _local(o, planned, todo, keep)
    if asked and all(found[id_].get("unanswered") for id_ in asked):
        raise DataError(f"none of {len(asked)} questions got an answer from {o.endpoint}")
    return {id_: found[id_] for id_ in asked}


def _local(o: EvalOptions, planned: Plan, todo: list[Task], keep: Callable[..., None]) -> None:
    assert planned.checkpoint is not None
    # Libraries print on import and while loading; stdout is for the result.
    with contextlib.redirect_stdout(sys.stderr):
        from .generate import Answer, Generator, Job

        generator = Generator(
            planned.checkpoint.path,
            base=o.base,
            revision=o.revision,
            min_pixels=planned.identity["min_pixels"],
            max_pixels=planned.identity["max_pixels"],
            max_new_tokens=o.max_new_tokens,
            temperature=o.temperature,
            device=o.device,
            dtype=o.dtype,
            seed=o.seed,
        )
        planned.runtime = {
            "device": str(generator.device),
            "dtype": generator.dtype,
            "figures_encoded_once": generator.reuse,
        }
        by_id = {t.question.id: t for t in todo}

        def done(job: Job, a: Answer) -> None:
            cause = None if a.text.strip() else "empty"
            counts = {"prompt_tokens": a.prompt_tokens, "completion_tokens": a.completion_tokens}
            keep(by_id[job.id], a.text, finish=a.finish, cause=cause, **counts)

        generator.run([Job(t.question.id, t.messages, t.image) for t in todo], o.batch_size, done)


def _remote(o: EvalOptions, planned: Plan, todo: list[Task], keep: Callable[..., None]) -> None:
    endpoint = Endpoint(o.endpoint, o.model or "", o.timeout_s, o.max_retries, o.concurrency, o.api_key_env)
    limits = planned.identity["min_pixels"], planned.identity["max_pixels"]
    left = {t.question.id: t for t in todo}
    why: dict[str, str] = {}
    with console.progress("generate", len(todo)) as bar:

        async def work(t: Task) -> Reply:
            url = data_url(t.image, *limits) if t.image else None
            try:
                return await endpoint.ask(with_image(t.messages, url), o.max_new_tokens, o.temperature)
            except CallFailed as e:
                why[t.question.id] = e.kind
                raise

        def done(t: Task, r: Reply) -> None:
            cause = getattr(r, "cause", None) or (None if r.text.strip() else "empty")
            counts = {"prompt_tokens": r.prompt_tokens, "completion_tokens": r.completion_tokens}
            keep(t, r.text, finish=r.finish, cause=cause, **counts)
            left.pop(t.question.id)
            bar.advance()

        failed = endpoint.run(todo, work, done)
    if failed and not o.count_unanswered_wrong:
        raise DataError(
            f"{len(left)} of {len(todo)} questions got no answer from {o.endpoint}",
            details=[f"{count} x {kind}" for kind, count in failed.items()],
            hint="the others are kept; the same command asks only for these again, and "
            "--count-unanswered-wrong counts them as not right",
        )
    for id_, t in left.items():
        keep(t, "", unanswered=why[id_])


def estimate(benchmark: Benchmark, planned: Plan, questions: QuestionSet, path: Path) -> dict:
    """Questions that `generate` would answer now, and about how many tokens (4 characters of text each)."""
    import io

    from PIL import Image

    done = read_predictions(path)
    text = images = calls = 0
    for t in tasks(benchmark, planned, questions):
        if t.question.id in done and not done[t.question.id].get("unanswered"):
            continue
        calls += 1
        text += sum(len(part.get("text", "")) for m in t.messages for part in m["content"]) // 4
        if t.image:
            with Image.open(io.BytesIO(t.image)) as opened:
                width, height = fitted(*opened.size, planned.identity["min_pixels"], planned.identity["max_pixels"])
            images += width * height // 784
    return {
        "calls": calls,
        "prompt_tokens": text + images,
        "image_tokens": images,
        "completion_tokens_at_most": calls * planned.identity["max_new_tokens"],
    }


def identity_of_file(path: Path) -> dict:
    """The identity of predictions made elsewhere: their content."""
    try:
        return {"model": path.stem, "predictions": hashlib.sha256(path.read_bytes()).hexdigest()}
    except OSError as e:
        raise DataError(f"cannot read {path}: {e}") from None


def claim(out: Path, identity: dict) -> None:
    """Make sure that `out` holds nothing of another model or other settings.

    Raises:
        UsageError: it does; the differing settings are named.
    """
    file = out / "eval.json"
    # An attempt that failed before its first answer leaves nothing worth guarding.
    if not file.is_file() or not any((out / name).is_file() for name in ("predictions.jsonl", "judged.json")):
        return
    document = read_json(file)
    before = document.get("identity") if isinstance(document, dict) else None
    if not isinstance(before, dict) or before == identity:
        return
    differing = [
        f"{key}: {before.get(key)!r} there, {identity.get(key)!r} now"
        for key in {**before, **identity}
        if before.get(key) != identity.get(key)
    ]
    raise UsageError(
        f"{out} holds an evaluation of another model or with other settings",
        details=differing,
        hint=f"choose another --out, or delete that folder; --predictions {out / 'predictions.jsonl'} reuses its answers",
    )
