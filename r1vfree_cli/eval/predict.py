"""The generate stage: questions to `predictions.jsonl`, resumable after a kill at any moment."""

import contextlib
import hashlib
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ..config.recipes import differences
from ..config.schema import FEWEST_PIXELS, MAX_PIXELS, MIN_PIXELS
from ..core import console, prompts
from ..core.errors import DataError, Interrupted, UsageError, counted
from ..core.files import append_jsonl, read_object, repair_tail
from ..core.process import gpu_count
from ..judges.client import Endpoint
from ..judges.protocol import JPEG_QUALITY, Failure
from ..judges.replies import Reply
from ..launch import plan as plans
from ..launch import processes, vllm
from ..models import family
from ..run.checkpoint import Checkpoint, merge_command, resolve
from .benchmark import Benchmark, content_key
from .judgements import by_id, write_lines
from .options import EvalOptions
from .questions import Job, QuestionSet
from .remote import data_url, fitted, is_settled, size_of, with_image


@dataclass
class Work:
    """One evaluation under way.

    identity: everything that decides a reply, apart from the question. prompt: what the model was trained with.
    records: question id -> reply; None when they have to be generated.
    runtime: where a local model ran (device, dtype); how images went to an endpoint.
    failures: kind -> {n, example, questions} of the calls that failed for good; failed_before: those of the last run.
    other: the result to compare with: its judged questions, and the settings of who judged it.
    """

    o: EvalOptions
    benchmark: Benchmark
    protocol: str
    out: Path
    identity: dict = field(default_factory=dict)
    checkpoint: Checkpoint | None = None
    prompt: prompts.Prompt = prompts.DEFAULT
    warnings: list[str] = field(default_factory=list)
    asked: QuestionSet = field(default_factory=lambda: QuestionSet([]))
    records: dict[str, dict] | None = None
    runtime: dict = field(default_factory=dict)
    failures: dict[str, dict] = field(default_factory=dict)
    failed_before: set[str] = field(default_factory=set)
    other: tuple[list[Any], Any] | None = None

    @property
    def file(self) -> Path:
        return self.out / "predictions.jsonl"

    @property
    def pixels(self) -> tuple[int, int]:
        return self.identity["min_pixels"], self.identity["max_pixels"]


def plan(w: Work) -> None:
    """Resolve the model and the settings: the run contract's pixel limits unless others are asked for. Raises
    DataError: the checkpoint is no model. UsageError: min_pixels above max_pixels, or what the model cannot have."""
    o = w.o
    w.checkpoint = found = resolve(o.checkpoint, o.seed) if o.checkpoint else None
    if o.base and (found is None or found.kind not in ("adapter", "hub")):
        raise UsageError("--base is the base model of a LoRA folder, and no LoRA folder is given")
    contract = found.contract if found else {}
    pixels = {}
    for key, default in {"min_pixels": MIN_PIXELS, "max_pixels": MAX_PIXELS}.items():
        asked, trained = getattr(o, key), contract.get(key)
        pixels[key] = asked or trained or default
        if asked and trained and asked != trained:
            w.warnings.append(f"{key} is {asked} as asked; the model was trained with {trained}")
    if pixels["min_pixels"] > pixels["max_pixels"]:
        raise UsageError(f"min_pixels ({pixels['min_pixels']}) is above max_pixels ({pixels['max_pixels']})")
    w.prompt = prompts.Prompt(**contract.get("prompt") or {})
    template = prompts.template_hash(w.prompt)
    if (contract.get("template_hash") or template) != template:
        w.warnings.append("the model was trained with another prompt template than this version of r1v asks with")
    w.identity = {
        "model": o.checkpoint or o.model,
        "endpoint": o.endpoint,
        "base": o.base,
        "revision": o.revision,
        "fingerprint": found.fingerprint if found else None,
        "template_hash": template,
        **pixels,
        "max_new_tokens": o.max_new_tokens,
        "temperature": o.temperature,
        "seed": o.seed if o.temperature else None,
        **({"engine": "vllm"} if o.vllm else {}),
        "protocol": w.protocol,
    }
    if o.vllm and found:
        vllm.executable()  # before anything is written
        if found.kind == "adapter":
            what = f"--vllm serves complete models only, and {o.checkpoint} is a LoRA adapter"
            raise UsageError(what, hint=f"first: {merge_command(found.path)}")
        config = Path(found.path, "config.json")
        if config.is_file() and not family.of_type(str(read_object(config).get("model_type"))).edges:
            what = f"vLLM is told the pixel limits of Qwen-VL models alone, and {o.checkpoint} is none"
            raise UsageError(what, hint="leave out --vllm, or serve it yourself and give --endpoint")


class Prediction(BaseModel, strict=True, extra="allow"):
    """A line of `predictions.jsonl`, beside the question's own fields; of earlier releases without a key."""

    id: str
    model_prediction: str
    key: str | None = None
    finish: str | None = None
    cause: str | None = None
    unanswered: str | None = None


