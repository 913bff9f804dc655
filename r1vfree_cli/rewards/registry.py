"""From a recipe's rewards to callables: r1v's text rewards, AI feedback, users' own.

Nothing here imports torch until a local judge is asked.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..config.embedded import resolve_model
from ..config.rewards import AnyReward, FeedbackReward, UserReward
from ..core.errors import UsageError
from ..core.files import cache_dir
from ..judges.backends import Backend, InProcessJudge
from ..judges.chat import ChatJudge
from ..judges.classify import ClassifyJudge
from ..run.checkpoint import fingerprint
from .feedback import Feedback
from .function import FunctionReward, user_reward
from .text import accuracy_reward, format_reward

TEXT_REWARDS: dict[str, Callable[..., list]] = {"format": format_reward, "accuracy": accuracy_reward}


def build_rewards(rewards: Sequence[AnyReward], **options: Any) -> list[FunctionReward | Feedback]:
    """The callables of a recipe's rewards, in order; `options` are those of `build_feedback`.

    Each is an asynchronous reward after TRL's protocol. `__name__` names it in metrics and rollouts; `identity()` goes
    into the run contract; a sample that misses a `required` score is out of its group, and where more than
    `max_failed_fraction` of a step miss it, the run stops. It may have `probe()` (a trial before step 1), `stats()`
    (figures since the last call), `state_dict()` and `load_state_dict()` (carried by checkpoints), `failures` (why
    scores are missing), `close()`.

    Raises UsageError, DataError: an embedded judge is not there or not built yet; a user's code cannot be loaded.
    """
    several = sum(isinstance(reward, FeedbackReward) for reward in rewards) > 1
    built: list[FunctionReward | Feedback] = []
    for reward in rewards:
        if isinstance(reward, FeedbackReward):
            figures = f"judge/{reward.key}" if several else "judge"
            built.append(build_feedback(reward, figures=figures, **options))
        elif isinstance(reward, UserReward):
            built.append(user_reward(reward))
        else:
            built.append(FunctionReward(reward, TEXT_REWARDS[reward.name]))
    return built


def build_feedback(
    reward: FeedbackReward,
    *,
    figures: str = "judge",
    seed: int = 42,
    cache_root: Path | None = None,
    served_url: str | None = None,
    stopping: Callable[[], bool] = lambda: False,
    pixels: tuple[int, int] | None = None,
) -> Feedback:
    """One AI feedback reward; connects to nothing and loads nothing yet.

    Args:
        figures: what its figures are called: `judge`, or `judge/LABEL` where there are several.
        seed: the run's, which names embedded judges.
        cache_root: folder of the judgement cache; by default the user's.
        served_url: where the server of `serve` listens, which the launcher has started.
        stopping: whether the run is asked to end; then a judge that is down is not waited for.
        pixels: the policy's limits on the pixels of an image, for a judge in this process or served by the run.

    Raises UsageError, DataError: an embedded judge is not there or not built yet.
    """
    place = reward.serve or reward
    model, revision = resolve_model(place.model or "", seed), place.revision
    url = served_url if reward.serve else reward.base_url
    if reward.serve and not url:
        raise UsageError(f"rewards.{reward.key}.serve: no server was started")
    folder: Path | None = None
    if reward.cache:
        folder = Path(reward.cache) if isinstance(reward.cache, str) else cache_root or cache_dir("judge")
    backend: Backend
    if reward.backend == "local":
        backend = InProcessJudge(model=model, revision=revision, pixels=pixels)
    else:
        judge = ClassifyJudge if reward.backend == "classify" else ChatJudge
        backend = judge(reward, str(url), stopping)
    identity: dict[str, Any] = {"backend": reward.backend, "model": model, "revision": revision}
    if Path(model).is_dir():
        identity["files"] = fingerprint(Path(model))
    identity |= {name: value for name in ("base_url", "request") if (value := getattr(reward, name))}
    # The same model gives the same scores in this process and served by r1v, but not by vLLM to the last digit.
    if reward.backend == "local" or reward.serve:
        engine = reward.serve.engine if reward.serve else "r1v"
        identity |= {"backend": engine, "pixels": list(pixels) if pixels else None}
    return Feedback(reward, backend, identity=identity, figures=figures, cache=folder, stopping=stopping)
