"""The judges of the feedback reward: behind HTTP (`classify`, `chat` say how they are asked), or in this process."""

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..config.rewards import FeedbackReward
from ..core import console
from ..core.prompts import PromptKind
from .client import FIRST_PAUSE_S, LONGEST_PAUSE_S, Endpoint
from .protocol import Failure, Question, Verdict


class Backend:
    """A judge. `prompt` is which form of prompt it gets; with `judge`, scores are probabilities.

    `one_by_one`: questions are asked apart, at most `concurrency` at a time; else all of a step in one call.
    `identity`: what the judge itself, once open, says that it is; part of cache keys.
    `waiting`: ": REASON" while questions wait for a judge that is down.
    """

    prompt: PromptKind = "judge"
    one_by_one = True
    waiting = ""

    def __init__(self) -> None:
        self.identity: dict = {}

    async def open(self) -> None:
        """Get ready; called before the first question, again when it failed.

        Raises UsageError, DataError: the configuration is wrong. Failure: the judge cannot be reached.
        """
        raise NotImplementedError

    async def judge(self, questions: list[Question]) -> list[Verdict | Failure]:
        """One result per question, in order. Raises UsageError: no access, no such model."""
        raise NotImplementedError

    async def close(self) -> None:
        """Let go of connections or memory."""
        raise NotImplementedError


class HttpJudge(Backend):
    """A judge at `base_url`. Subclasses say how one question is asked.

    While `stopping()` holds, as the run is asked to end, a judge that is down is not waited for.
    """

    def __init__(self, reward: FeedbackReward, base_url: str, stopping: Callable[[], bool]):
        super().__init__()
        self.reward, self.base_url, self._stopping = reward, base_url.rstrip("/"), stopping
        # A key that the environment holds for OpenAI goes to chat endpoints only.
        keyless = reward.serve or (reward.backend == "classify" and reward.api_key_env == "OPENAI_API_KEY")
        self.endpoint = Endpoint(
            base_url,
            reward.model or "",
            reward.timeout_s,
            reward.max_retries,
            reward.concurrency,
            None if keyless else reward.api_key_env,
            reward.requests_per_minute,
            what="judge",
        )

    async def open(self) -> None:
        await self.endpoint.open()

    async def close(self) -> None:
        await self.endpoint.close()

    async def ask(self, question: Question) -> Verdict:
        """One question, asked once. Raises UsageError, Failure."""
        raise NotImplementedError

    async def judge(self, questions: list[Question]) -> list[Verdict | Failure]:
        return [await self._judge_one(question) for question in questions]

    async def _judge_one(self, question: Question) -> Verdict | Failure:
        """Ask until there is a reply; the caller sets the deadline by cancelling."""
        pause = FIRST_PAUSE_S
        while True:
            try:
                begin = time.monotonic()
                verdict = await self.ask(question)
                self.waiting = ""
                return replace(verdict, seconds=time.monotonic() - begin)
            except Failure as failure:
                if not failure.down or self._stopping():
                    return failure
                if not (self.waiting or failure.status):
                    console.log(f"waiting for the judge at {self.endpoint.where}: {failure}")
                self.waiting = f": {failure}"
                wait = failure.wait or pause
            await asyncio.sleep(wait * random.uniform(1, 1.25))
            pause = min(2 * pause, LONGEST_PAUSE_S)


class InProcessJudge(Backend):
    """`LocalJudge` with these options as a backend, in a thread; torch is imported when it is first needed."""

    one_by_one = False

    def __init__(self, **options: Any):
        super().__init__()
        self._options = options
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
