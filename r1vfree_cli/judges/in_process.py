"""The `local` backend: a judge model in this process. torch is imported when the judge is first needed."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from ..core.prompts import PromptKind
from .protocol import Failure, Question, Verdict, checked


class InProcessJudge:
    """`rewards.local.LocalJudge` as a backend: all questions of a step in few batches, in a thread of its own."""

    prompt: PromptKind = "judge"
    one_by_one = False

    def __init__(self, model: str, revision: str | None):
        self._model, self._revision = model, revision
        self.identity: dict = {}
        self._judge: Any = None

    async def open(self) -> None:
        from .local import LocalJudge

        self._judge = await asyncio.to_thread(LocalJudge, self._model, revision=self._revision)
        self.prompt = self._judge.prompt

    async def close(self) -> None:
        self._judge = None

    async def judge(self, questions: list[Question]) -> list[Verdict | Failure]:
        items = [([i.image.convert("RGB") for i in q.images], q.problem, q.answer) for q in questions]
        before, begin = self._judge.tokens, time.monotonic()
        try:
            scores = await asyncio.to_thread(self._judge.score, items)
        except (RuntimeError, ValueError) as e:
            # Out of memory, for one: nothing is known about these answers.
            return [Failure("local_error", f"{type(e).__name__}: {e}"[:300])] * len(questions)
        tokens = (self._judge.tokens - before) // max(1, len(questions))
        return [self._verdict(score, tokens, time.monotonic() - begin) for score in scores]

    def _verdict(self, score: float, tokens: int, seconds: float) -> Verdict | Failure:
        try:
            return Verdict(checked(score, bounded=self.prompt == "judge"), tokens, seconds=seconds)
        except Failure as failure:
            return failure
