"""When a GRPO run has collapsed: figures of a step's rollouts, and thresholds that must hold several steps in a row.

Pure Python, so that it can be tested and replayed on a run dir without torch.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..config.schema import Guard
from .recorder import Rollout, groups_of

SPREAD_EPSILON = 1e-6  # below this, the rewards of a group are equal and give no gradient


@dataclass(frozen=True)
class StepFigures:
    """What the guard looks at in one logged step; None where it could not be measured.

    Shares are of 1: `zero_spread` of groups whose scored rewards are all equal (or fewer than two), `clipped` of
    completions cut at the length limit, `duplicates` of the completions of a group but its first that repeat an
    earlier one: 1 where each group is one text.
    `length_correlation` is Pearson's r of total reward and length in tokens. `sampler_difference`: mean absolute
    difference of a sampled token's log-probability in vLLM and in the trainer.
    """

    step: int
    loss: float | None = None
    grad_norm: float | None = None
    zero_spread: float | None = None
    clipped: float | None = None
    duplicates: float | None = None
    length_correlation: float | None = None
    sampler_difference: float | None = None


@dataclass(frozen=True)
class Verdict:
    """`stop`: why the run must end, or None. `figure`: which figure that is about. `warnings`: each given once."""

    stop: str | None = None
    figure: str | None = None
    warnings: list[str] = field(default_factory=list)


def figures(step: int, rollouts: Sequence[Rollout], **logged: float | None) -> StepFigures:
    """Figures of the rollouts that were made since the last logged step, beside those that were `logged`."""
    groups = groups_of(rollouts)
    if not groups:
        return StepFigures(step, **logged)
    # Of what could repeat: a few one-word answers that share a group are no collapse, one answer is.
    repeated = sum(len(g) - len({r.completion for r in g}) for g in groups)
    could = sum(len(g) - 1 for g in groups)
    scored = [(r.reward, float(r.tokens)) for r in rollouts if r.reward is not None]
    return StepFigures(
        step,
        zero_spread=sum(_equal(g) for g in groups) / len(groups),
        clipped=sum(r.clipped for r in rollouts) / len(rollouts),
        duplicates=repeated / max(could, 1),
        length_correlation=correlation(scored),
        **logged,
    )


def correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Pearson's r; None with fewer than 3 pairs or when one side is constant."""
    if len(pairs) < 3:
        return None
    try:
        return statistics.correlation(*zip(*pairs, strict=True))
    except statistics.StatisticsError:  # a constant side
        return None


def _equal(group: list[Rollout]) -> bool:
    rewards = [r.reward for r in group if r.reward is not None]
    return len(rewards) < 2 or max(rewards) - min(rewards) <= SPREAD_EPSILON


class CollapseGuard:
    """Watches logged steps; a threshold must hold for `patience` of them in a row, NaN stops at once."""

    def __init__(self, settings: Guard):
        self.settings = settings
        self._held: dict[str, int] = defaultdict(int)
        self._warned: set[str] = set()

    def observe(self, step: StepFigures) -> Verdict:
        """The verdict after one more logged step."""
        for name, value in (("loss", step.loss), ("grad_norm", step.grad_norm)):
            if value is not None and not math.isfinite(value):
                return Verdict(f"{name} is {value} at step {step.step}", "nan")
        s = self.settings
        rules = (
            ("zero_spread", s.zero_spread_fraction, "of the groups had equal rewards only: nothing to learn"),
            ("clipped", s.clipped_fraction, "of the completions were cut at max_completion_length"),
            ("duplicates", s.duplicate_fraction, "of what a group adds to its first completion repeats one"),
        )
        for name, threshold, what in rules:
            value = getattr(step, name)
            if self._holds(name, value is not None and value >= threshold):
                self._held[name] = 0  # who resumes the stopped run gets the full patience again
                return Verdict(
                    f"in {s.patience} logged steps in a row at least {threshold:.0%} {what} (step {step.step}: "
                    f"{value:.0%})",
                    name,
                )
        r = step.length_correlation
        warnings = []
        if self._holds("length", r is not None and abs(r) >= s.length_correlation_warning) and self._first("length"):
            found = f"reward and completion length correlate (r = {r:.2f} at step {step.step})"
            warnings.append(f"{found}: the policy may be paid for length, not for answers")
        drift = step.sampler_difference
        if drift is not None and drift >= s.sampler_difference_warning and self._first("sampler"):
            warnings.append(
                f"vLLM and the trainer disagree: log-probabilities of sampled tokens differ by {drift:.2f} on average at "
                f"step {step.step} (train.guard.sampler_difference_warning {s.sampler_difference_warning:g}); rounding "
                "makes about 0.02 in bfloat16, another prompt or stale weights make more"
            )
        return Verdict(warnings=warnings)

    def state_dict(self) -> dict:
        """How long each threshold has held, and what was warned about."""
        return {"held": dict(self._held), "warned": sorted(self._warned)}

    def load_state_dict(self, state: dict) -> None:
        self._held = defaultdict(int, state["held"])
        self._warned = set(state["warned"])

    def _holds(self, name: str, now: bool) -> bool:
        self._held[name] = self._held[name] + 1 if now else 0
        return self._held[name] >= self.settings.patience

    def _first(self, name: str) -> bool:
        first = name not in self._warned
        self._warned.add(name)
        return first


def offenders(rollouts: Sequence[Rollout], figure: str | None) -> list[str]:
    """Lines that show at most four rollouts that a stop is about, or any where none can be named.

    figure: that of the `Verdict`, `unscored` for a reward that failed, None for a loss that is not finite.
    """
    groups = groups_of(rollouts)
    about = {
        "clipped": [r for r in rollouts if r.clipped],
        "duplicates": next((g for g in groups if len({r.completion for r in g}) < len(g)), []),
        "zero_spread": next((g for g in groups if _equal(g)), []),
        "unscored": [r for r in rollouts if None in r.rewards.values()],
    }
    return [show(r) for r in (about.get(figure or "") or list(rollouts))[:4]]


def show(rollout: Rollout) -> str:
    """One rollout in one line: question, completion, rewards."""

    texts = (" ".join(text.split()) for text in (rollout.prompt, rollout.completion))
    asked, said = (text if len(text) <= 160 else text[:157] + "..." for text in texts)
    rewards = ", ".join(f"{k} {'not scored' if v is None else f'{v:.3f}'}" for k, v in rollout.rewards.items())
    return f"step {rollout.step}, {rollout.id}: {asked} -> {said!r} ({rewards})"
