"""A GRPO rank whose rewards are made up: scores by content, and failures on demand through `R1V_TEST_JUDGE`.

`some`: about an eighth of the scores are missing, by content. `failing`: rank 1 scores nothing from step 2 on.
`misconfigured`: rank 1 raises a UsageError in step 2.
"""

import os
import sys
import zlib
from dataclasses import replace

from r1vfree_cli.core.errors import UsageError
from r1vfree_cli.rewards.text import completion_text
from r1vfree_cli.training import grpo
from r1vfree_cli.training.worker import worker


class Letters:
    """The share of vowels in the reply."""

    __name__ = "format"
    required = False

    def __call__(self, completions, **_):
        texts = [completion_text(c).lower() for c in completions]
        return [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in texts]


class Judge:
    """A number between 0 and 1 made of question and reply; a required reward, asynchronous as the real one."""

    __name__ = "feedback"
    required = True
    max_failed_fraction = 0.49
    failures = ("timeout: no verdict within 1 s",)

    async def __call__(self, completions, problem, trainer_state, images, **_):
        assert all(image.size[0] >= 28 for row in images for image in row)
        mode, rank = os.environ.get("R1V_TEST_JUDGE", "some"), os.environ.get("RANK", "0")
        hashes = [zlib.crc32((p + completion_text(c)).encode()) for p, c in zip(problem, completions, strict=True)]
        if trainer_state.global_step >= 1 and rank == "1":
            if mode == "misconfigured":
                raise UsageError("no such judge", hint="start it")
            if mode == "failing":
                return [None] * len(completions)
        return [None if mode == "some" and h % 8 == 0 else h % 1000 / 1000 for h in hashes]

    def stats(self):
        return {"judge/calls": 1.0, "judge/latency_p95": 0.1 + float(os.environ.get("RANK", "0"))}


def build(*_, **__):
    """Stands in for `build_rewards`."""
    return [Letters(), Judge()]


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(__file__))  # which PYTHONSAFEPATH keeps out
    import clock_back

    clock_back.apply()
    grpo.build_rewards = build
    main = grpo.main
    if os.environ.get("RANK", "0") != "0":  # as on a second node, which does not know that the run is resumed
        main = lambda recipe, attempt: grpo.main(recipe, replace(attempt, resume=False))  # noqa: E731
    worker("grpo", main)
