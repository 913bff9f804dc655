"""What `r1v eval-hallusion` can be asked for, checked as far as it can be before any work."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..core.errors import GateError, UsageError, nearest
from .hallusion.score import METRICS

PROTOCOLS = ("official", "vlmevalkit")
STAGES = ("generate", "judge", "score", "all")


@dataclass
class EvalOptions:
    """One evaluation. Exactly one of `checkpoint`, `endpoint`, `predictions`, `judged` says what is evaluated; the
    stages judge and score alone go on with what is in `out`.

    None for pixels, `judge_input`, ... means the run contract's value, else the default that the result prints.
    """

    checkpoint: str | None = None
    endpoint: str | None = None  # base URL, OpenAI-compatible
    model: str | None = None  # the model's name at the endpoint
    base: str | None = None  # base model of a LoRA folder
    revision: str | None = None
    predictions: Path | None = None
    judged: Path | None = None
    questions: str | None = None
    images: Path | None = None
    out: Path | None = None
    stage: Literal["generate", "judge", "score", "all"] = "all"
    protocol: Literal["official", "vlmevalkit"] = "official"
    judge: Literal["rule", "chat"] = "rule"
    judge_model: str | None = None
    judge_base_url: str | None = None
    judge_prompt: Path | None = None
    judge_input: Literal["answer", "reply"] = "answer"
    allow_unjudged: bool = False
    fail_under: list[str] = field(default_factory=list)
    compare_to: Path | None = None
    estimate: bool = False
    limit: int | None = None
    batch_size: int = 32
    max_new_tokens: int = 1024
    temperature: float = 0.0
    min_pixels: int | None = None
    max_pixels: int | None = None
    device: str = "auto"
    concurrency: int = 16
    timeout_s: float = 60.0
    max_retries: int = 4
    seed: int = 0
    api_key_env: str = "OPENAI_API_KEY"

    @property
    def asks_judge(self) -> bool:
        """Whether a chat judge will be asked."""
        return self.judge == "chat" and self.judged is None and self.stage in ("judge", "all")

    @property
    def sources(self) -> list[str]:
        return [name for name in ("checkpoint", "endpoint", "predictions", "judged") if getattr(self, name) is not None]


def parse_gates(fail_under: list[str]) -> dict[str, float]:
    """`aAcc=50` and the like -> metric -> least percent.

    Raises:
        UsageError: an unknown metric, or no number from 0 to 100.
    """
    gates = {}
    for text in fail_under:
        metric, _, value = text.partition("=")
        metric = metric.strip()
        if metric not in METRICS:
            near = nearest(metric, METRICS)
            raise UsageError(
                f"--fail-under {text}: unknown metric {metric!r}; known are {', '.join(METRICS)}",
                hint=f"did you mean {near}?" if near else "write it like aAcc=50",
            )
        try:
            least = float(value)
        except ValueError:
            least = math.nan
        if not 0 <= least <= 100:
            raise UsageError(f"--fail-under {text}: {value!r} is no percentage", hint=f"write it like {metric}=50")
        gates[metric] = least
    return gates


def check_gates(doc: dict, fail_under: list[str]) -> None:
    """Compare a result with the gates; call it after the result is printed.

    Raises:
        GateError: naming each gate that is not met.
    """
    missed = []
    for metric, least in parse_gates(fail_under).items():
        found = (doc.get("metrics") or {}).get(metric)
        if found is None or found < least:
            missed.append(
                f"{metric} is {'not measured' if found is None else f'{found:.2f}'}, wanted at least {least:g}"
            )
    if missed:
        raise GateError(f"{len(missed)} gates are not met", details=missed)


def check(o: EvalOptions) -> None:
    """Raises UsageError for what can be known to be wrong before any file is read."""
    parse_gates(o.fail_under)
    if o.fail_under and (o.estimate or o.stage in ("generate", "judge")):
        raise UsageError("--fail-under needs scores, which --estimate and the stages generate and judge do not give")
    for name, value, allowed in (
        ("--protocol", o.protocol, PROTOCOLS),
        ("--stage", o.stage, STAGES),
        ("--judge", o.judge, ("rule", "chat")),
        ("--judge-input", o.judge_input, ("answer", "reply")),
    ):
        if value not in allowed:
            near = nearest(value, allowed)
            raise UsageError(
                f"{name} is {value!r}; allowed: {', '.join(allowed)}", hint=f"did you mean {near}?" if near else None
            )
    for name, number, least in (
        ("--limit", o.limit, 1),
        ("--batch-size", o.batch_size, 1),
        ("--max-new-tokens", o.max_new_tokens, 1),
        ("--min-pixels", o.min_pixels, 784),
        ("--max-pixels", o.max_pixels, 784),
        ("--concurrency", o.concurrency, 1),
        ("--max-retries", o.max_retries, 0),
        ("--temperature", o.temperature, 0),
    ):
        if number is not None and number < least:
            raise UsageError(f"{name} is {number}; it must be at least {least}")
    if not 0 < o.timeout_s < math.inf:
        raise UsageError(f"--timeout is {o.timeout_s}; it must be a number of seconds above 0")
    _check_sources(o)
    if o.asks_judge:
        if o.protocol == "vlmevalkit":
            raise UsageError(
                "the protocol vlmevalkit extracts yes or no and asks no judge", hint="leave out --judge chat"
            )
        if not o.judge_model:
            raise UsageError("--judge chat needs --judge-model", hint="and --judge-base-url for your own endpoint")
    if o.judge != "chat":
        for name, given in (("--judge-model", o.judge_model), ("--judge-prompt", o.judge_prompt)):
            if given:
                raise UsageError(f"{name} is for --judge chat", hint="add --judge chat")


def _check_sources(o: EvalOptions) -> None:
    names = {
        "checkpoint": "CKPT",
        "endpoint": "--endpoint",
        "predictions": "--predictions",
        "judged": "--judged",
    }
    if len(o.sources) > 1:
        raise UsageError(
            f"{' and '.join(names[s] for s in o.sources)} exclude each other",
            hint="one of them says what is evaluated",
        )
    going_on = o.stage in ("judge", "score") and o.out is not None
    if not o.sources and not going_on:
        raise UsageError(
            "nothing to evaluate",
            hint="give a checkpoint, --endpoint with --model, --predictions, --judged, or --stage judge with --out",
        )
    if o.endpoint and not o.model:
        raise UsageError("--endpoint needs --model: the model's name there")
    if o.model and not o.endpoint:
        raise UsageError("--model is the model's name at an --endpoint", hint="a local model is the argument CKPT")
    if o.stage == "generate" and (o.predictions or o.judged):
        raise UsageError("there is nothing to generate for --predictions and --judged")
    if o.judged and o.protocol == "vlmevalkit":
        raise UsageError(
            "--judged holds a judge's verdicts, which the protocol vlmevalkit does not use",
            hint="give the same file as --predictions: its model_prediction is read",
        )
