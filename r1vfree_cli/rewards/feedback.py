"""AI feedback as a reward: another model's judgement of the extracted answer, and what happens when there is none.

Three kinds of failure, three answers. The policy's (no answer, an empty one, one over the length cap): the floor
score, and no request. The infrastructure's: None, which means not scored and is never a number. The configuration's,
and a used-up budget: an `R1VError`, which stops the run.
"""

import asyncio
import math
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from ..config.rewards import FeedbackReward
from ..core.errors import GuardStop, R1VError, UsageError
from ..core.prompts import parse, prompt_hash
from ..judges.backends import Backend
from ..judges.cache import JudgementCache
from ..judges.protocol import Failure, JudgeImage, Question, Verdict
from .text import completion_text

Asked = tuple[Sequence[Any], str, str | None]  # PIL images, question, answer
PROBE_S = 60.0  # how long a trial question may take
PAUSE_S = 0.5


class Feedback:
    """An asynchronous reward after TRL's protocol: `await feedback(prompts, completions, images=..., problem=...)`.

    It works in an event loop of its own, so that TRL's loop, canaries and probes may all ask it. `identity`, part of
    cache keys: what decides a judgement beside the question. `cache`: folder. Others: as of `registry.build_feedback`.
    """

    def __init__(
        self,
        reward: FeedbackReward,
        backend: Backend,
        *,
        identity: dict,
        figures: str,
        cache: Path | None,
        stopping: Callable[[], bool],
    ):
        self.__name__, self._figures = reward.key, figures
        self.weight, self.required = reward.weight, reward.required
        self.max_failed_fraction, self.floor = reward.max_failed_fraction, reward.floor
        self.failures: deque[str] = deque(maxlen=100)
        self._reward, self._backend, self._identity = reward, backend, identity
        self._cache, self._stopping, self._opened = JudgementCache(cache), stopping, False
        processes = max(1, int(os.environ.get("WORLD_SIZE", "1")))  # each of them may spend its share
        self._budget = None if reward.max_cost is None else reward.max_cost / processes
        self._spent = 0.0
        self._slots = asyncio.Semaphore(reward.concurrency)
        self._stats: Counter[str] = Counter()
        self._latencies: list[float] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._start_lock = threading.Lock()

    async def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        images: Sequence[Any] | None = None,
        problem: Sequence[str] | None = None,
        **_: Any,
    ) -> list[float | None]:
        """One score, or None, for each completion, with its PIL images and its row's question.

        Raises UsageError: the judge's configuration is wrong, or the rows have no `problem`. GuardStop: `max_cost` is
        reached.
        """
        if problem is None:
            raise UsageError("the feedback reward needs the column `problem`")
        pictures = images if images is not None else [None] * len(completions)
        asked = [
            (picture or [], question, parse(completion_text(completion)).answer)
            for picture, question, completion in zip(pictures, problem, completions, strict=True)
        ]
        return await asyncio.wrap_future(self._submit(self._score(asked, True, self._reward.step_deadline_s)))

    def ask(self, items: Sequence[Asked], *, use_cache: bool = True, most_s: float = math.inf) -> list[float | None]:
        """The same for (images, question, answer) directly, from synchronous code, within `most_s`; raises alike."""
        seconds = min(most_s, self._reward.step_deadline_s)
        return self._submit(self._score(items, use_cache, seconds)).result()

    def probe(self) -> None:
        """Ask one question, so that a wrong configuration is known before step 1. Raises UsageError, DataError."""
        from PIL import Image

        item = ([Image.new("RGB", (56, 56), (200, 30, 30))], "What colour is the image?", "red")
        seen = len(self.failures)
        (score,) = self.ask([item], use_cache=False, most_s=PROBE_S)
        where = getattr(self._backend, "base_url", None) or self._identity.get("model")
        if score is None:
            raise UsageError(
                f"the judge gave no verdict on a trial question ({where})",
                details=list(self.failures)[seen:][-3:],
                hint=f"start the judge, or correct rewards.{self.__name__}; r1v doctor --recipe NAME tries again",
            )
        if self._budget is not None and not self._stats["tokens"]:
            raise UsageError(
                f"max_cost cannot be kept: the judge does not say how many tokens it used ({where})",
                hint=f"remove rewards.{self.__name__}.max_cost and price",
            )

    def stats(self) -> dict[str, float]:
        """Counts, times and costs since the last call, under `judge/...` (`figures`); latencies in seconds."""
        stats: dict[str, float] = {"calls": 0, "cache_hits": 0, "cost": 0.0, **self._stats}
        if latencies := sorted(self._latencies):
            stats["latency_p50"] = latencies[len(latencies) // 2]
            stats["latency_p95"] = latencies[int(0.95 * len(latencies))]
        self._stats, self._latencies = Counter(), []
        return {f"{self._figures}/{key}": value for key, value in stats.items()}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on from: money spent (`max_cost` counts all attempts), figures not yet logged."""
        return {"spent": self._spent, "stats": dict(self._stats), "latencies": list(self._latencies)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Add what earlier attempts counted to what this one has spent already, on its canaries."""
        self._spent += state["spent"]
        self._stats.update({key.removeprefix("judge/"): value for key, value in state["stats"].items()})
        self._latencies = [*state["latencies"], *self._latencies]

    def identity(self) -> dict:
        """What the run contract keeps of this reward."""
        kept = {"floor": self._reward.floor, "max_answer_chars": self._reward.max_answer_chars}
        return {"name": self.__name__, "weight": self.weight, **self._identity, **kept, "prompt_sha256": prompt_hash()}

    def close(self) -> None:
        """Let go of the judge and end the loop's thread."""
        with self._start_lock:
            loop, self._loop = self._loop, None
        if loop is None:
            return
        if self._opened:
            asyncio.run_coroutine_threadsafe(self._backend.close(), loop).result()
            self._opened = False
        self._cache.close()
        loop.call_soon_threadsafe(loop.stop)

    # --- inside the loop ---------------------------------------------------------------------------------------

    def _submit(self, work: Coroutine[Any, Any, list[float | None]]) -> Any:
        with self._start_lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="r1v-judge", daemon=True).start()
            return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _score(self, items: Sequence[Asked], use_cache: bool, seconds: float) -> list[float | None]:
        deadline = time.monotonic() + seconds
        opened = await self._open(deadline)
        wrapped: dict[int, JudgeImage] = {}
        distinct: dict[str, JudgeImage] = {}  # a group's rows are read apart: equal images in objects of their own
        keys: list[str | None] = []
        questions: dict[str, Question] = {}
        identity = {**self._identity, **self._backend.identity}
        identity |= {"prompt": self._backend.prompt, "prompt_sha256": prompt_hash()}
        for images, problem, answer in items:
            if not answer or not answer.strip() or len(answer) > self._reward.max_answer_chars:
                keys.append(None)
                self._stats["floored"] += 1
                continue
            given = [wrapped.setdefault(id(image), JudgeImage(image)) for image in images]
            pictures = tuple(distinct.setdefault(image.digest, image) for image in given)
            question = Question(pictures, problem, answer.strip())
            keys.append(key := question.key(identity))
            questions.setdefault(key, question)
        scores = self._cache.get(list(questions), bounded=self._backend.prompt == "judge") if use_cache else {}
        self._stats["cache_hits"] += len(scores)
        wanted = {key: question for key, question in questions.items() if key not in scores}
        fresh: dict[str, float] = {}
        try:
            if wanted and opened:
                await self._ask_all(wanted, fresh, deadline)
        finally:
            # What was paid for is kept, also when the run is about to stop.
            if use_cache:
                self._cache.put(fresh)
        scores.update(fresh)
        return [self._reward.floor if key is None else scores.get(key) for key in keys]

    async def _open(self, deadline: float) -> bool:
        """Get the judge ready, trying again until the deadline; False when it could not be reached."""
        while not self._opened:
            try:
                await self._backend.open()
                self._opened = True
            except Failure as failure:
                if time.monotonic() + PAUSE_S > deadline or self._stopping():
                    self._failed(failure)
                    return False
                await asyncio.sleep(PAUSE_S)
        return True

    async def _ask_all(self, wanted: dict[str, Question], found: dict[str, float], deadline: float) -> None:
        """Put into `found` the scores that the judge gives before the deadline; an R1VError ends the others."""
        # A judge over HTTP gets its questions one by one, one in this process all of them in a batch.
        parts = [[key] for key in wanted] if self._backend.one_by_one else [list(wanted)]
        tasks = [asyncio.ensure_future(self._ask_part({k: wanted[k] for k in part}, found)) for part in parts]
        timeout = max(0.0, deadline - time.monotonic())
        done, pending = await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_EXCEPTION)
        for task in pending:
            task.cancel()
        if pending:
            await asyncio.wait(pending)
        errors = [error for task in done if (error := task.exception())]
        if errors:
            raise min(errors, key=lambda error: not isinstance(error, R1VError))
        for _ in pending:
            self._failed(Failure("deadline", f"no verdict in time{getattr(self._backend, 'waiting', '')}"))

    async def _ask_part(self, part: dict[str, Question], found: dict[str, float]) -> None:
        async with self._slots:
            if self._budget is not None and self._spent >= self._budget:
                spent = f"{self._spent:.4g} of {self._budget:.4g} in this process"
                hint = f"raise rewards.{self.__name__}.max_cost, the ceiling of all processes together, and go on with --resume"
                raise GuardStop(f"the judge's cost reached its ceiling: {spent}", hint=hint)
            self._stats["calls"] += len(part)
            results = await self._backend.judge(list(part.values()))
        for key, result in zip(part, results, strict=True):
            if isinstance(result, Verdict):
                found[key] = result.score
                self._latencies.append(result.seconds)
            else:
                self._failed(result)
            self._stats["tokens"] += result.input_tokens + result.output_tokens
            if price := self._reward.price:
                cost = (result.input_tokens * price.input + result.output_tokens * price.output) / 1e6
                self._spent += cost
                self._stats["cost"] += cost  # type: ignore[assignment]  # a Counter holds floats too

    def _failed(self, failure: Failure) -> None:
        self._stats[f"failed/{failure.kind}"] += 1
        self.failures.append(str(failure))
