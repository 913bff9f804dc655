"""The `local` backend: a judge model in this process. torch is imported when the judge is first needed."""

import asyncio
import time
from typing import Any

from ..core.prompts import PromptKind
from .protocol import Failure, Question, Verdict


class InProcessJudge:
    """`LocalJudge` as a backend: all questions of a step in few batches, in a thread of its own."""

    prompt: PromptKind = "judge"
    one_by_one = False

    def __init__(self, model: str, revision: str | None, pixels: tuple[int, int] | None = None):
        self._options: dict[str, Any] = {"model": model, "revision": revision, "pixels": pixels}
        self.identity: dict = {}
        self._judge: Any = None

    async def open(self) -> None:
        from .local import LocalJudge

        self._judge = await asyncio.to_thread(LocalJudge, **self._options)
        self.prompt = self._judge.prompt

    async def close(self) -> None:
        self._judge = None

    async def judge(self, questions: list[Question]) -> list[Verdict | Failure]:
        items = [([i.image.convert("RGB") for i in q.images], q.problem, q.answer) for q in questions]
        before, begin = self._judge.tokens, time.monotonic()
        scores = await asyncio.to_thread(self._judge.score, items)
        tokens, seconds = (self._judge.tokens - before) // max(1, len(questions)), time.monotonic() - begin
        return [s if isinstance(s, Failure) else Verdict(s, tokens, seconds=seconds) for s in scores]
