"""Rewards that are functions or classes: r1v's own text rewards, and users' from a file or a module."""

import asyncio
import inspect
import json
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..config.rewards import Reward, UserReward
from ..config.user_rewards import source_file
from ..core.errors import R1VError, UsageError, brief
from ..core.files import sha256_file
from ..core.user_code import load_source

_LARGEST = 3.4e38  # TRL holds scores in float32
_PASSED_ON = ("state_dict", "load_state_dict", "stats", "close")


class FunctionReward:
    """A function, plain or asynchronous, or an object that is called, after TRL's protocol.

    It gets of `prompts`, `completions`, `completion_ids`, the row's columns and TRL's `trainer_state`, `log_extra` and
    `log_metric` what its signature names (all with `**kwargs`), as keyword arguments, and returns a number or None for
    each completion. An object's `state_dict`, `load_state_dict`, `stats` and `close` are the reward's.

    arguments: further keyword arguments of each call. file: what to name in errors; None for r1v's own, whose errors
    are bugs. identity: what the run contract keeps beside name and weight.
    """

    def __init__(
        self,
        reward: Reward,
        call: Callable[..., Any],
        *,
        arguments: dict[str, Any] | None = None,
        file: Path | None = None,
        identity: dict[str, Any] | None = None,
    ):
        self.__name__, self.weight, self.required = reward.key, reward.weight, reward.required
        self.max_failed_fraction = getattr(reward, "max_failed_fraction", None)
        self._reward, self._call, self._file, self._identity = reward, call, file, identity or {}
        self._arguments = arguments or {}
        parameters = inspect.signature(call).parameters.values()
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._wanted = None if takes_all else {p.name for p in parameters}

    async def __call__(self, *, completions: Sequence[Any], **given: Any) -> list[float | None]:
        """One score, or None, for each completion.

        Raises UsageError: a user's code raised, or returned something else; with file and line.
        """
        given |= {"completions": completions}
        named = {k: v for k, v in given.items() if self._wanted is None or k in self._wanted}
        with blamed(self.__name__, self._file, "raised"):
            scores = await asyncio.to_thread(self._call, **named, **self._arguments)
            if inspect.isawaitable(scores):
                scores = await scores
        return self._checked(scores, len(completions))

    def identity(self) -> dict:
        """What the run contract keeps of this reward."""
        return {"name": self.__name__, "weight": self.weight, **self._identity}

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.__dict__.get("_call"), name) if name in _PASSED_ON else None
        if method is None:
            raise AttributeError(name)

        def call(*args: Any) -> Any:
            with blamed(self.__name__, self._file, f"raised in {name}"):
                found = method(*args)
                if name == "state_dict":
                    json.dumps(found)  # a checkpoint holds plain numbers, text, lists and dicts
                return {f"{self.__name__}/{k}": float(v) for k, v in found.items()} if name == "stats" else found

        return call

    def _checked(self, scores: Any, n: int) -> list[float | None]:
        if isinstance(scores, str | bytes | dict) or not hasattr(scores, "__len__"):
            raise self._wrong(f"returned {brief(scores)}, not one number or None for each completion")
        if len(scores) != n:
            raise self._wrong(f"returned {len(scores)} scores for {n} completions")
        found: list[float | None] = []
        for i, score in enumerate(scores):
            with suppress(ValueError, RuntimeError):  # numpy and torch have scalars of their own
                score = score.item() if hasattr(score, "item") else score
            where = f"{brief(score)} for completion {i}"
            if score is not None and not isinstance(score, int | float):
                raise self._wrong(f"returned {where}, which is neither a number nor None")
            if score is not None and not abs(score) <= _LARGEST:
                raise self._wrong(f"returned {where}: a score is finite, or None for not scored")
            found.append(None if score is None else float(score))
        return found

    def _wrong(self, what: str) -> R1VError:
        where = f" ({self._file})" if self._file else ""
        return (UsageError if self._file else R1VError)(f"reward {self.__name__}{where} {what}")


@contextmanager
def blamed(name: str, file: Path | None, what: str) -> Iterator[None]:
    """What a user's code raises, as a UsageError with its file and line; r1v's own errors pass."""
    try:
        yield
    except R1VError:
        raise
    except (Exception, SystemExit) as e:
        if file is None:
            raise
        frames = traceback.extract_tb(e.__traceback__)
        line = next((f.lineno for f in reversed(frames) if f.filename == str(file)), None) or getattr(e, "lineno", 0)
        raise UsageError(
            f"reward {name} {what} {type(e).__name__}: {str(e)[:300]} ({file}:{line})",
            details="".join(traceback.format_exception(e)).splitlines()[-12:],
        ) from e


def user_reward(reward: UserReward) -> FunctionReward:
    """Import a user's function, or make an object of their class.

    Raises UsageError: there is none, or its code raised.
    """
    file, arguments = source_file(reward), reward.arguments
    name = f"{file.name if reward.source.endswith('.py') else reward.source}:{reward.function}"
    identity = {"source": name, "sha256": sha256_file(file), "arguments": arguments}
    with blamed(reward.key, file, "raised on import"):
        call = getattr(load_source(reward.source), reward.function)
        if isinstance(call, type):
            call, arguments = call(**arguments), {}
        made = FunctionReward(reward, call, arguments=arguments, file=file, identity=identity)
    if hasattr(made, "state_dict"):
        made.state_dict()  # what is wrong with it is known before step 1, not at the first checkpoint
    return made
