"""What an evaluation can be asked for, from a recipe and the command line, checked before any work."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from ..config import recipes
from ..config.schema import FEWEST_PIXELS
from ..core.errors import GateError, UsageError, counted, did_you_mean, nearest


class EvalOptions(BaseModel, extra="forbid"):
    """One evaluation. One of `checkpoint`, `endpoint`, `predictions`, `judged` says what is evaluated; the stages judge and
    score alone go on with what is in `out`. None for pixels, `protocol`, ... means the run contract's value, else the
    default that the result prints. Raises UsageError: unknown keys, wrong types, impossible values, all at once."""

    benchmark: str = "hallusion"  # a room, or my_bench.py:BENCHMARK
    checkpoint: str | None = None
    vllm: bool = False  # the checkpoint answers through a vLLM server of its own
    endpoint: str | None = None  # base URL, OpenAI-compatible
    model: str | None = None  # the model's name at the endpoint
    base: str | None = None  # base model of a LoRA folder
    revision: str | None = None
    predictions: list[Path] | None = None  # several files are read as one
    judged: list[Path] | None = None
    questions: str | None = None
    images: Path | None = None
    out: Path | None = None
    stage: Literal["generate", "judge", "score", "all"] = "all"
    protocol: str | None = None
    judge: Literal["rule", "chat"] = "rule"
    judge_model: str | None = None
    judge_base_url: str | None = None
    judge_prompt: Path | None = None
    judge_input: Literal["answer", "reply"] = "answer"
    reader: Literal["r1v", "vlmevalkit"] = "r1v"  # how the rule finds yes or no
    allow_unjudged: bool = False
    count_unanswered_wrong: bool = False
    max_empty: float = Field(10.0, ge=0, le=100)  # percent of empty replies
    fail_under: list[str] = []
    compare_to: Path | None = None
    estimate: bool = False
    limit: int | None = Field(None, ge=1)
    batch_size: int = Field(32, ge=1)
    max_new_tokens: int = Field(1024, ge=1)
    temperature: float = Field(0.0, ge=0, allow_inf_nan=False)
    family: str | None = None  # `model.family` of a recipe; by default the run contract's
    min_pixels: int | None = Field(None, ge=FEWEST_PIXELS)
    max_pixels: int | None = Field(None, ge=FEWEST_PIXELS)
    device: str = "auto"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    concurrency: int = Field(16, ge=1)
    timeout_s: float = Field(60.0, gt=0, allow_inf_nan=False)
    max_retries: int = Field(4, ge=0)
    max_image_bytes: int | None = Field(None, ge=1000)
    seed: int = 0
    api_key_env: str = "R1V_ENDPOINT_KEY"  # of --endpoint
    judge_api_key_env: str = "OPENAI_API_KEY"  # of the judge; never sent to --endpoint

    @field_validator("predictions", "judged", mode="before")
    @classmethod
    def _several(cls, given: Any) -> Any:
        return [given] if isinstance(given, str | Path) else given or None

    @model_validator(mode="wrap")
    @classmethod
    def _tell(cls, given: Any, build: Any) -> Self:
        try:
            return build(given)
        except ValidationError as e:
            lines = [_explain(error) for error in e.errors()]
            raise UsageError("the options of the evaluation are wrong", details=lines) from None

    @property
    def asks_judge(self) -> bool:
        return self.judge == "chat" and not self.judged and self.stage in ("judge", "all")

    @property
    def sources(self) -> list[str]:
        return [name for name in ("checkpoint", "endpoint", "predictions", "judged") if getattr(self, name) is not None]


def flag(key: str) -> str:
    return {"timeout_s": "--timeout", "checkpoint": "CKPT"}.get(key, "--" + key.replace("_", "-"))


def _explain(error: Any) -> str:
    key = str(error["loc"][0])
    if error["type"] == "extra_forbidden":
        near, allowed = nearest(key, EvalOptions.model_fields), ", ".join(EvalOptions.model_fields)
        return f"{key}: unknown key; " + (f"nearest is {near}" if near else f"allowed: {allowed}")
    found, message = error.get("input"), error["msg"]
    if error["type"] == "literal_error" and (near := nearest(str(found), re.findall(r"'([^']*)'", message))):
        message += f"; did you mean {near}?"
    return f"{key} ({flag(key)}): {message[:1].lower()}{message[1:]}; found {found!r}"


def load(recipe: str | None, overrides: Sequence[str], given: dict[str, Any]) -> EvalOptions:
    """The options of a recipe (a name in recipes/eval/, or a path), then `--set`, then what the command line gives.
    Raises UsageError: no such recipe, or as `EvalOptions`."""
    document: dict[str, Any] = {}
    if recipe:
        document = recipes.load_document(recipes.find("eval", recipe), list(overrides))
    elif overrides:
        raise UsageError("--set needs --recipe", hint="without one, use the options: --max-new-tokens 256")
    recipes.refuse_secrets(document, str(recipe), "api_key_env, judge_api_key_env")
    asked, own = given.get("benchmark"), document.get("benchmark")
    if asked and own and asked != own:
        raise UsageError(f"recipe {recipe} is for the benchmark {own}, not for {asked}")
    return EvalOptions(**document | given)


def parse_gates(fail_under: Sequence[str], metrics: Sequence[str]) -> dict[str, float]:
    """`aAcc=50` and the like -> metric -> least percent. Raises UsageError: unknown metric, or no number from 0 to 100."""
    gates = {}
    for text in fail_under:
        metric, value = text.partition("=")[0].strip(), text.partition("=")[2]
        if metric not in metrics:
            hint = did_you_mean(metric, metrics, f"write it like {metrics[0]}=50")
            known = f"known are {', '.join(metrics)}"
            raise UsageError(f"--fail-under {text}: unknown metric {metric!r}; {known}", hint=hint)
        try:
            gates[metric] = float(value)
        except ValueError:
            gates[metric] = math.nan
        if not 0 <= gates[metric] <= 100:
            raise UsageError(f"--fail-under {text}: {value!r} is no percentage", hint=f"write it like {metric}=50")
    return gates


def check_gates(doc: dict, fail_under: Sequence[str]) -> None:
    """Compare a result with the gates, once it is printed. Raises GateError: naming each gate that is not met."""
    missed = []
    for metric, least in parse_gates(fail_under, list(doc["metrics"])).items():
        found = doc["metrics"][metric]
        if found is None or found < least:
            shown = "not measured" if found is None else f"{found:.2f}"
            missed.append(f"{metric} is {shown}, wanted at least {least:g}")
    if missed:
        raise GateError(f"{counted(len(missed), 'gate is', 'gates are')} not met", details=missed)


def check(o: EvalOptions) -> None:
    """Raises UsageError for what contradicts itself; a recipe may leave what a command completes."""
    _check_sources(o)
    if o.fail_under and (o.estimate or o.stage in ("generate", "judge")):
        raise UsageError("--fail-under needs scores, which --estimate and the stages generate and judge do not give")
    if o.asks_judge and o.protocol == "vlmevalkit":
        what = "the protocol vlmevalkit extracts yes or no and asks no judge"
        raise UsageError(what, hint="leave out --judge chat")
    if o.asks_judge and not o.judge_model:
        raise UsageError("--judge chat needs --judge-model", hint="and --judge-base-url for your own endpoint")
    if o.judge == "chat" and o.reader != "r1v":
        raise UsageError(f"--reader {o.reader} is for --judge rule: a chat judge reads the reply itself")
    for key in ("judge_model", "judge_prompt"):
        if o.judge != "chat" and getattr(o, key):
            raise UsageError(f"{flag(key)} is for --judge chat", hint="add --judge chat")


def _check_sources(o: EvalOptions) -> None:
    if len(o.sources) > 1:
        what = f"{' and '.join(flag(s) for s in o.sources)} exclude each other"
        raise UsageError(what, hint="one of them says what is evaluated")
    if not o.sources and not (o.stage in ("judge", "score") and o.out):
        hint = "give a checkpoint, --endpoint with --model, --predictions, --judged, or --stage judge with --out"
        raise UsageError("nothing to evaluate", hint=hint)
    if o.vllm and not o.checkpoint:
        raise UsageError("--vllm starts a server for a checkpoint, and none is given", hint="r1v eval NAME CKPT --vllm")
    if o.vllm and o.base:
        raise UsageError("--vllm serves complete models only", hint="merge the adapter first: r1v merge")
    if o.endpoint and not o.model:
        raise UsageError("--endpoint needs --model: the model's name there")
    if o.model and not o.endpoint:
        raise UsageError("--model is the model's name at an --endpoint", hint="a local model is the argument CKPT")
    if o.stage == "generate" and (o.predictions or o.judged):
        raise UsageError("there is nothing to generate for --predictions and --judged")
    if o.judged and o.protocol == "vlmevalkit":
        what = "--judged holds a judge's verdicts, which the protocol vlmevalkit does not use"
        raise UsageError(what, hint="give the same file as --predictions: its model_prediction is read")
