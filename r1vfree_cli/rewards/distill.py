"""`r1v prepare-data distill`: a teacher's reasoning and answers to questions about images, as rows for `r1v sft`.

Replies are kept in the cache as they come, by image, question, teacher and limit: a run that was stopped, or is made
again with other rows, asks only what it does not know. Failures are not kept.
"""

import base64
import hashlib
import io
import json
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..config.schema import FEWEST_PIXELS
from ..core import console
from ..core.errors import DataError, UsageError
from ..core.files import append_jsonl, cache_dir, lock, read_records, repair_tail
from ..core.prompts import build_messages, parse, template_hash
from ..judges.client import Endpoint
from ..judges.protocol import Failure, image_url, with_images
from ..judges.replies import Reply
from .text import reference_answer
from .verify import equivalent

LARGE_BYTES = 4_000_000  # an image file above it is sent as JPEG
CHARS_A_TOKEN = 4  # for the estimate


class Teacher:
    """The model that is asked, at temperature 0, and what it may cost.

    price: IN,OUT of a million tokens. max_cost: no question is asked once so much is spent, in the price's unit.
    Raises UsageError: a price or a ceiling that is none.
    """

    def __init__(
        self,
        endpoint: str,
        model: str,
        api_key_env: str = "R1V_ENDPOINT_KEY",
        concurrency: int = 16,
        max_tokens: int = 2048,
        price: str | None = None,
        max_cost: float | None = None,
    ):
        self.endpoint = Endpoint(
            endpoint, model, concurrency=concurrency, timeout_s=300, api_key_env=api_key_env, what="teacher"
        )
        self.max_tokens, self.max_cost = max_tokens, max_cost
        self.used = [0, 0]  # tokens in and out, by this run
        hint = "--price 0.15,0.6: of a million tokens in and out"
        if max_cost is not None and price is None:
            raise UsageError("--max-cost needs --price", hint=hint)
        try:
            self.price = tuple(map(float, price.split(","))) if price else None
        except ValueError:
            self.price = ()
        if self.price is not None and not (len(self.price) == 2 and all(0 <= each < 1e6 for each in self.price)):
            raise UsageError(f"--price {price!r}: want IN,OUT", hint=hint)

    def cost(self, tokens: Sequence[float]) -> float | None:
        return None if self.price is None else sum(n * p for n, p in zip(tokens, self.price, strict=True)) / 1e6

    async def ask(self, row: dict) -> Reply:
        spent = self.cost(self.used)
        if self.max_cost is not None and spent is not None and spent >= self.max_cost:
            raise Failure("cost ceiling", f"{spent:.4g} of --max-cost {self.max_cost:g} is spent")
        used = (0, 0)
        try:
            reply: Reply = await self.endpoint.chat(_messages(row), self.max_tokens, 0)
            used = (reply.prompt_tokens, reply.completion_tokens)
        except Failure as failed:
            used = (failed.input_tokens, failed.output_tokens)
            raise
        finally:
            self.used = [a + b for a, b in zip(self.used, used, strict=True)]
        if self.max_cost is not None and not reply.prompt_tokens:
            raise UsageError(f"{self.endpoint.where} does not say how many tokens it used: --max-cost cannot hold")
        return reply


def distill(
    out: Path,
    *,
    input: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    estimate: bool = False,
    overwrite: bool = False,
    **asked: Any,
) -> dict:
    """Ask the teacher what it is not known to answer, and write what can be learnt from as a folder of rows.

    A reply is kept when it has reasoning and an answer in r1v's tags and, where the row has a solution, is right.
    `asked`: who is asked, and how; as of `Teacher`.

    Returns `{"rows", "requests", "cached", "dropped": {reason: n}, "prompt_tokens", "completion_tokens", "cost", "data"}`;
    with `estimate`, what it would take at most, and nothing is asked or written.

    Raises UsageError: no rows named, no access to the endpoint, an output folder that is in use. DataError: no reply
    can be learnt from.
    """
    if not (input and asked.get("endpoint") and asked.get("model")):
        hint = "--input data/mine --endpoint http://127.0.0.1:8000/v1 --model NAME"
        raise UsageError("distill needs --input, --endpoint and --model", hint=hint)
    import datasets

    from ..data.load import load_rows
    from ..data.prepare import check_out, prepare

    teacher = Teacher(**asked)
    if not estimate:
        check_out(out, [Path(input)], overwrite)
    split = split or "train"
    rows = load_rows(input, split, limit).cast_column("images", datasets.List(datasets.Image(decode=False)))
    keys = [_key(row) for row in rows]
    file = _replies_file(teacher)
    with lock(file, "teacher's replies"):
        known = {reply["key"]: reply for _, reply in read_records(file, _reply, "reply") if reply}
        wanted = {key: i for i, key in enumerate(keys) if key not in known}
        if estimate:
            return _estimate(teacher, rows, wanted.values())
        failed = _ask(teacher, rows, wanted, known, file) if wanted else Counter[str]()
    records, dropped = _sorted_out(rows, keys, known)
    for kind, message in teacher.endpoint.failures.items():
        console.warn(f"{failed[kind]} x not answered ({kind}): {message}; the same command asks again")
    summary: dict[str, Any] = {"rows": len(records), "requests": len(wanted), "cached": len(rows) - len(wanted)}
    summary |= {"dropped": dict(dropped), "prompt_tokens": teacher.used[0], "completion_tokens": teacher.used[1]}
    summary |= {"cost": teacher.cost(teacher.used)}
    if not records:
        details = [f"{n} x {reason}" for reason, n in dropped.items()]
        details += [f"a reply: {known[key]['text'][:300]!r}" for key in keys if key in known][:1]
        raise DataError("no reply of the teacher can be learnt from", details=details)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "distilled.jsonl"
        with open(path, "w", encoding="utf-8") as lines:
            lines.writelines(json.dumps(record) + "\n" for record in records)
        summary["data"] = prepare("files", out, input=str(path), images=None, split=split, overwrite=overwrite)
    return summary