def read_predictions(path: Path) -> dict[str, dict]:
    return {id_: p.model_dump(exclude_unset=True) for id_, p in by_id(path, Prediction, "prediction").items()}


def jobs(w: Work) -> Iterator[Job]:
    for q in w.asked.questions:
        messages, image = w.benchmark.messages(q, w.prompt), w.asked.image(q)
        key = content_key(w.identity, messages, hashlib.sha256(image).hexdigest() if image else None)
        yield Job(q.id, messages, image, key, q.record())


def generate(w: Work) -> dict[str, dict]:
    """Answer what is not in `w.file` yet; each answer is on disk as soon as its batch or call is finished.

    Returns question id -> record: the question's, plus id, key, finish, token counts, `cause` of an empty reply, and
    `unanswered` (why) where there is none; such a question is asked again the next time.

    Raises UsageError: the file holds answers made with other settings; or the endpoint is down. DataError: some calls
    failed for good; the rest is kept, and a rerun asks only for these.
    """
    path = w.file
    repair_tail(path)
    before = read_predictions(path)
    asked = {job.id: job for job in jobs(w)}
    found = {id_: record for id_, record in before.items() if id_ in asked and not record.get("unanswered")}
    stale = [id_ for id_, record in found.items() if record.get("key") != asked[id_].key]
    if stale:
        what = f"{path} holds answers of another model, other figures or other settings"
        raise UsageError(what, details=stale[:3], hint="choose another --out, or delete the file")
    asked_again = len(before) > len(found)
    todo = [job for id_, job in asked.items() if id_ not in found]
    if found and todo:
        console.log(f"{counted(len(found), 'answer is', 'answers are')} there already, {len(todo)} to go")

    def keep(job: Job, reply: Reply | None, **more: Any) -> None:
        if reply is not None:
            more = {name: getattr(reply, name) for name in ("finish", "cause", "prompt_tokens", "completion_tokens")}
        text = reply.text if reply else ""
        found[job.id] = {"id": job.id, "key": job.key, **job.record, "model_prediction": text, **more}
        append_jsonl(path, found[job.id])

    try:
        if todo and w.o.vllm:
            _vllm(w, todo, keep)
        elif todo and w.o.endpoint:
            _remote(w, endpoint_of(w.o, w.o.endpoint, w.o.model, w.o.api_key_env), todo, keep)
        elif todo:
            _local(w, todo, keep)
    except KeyboardInterrupt:
        told = f"interrupted: {len(found)} of {len(asked)} questions have their answer in {path}"
        raise Interrupted(told, hint="the same command asks the rest") from None
    if asked and all(found[id_].get("unanswered") for id_ in asked):
        raise DataError(f"none of {len(asked)} questions got an answer from {w.o.endpoint or 'vLLM'}")
    answers = {id_: found[id_] for id_ in asked}
    if asked_again:  # one line a question is left
        write_lines(path, (before | answers).values())
    return answers


def _local(w: Work, todo: list[Job], keep: Callable[..., None]) -> None:
    assert w.checkpoint is not None
    # Libraries print on import and while loading; stdout is for the result.
    with contextlib.redirect_stdout(sys.stderr):
        from .generate import Generator

        asked = ("base", "revision", "max_new_tokens", "temperature", "device", "dtype", "seed")
        generator = Generator(
            w.checkpoint.path,
            family=w.o.family or w.checkpoint.contract.get("family"),
            min_pixels=w.pixels[0],
            max_pixels=w.pixels[1],
            **{name: getattr(w.o, name) for name in asked},
        )
        w.runtime = {"device": str(generator.device), "dtype": generator.dtype, "figures_encoded_once": generator.reuse}
        generator.run(todo, w.o.batch_size, keep)


def _vllm(w: Work, todo: list[Job], keep: Callable[..., None]) -> None:
    """Answer through a vLLM server of the checkpoint at the run contract's pixel limits, which it applies itself."""
    assert w.checkpoint is not None
    w.out.mkdir(parents=True, exist_ok=True)
    o, port, log = w.o, plans.free_port(), w.out / "vllm-server.log"
    on_cpu = o.device == "cpu" or gpu_count() == 0
    started = plans.vllm_policy_plan(w.checkpoint.path, o.revision, port, pixels=w.pixels, on_cpu=on_cpu, dtype=o.dtype)
    console.log(f"starting vLLM, its log in {log}")
    with processes.server(started, port, log, "vLLM server") as server:
        _remote(w, endpoint_of(o, f"{server.url}/v1", vllm.POLICY, "R1V_NO_KEY"), todo, keep, server)
    w.runtime |= {"engine": "vllm", "dtype": started.argv[started.argv.index("--dtype") + 1]}


