"""What the reward judges behind HTTP (`classify`, `chat`) share: one endpoint, and patience while it is down."""

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import replace

from ..config.rewards import FeedbackReward
from ..core import console
from ..core.prompts import PromptKind
from .client import FIRST_PAUSE_S, LONGEST_PAUSE_S, Endpoint
from .protocol import Failure, Question, Verdict


class HttpJudge:
    """A judge at `base_url`. Subclasses say how one question is asked.

    Args:
        reward: the recipe's feedback reward.
        base_url: origin and path prefix.
        stopping: whether the run is asked to end; then a judge that is down is not waited for.
    """

    prompt: PromptKind = "judge"
    one_by_one = True
    waiting = ""  # ": REASON" while questions wait for a judge that is down

    def __init__(self, reward: FeedbackReward, base_url: str, stopping: Callable[[], bool]):
        self.reward, self.base_url, self._stopping = reward, base_url.rstrip("/"), stopping
        self.identity: dict = {}
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
        """One question, asked once.

        Raises UsageError, Failure.
        """
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
