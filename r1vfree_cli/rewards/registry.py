"""Rewards: text rewards, AI feedback and its backends. Nothing here imports torch until a local judge is asked."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..config.embedded import is_embedded, resolve_model
from ..config.schema import AnyReward, FeedbackReward, Reward
from ..core.errors import UsageError
from ..core.files import cache_dir
from ..judges.protocol import Backend
from ..run.checkpoint import fingerprint
from .feedback import Feedback
from .text import accuracy_reward, format_reward


class TextReward:
    """A pure function of the text, with the name and weight of the recipe."""

    required = False

    def __init__(self, reward: Reward, name: str, function: Callable[..., list]):
        self.__name__, self.weight, self._function = name, reward.weight, function

    def __call__(self, *args: Any, **kwargs: Any) -> list[float | None]:
        return self._function(*args, **kwargs)

    def identity(self) -> dict:
        """What the run contract keeps of this reward."""
        return {"name": self.__name__, "weight": self.weight}


def build_rewards(
    rewards: Sequence[AnyReward],
    *,
    seed: int = 42,
    cache_root: Path | None = None,
    served_url: str | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> list[TextReward | Feedback]:
    """The callables of a recipe's rewards, in order, after TRL's protocol; each with `__name__` and `weight`.

    Args:
        rewards: as validated.
        seed: the run's, which names embedded judges.
        cache_root: folder of the judgement cache; by default the user's.
        served_url: where the server of `serve` listens, which the launcher has started.
        stopping: whether the run is asked to end; then a judge that is down is not waited for.

    Raises:
        UsageError, DataError: an embedded judge does not exist or is not built yet.
    """
    functions: dict[str, Callable[..., list]] = {"format": format_reward, "accuracy": accuracy_reward}
    return [
        build_feedback(reward, seed=seed, cache_root=cache_root, served_url=served_url, stopping=stopping)
        if isinstance(reward, FeedbackReward)
        else TextReward(reward, reward.name, functions[reward.name])
        for reward in rewards
    ]


def build_feedback(
    reward: FeedbackReward,
    *,
    seed: int = 42,
    cache_root: Path | None = None,
    served_url: str | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> Feedback:
    """One AI feedback reward; connects to nothing and loads nothing yet. Arguments as of `build_rewards`."""
    model = (reward.serve.model if reward.serve else reward.model) or ""
    revision = reward.serve.revision if reward.serve else reward.revision
    if is_embedded(model):
        model = resolve_model(model, seed)
    url = served_url if reward.serve else reward.base_url
    if reward.serve and not url:
        raise UsageError("rewards.feedback.serve: no server was started")
    folder: Path | None = None
    if reward.cache:
        folder = Path(reward.cache) if isinstance(reward.cache, str) else cache_root or cache_dir("judge")
    share = 1 / max(1, int(os.environ.get("WORLD_SIZE", "1")))
    backend = _backend(reward, model, revision, str(url), stopping)
    identity = _identity(reward, model, revision)
    return Feedback(reward, backend, identity=identity, cache=folder, share=share, stopping=stopping)


def _backend(
    reward: FeedbackReward, model: str, revision: str | None, url: str, stopping: Callable[[], bool]
) -> Backend:
    # Imported here: the openai client takes a second to import, and text rewards do not need it.
    if reward.backend == "local":
        from ..judges.in_process import InProcessJudge

        return InProcessJudge(model, revision)
    from ..judges.chat import ChatJudge
    from ..judges.classify import ClassifyJudge
    from ..judges.client import key_of

    judge = ClassifyJudge if reward.backend == "classify" else ChatJudge
    return judge(reward, url, key_of(reward), stopping)


def _identity(reward: FeedbackReward, model: str, revision: str | None) -> dict:
    identity: dict[str, Any] = {"backend": reward.backend, "model": model, "revision": revision}
    if Path(model).is_dir():
        identity["files"] = fingerprint(Path(model))
    if reward.base_url:
        identity["base_url"] = reward.base_url
    if reward.request:
        identity["request"] = reward.request
    # The same model gives the same scores in this process and served by r1v: one cache for both.
    if reward.backend == "local" or reward.serve:
        identity["backend"] = "r1v"
    return identity
