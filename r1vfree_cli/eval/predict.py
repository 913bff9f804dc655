"""The generate stage: questions to `predictions.jsonl`, resumable after a kill at any moment."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from ..core import console, prompts
from ..core.errors import DataError, UsageError
from ..core.files import append_jsonl, read_json, read_jsonl, write_text
from ..run import checkpoint
from .endpoint import Endpoint, Reply
from .hallusion.judge import content_key, repair_tail
from .hallusion.questions import Question, QuestionSet
from .options import EvalOptions
from .remote import Remote, fitted


@dataclass
class Plan:
    """What will generate, and how. `identity` is everything that decides a reply, apart from the question.

    runtime: where a local model ran (device, dtype), known once it is loaded.
    """

    identity: dict
    checkpoint: checkpoint.Checkpoint | None = None
    warnings: list[str] = field(default_factory=list)
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
    trained_hash = contract.get("template_hash")
    if trained_hash and trained_hash != prompts.template_hash():
        warnings.append("the model was trained with another prompt template than this version of r1v asks with")
    identity = {
        "model": o.checkpoint or o.model,
        "endpoint": o.endpoint,
        "base": o.base,
        "revision": o.revision,
        "fingerprint": found.fingerprint if found else None,
        "template_hash": prompts.template_hash(),
        **pixels,
        "max_new_tokens": o.max_new_tokens,
        "temperature": o.temperature,
        "seed": o.seed if o.temperature else None,
    }
    return Plan(identity, found, warnings)


def question_key(identity: dict, question: Question, image: bytes | None) -> str:
    """Content key of one reply."""
    return content_key(identity, question.text, hashlib.sha256(image).hexdigest() if image else None)


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


def generate(o: EvalOptions, planned: Plan, questions: QuestionSet, path: Path) -> dict[str, dict]:
    """Answer what is not in `path` yet; each answer is on disk as soon as its batch or call is finished.

    Returns question id -> record, the official result format plus id, key, finish and token counts.

    Raises:
        UsageError: `path` holds answers made with other settings; or the endpoint is down.
        DataError: some calls failed for good; the rest is kept, and a rerun asks only for these.
    """
    repair_tail(path)
    before = read_predictions(path)
    keys = {q.id: question_key(planned.identity, q, questions.image(q)) for q in questions.questions}
    stale = [id_ for id_, record in before.items() if id_ in keys and record.get("key") != keys[id_]]
    if stale:
        raise UsageError(
            f"{path} holds answers of another model, other figures or other settings",
            details=stale[:3],
            hint="choose another --out, or delete the file",
        )
    found = {id_: record for id_, record in before.items() if id_ in keys}
    todo = [q for q in questions.questions if q.id not in found]
    if found and todo:
        console.log(f"{len(found)} answers are there already, {len(todo)} to go")

    def keep(q: Question, text: str, finish: str | None, prompt_tokens: int, completion_tokens: int) -> None:
        found[q.id] = {
            "id": q.id,
            "key": keys[q.id],
            **q.record(),
            "model_prediction": text,
            "finish": finish,
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
        }
        append_jsonl(path, found[q.id])

    if todo and o.endpoint:
        _remote(o, planned, questions, todo, keep)
    elif todo:
        _local(o, planned, questions, todo, keep)
    return {q.id: found[q.id] for q in questions.questions}


def _local(o: EvalOptions, planned: Plan, questions: QuestionSet, todo: list[Question], keep) -> None:
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
            seed=o.seed,
        )
        planned.runtime = {
            "device": str(generator.device),
            "dtype": generator.dtype,
            "figures_encoded_once": generator.reuse,
        }
        by_id = {q.id: q for q in todo}

        def done(job: Job, answer: Answer) -> None:
            keep(by_id[job.id], answer.text, answer.finish, answer.prompt_tokens, answer.completion_tokens)

        generator.run([Job(q.id, q.text, questions.image(q)) for q in todo], o.batch_size, done)


def _remote(o: EvalOptions, planned: Plan, questions: QuestionSet, todo: list[Question], keep) -> None:
    remote = Remote(
        Endpoint(o.endpoint, o.model or "", o.timeout_s, o.max_retries, o.concurrency, o.api_key_env),
        planned.identity["min_pixels"],
        planned.identity["max_pixels"],
        o.max_new_tokens,
        o.temperature,
    )
    with console.progress("generate", len(todo)) as bar:

        def done(question: Question, reply: Reply) -> None:
            keep(question, reply.text, reply.finish, reply.prompt_tokens, reply.completion_tokens)
            bar.advance()

        failed = remote.run(todo, questions.image, done)
    if failed:
        raise DataError(
            f"{sum(failed.values())} of {len(todo)} questions got no answer from {o.endpoint}",
            details=[f"{count} x {kind}" for kind, count in failed.items()],
            hint="the others are kept; the same command asks only for these again",
        )


def estimate(planned: Plan, questions: QuestionSet, path: Path) -> dict:
    """Questions that `generate` would answer now, and about how many tokens (4 characters of text each)."""
    import io

    from PIL import Image

    done = read_predictions(path)
    text = images = calls = 0
    for q in questions.questions:
        if q.id in done:
            continue
        calls += 1
        text += len(prompts.user_text(q.text)) // 4
        if image := questions.image(q):
            with Image.open(io.BytesIO(image)) as opened:
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