def endpoint_of(o: EvalOptions, url: str | None, model: str | None, key_env: str, **more: Any) -> Endpoint:
    return Endpoint(url, model or "", o.timeout_s, o.max_retries, o.concurrency, key_env, **more)


def _remote(
    w: Work, endpoint: Endpoint, todo: list[Job], keep: Callable[..., None], server: processes.Server | None = None
) -> None:
    """Ask an endpoint. A failure that may pass blocks the score, `--count-unanswered-wrong` or not, until it happens in
    a second run too. `server`: r1v's own, which knows the pixel limits, and is waited for when it is started again."""
    o = w.o
    limits = w.pixels if server is None else None
    if limits:
        _refuse_unsettled(todo, *limits)
    left = {job.id: job for job in todo}
    why: dict[str, Failure] = {}
    jpegs = 0
    with console.progress("generate", len(todo)) as bar:

        async def work(job: Job) -> Reply:
            nonlocal jpegs
            url = data_url(job.image, limits, o.max_image_bytes) if job.image else None
            jpegs += bool(url and url.startswith("data:image/jpeg"))
            while True:
                try:
                    return await endpoint.chat(with_image(job.messages, url), o.max_new_tokens, o.temperature)
                except Failure as e:
                    why[job.id] = e
                    if server is None or e.kind != "connection":
                        raise
                if not server.watch():
                    hint = f"what is finished is kept, and the same command asks for the rest; the log: {server.log}"
                    raise DataError("the vLLM server ended twice", details=processes.tail(server.log), hint=hint)

        def done(job: Job, reply: Reply) -> None:
            keep(job, reply)
            left.pop(job.id)
            bar.advance()

        failed = endpoint.run(todo, work, done)
    if jpegs:
        w.runtime |= {"jpeg_images": jpegs, "jpeg_quality": JPEG_QUALITY, "max_image_bytes": o.max_image_bytes}
    for kind, n in failed.items():
        of_kind = [q for q in left if why[q].kind == kind]
        w.failures[kind] = {"n": n, "example": endpoint.failures.get(kind, ""), "questions": of_kind}
    counts = o.count_unanswered_wrong
    blocking = [id_ for id_ in left if not counts or (why[id_].temporary and id_ not in w.failed_before)]
    if blocking:
        hint = "these may work the next time; what fails again then is counted as not right"
        if not counts:
            hint = "the others are kept; the same command asks only for these again, and --count-unanswered-wrong "
            hint += "counts what the endpoint refuses for good as not right"
        what = f"{len(blocking)} of {len(todo)} questions got no answer from {endpoint.where}"
        raise DataError(what, details=failure_lines(w.failures), hint=hint)
    for line in failure_lines(w.failures):
        console.warn(f"counted as not right: {line}")
    for id_, job in left.items():
        keep(job, None, unanswered=why[id_].kind, reason=endpoint.told(why[id_].message))


def _refuse_unsettled(todo: list[Job], least: int, most: int) -> None:
    for job in todo:
        if job.image and not is_settled(*size_of(job.image), least, most):
            what = f"question {job.id}: no size of whole tokens between {least} and {most} pixels has the shape of its "
            what += f"{' x '.join(map(str, size_of(job.image)))} image, so that an endpoint may resize it again"
            hint = "wider --min-pixels and --max-pixels; --vllm serves a checkpoint at these limits"
            raise UsageError(what, hint=hint)


def failure_lines(failures: dict[str, dict]) -> list[str]:
    """`3 x timeout: no complete reply within 60 s`."""
    return [f"{f['n']} x {kind}: {f['example']}" for kind, f in failures.items()]


def estimate(w: Work) -> dict:
    """Questions that `generate` would answer now, and about how many tokens (4 characters of text each)."""
    done = {id_ for id_, record in read_predictions(w.file).items() if not record.get("unanswered")}
    todo = [job for job in jobs(w) if job.id not in done]
    texts = [sum(len(part.get("text", "")) for m in job.messages for part in m["content"]) // 4 for job in todo]
    images = sum(math.prod(fitted(*size_of(j.image), *w.pixels)) // FEWEST_PIXELS for j in todo if j.image)
    return {
        "calls": len(todo),
        "prompt_tokens": sum(texts) + images,
        "image_tokens": images,
        "completion_tokens_at_most": len(todo) * w.identity["max_new_tokens"],
    }


def claim(w: Work) -> None:
    """Raises UsageError when the eval dir holds another model or other settings, naming those that differ."""
    file = w.out / "eval.json"
    # An attempt that failed before its first answer leaves nothing worth guarding.
    if file.is_file() and any((w.out / name).is_file() for name in ("predictions.jsonl", "judged.json")):
        before = read_object(file).get("identity")
        if before not in (None, w.identity):
            what = f"{w.out} holds an evaluation of another model or with other settings"
            hint = f"choose another --out, or delete that folder; --predictions {w.file} reuses its answers"
            raise UsageError(what, details=differences(before, w.identity), hint=hint)