def _key(row: dict) -> str:
    images = [hashlib.sha256(image["bytes"]).hexdigest() for image in row["images"]]
    return hashlib.sha256(json.dumps([images, row["problem"]]).encode()).hexdigest()


def _replies_file(teacher: Teacher) -> Path:
    asked = [teacher.endpoint.where, teacher.endpoint.model, teacher.max_tokens, template_hash()]
    return cache_dir("distill", hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16] + ".jsonl")


def _messages(row: dict) -> list[dict]:
    """The policy's own prompt, with the images as data URLs."""
    from PIL import Image

    def url(data: bytes) -> str:
        if len(data) > LARGE_BYTES:
            return image_url(Image.open(io.BytesIO(data)), LARGE_BYTES)
        kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
        return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"

    return with_images(build_messages(row["problem"], len(row["images"])), (url(i["bytes"]) for i in row["images"]))


def _ask(teacher: Teacher, rows, wanted: dict[str, int], known: dict[str, dict], file: Path) -> Counter[str]:
    """Ask, and keep each reply at once; what failed, by kind."""
    repair_tail(file)
    with console.progress("ask the teacher", len(wanted)) as bar:

        async def work(job: tuple[str, int]) -> Reply:
            return await teacher.ask(rows[job[1]])

        def done(job: tuple[str, int], reply: Reply) -> None:
            known[job[0]] = {"key": job[0], "text": reply.text, "finish": reply.finish, "model": reply.model}
            append_jsonl(file, known[job[0]])
            bar.advance(1, "" if teacher.price is None else f"cost {teacher.cost(teacher.used):.3g}")

        return teacher.endpoint.run(list(wanted.items()), work, done)


def _reply(record: dict) -> dict:
    """A line of the kept replies. Raises ValueError for one that is none."""
    if not all(isinstance(record[name], str) for name in ("key", "text")) or "finish" not in record:
        raise ValueError
    return record


def _sorted_out(rows, keys: list[str], known: dict[str, dict]) -> tuple[list[dict], Counter[str]]:
    """Records to learn from, and how many replies are none, by reason."""
    dropped: Counter[str] = Counter()
    found: list[tuple[dict, str, str, str | None]] = []  # row, thinking, answer, solution
    for row, key in zip(rows, keys, strict=True):
        if key not in known:
            dropped["not answered"] += 1
            continue
        said = parse(known[key]["text"])
        if said.answer is None or not said.thinking:
            dropped["cut off" if known[key]["finish"] == "length" else "reasoning or answer not in tags"] += 1
        else:
            found.append((row, said.thinking, said.answer, reference_answer(row["solution"])))
    right = iter(equivalent([(reference, answer) for _, _, answer, reference in found if reference is not None]))
    records = []
    for row, thinking, answer, reference in found:
        if reference is not None and not next(right):
            dropped["wrong answer"] += 1
            continue
        images = [base64.b64encode(image["bytes"]).decode() for image in row["images"]]
        record = {"id": row["id"], "images": images, "problem": row["problem"]}
        records.append(record | {"thinking": thinking, "solution": answer if reference is None else reference})
    return records, dropped


def _estimate(teacher: Teacher, rows, wanted: Collection[int]) -> dict:
    """Requests and tokens, without asking: texts by their length, images by their size, replies at their limit."""
    from PIL import Image

    tokens = 0.0
    for i in wanted:
        row = rows[i]
        tokens += len(build_messages(row["problem"])[-1]["content"][-1]["text"]) / CHARS_A_TOKEN
        for image in row["images"]:
            width, height = Image.open(io.BytesIO(image["bytes"])).size
            tokens += width * height / FEWEST_PIXELS
    most = len(wanted) * teacher.max_tokens
    found = {"requests": len(wanted), "cached": len(rows) - len(wanted), "prompt_tokens": round(tokens)}
    return found | {"completion_tokens_at_most": most, "cost_at_most": teacher.cost((tokens, most))}
