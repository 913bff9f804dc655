"""The rewards of a recipe: r1v's own and a user's, as `schema` has them in `rewards`."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator


class Strict(BaseModel):
    """Unknown keys and wrong types are errors; nothing is coerced but int to float."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class Serve(Strict):
    """A reward server that r1v starts with the run and stops with it."""

    engine: Literal["r1v", "vllm"] = "r1v"
    model: str = Field(min_length=1)
    revision: str | None = None
    devices: list[Annotated[int, Field(ge=0)]] = Field(default_factory=list)
    port: int | None = Field(None, ge=1, le=65535)


class Canaries(Strict):
    """Questions whose right order of scores is known, asked before step 1 and every `every_steps`."""

    every_steps: int = Field(100, ge=1)
    max_empty_score: float = 0.5
    min_margin: float = 0.0
    samples: int = Field(16, ge=1)


class Price(Strict):
    """What a judge costs, per million tokens, in the unit of `max_cost`."""

    input: float = Field(ge=0)
    output: float = Field(ge=0)


LABEL = r"[A-Za-z0-9_][\w.-]*"


class Reward(Strict):
    """Any reward: its weight in the sum, and what to call it in metrics and rollouts (`label`).

    `required`: a completion that this reward does not score is left out of its group.
    """

    name: str
    label: str | None = Field(None, pattern=f"^{LABEL}$", max_length=64)
    weight: float = 1.0
    required: bool = False

    @property
    def key(self) -> str:
        """What metrics, rollouts and `--set` call it."""
        return self.label or self.name


class FormatReward(Reward):
    """1 when the reply has exactly the asked form, else 0."""

    name: Literal["format"]


class AccuracyReward(Reward):
    """1 when math-verify finds the answer equal to the row's `solution`, else 0. Needs labels."""

    name: Literal["accuracy"]


_BACKENDS: dict[str, tuple[list[str], list[str]]] = {  # what each needs, and what it does not use
    "local": (["model"], ["base_url", "serve", "request"]),
    "classify": (["base_url"], []),
    "classify with serve": ([], ["base_url", "model"]),  # serve says both
    "chat": (["base_url", "model"], ["serve"]),
}


class FeedbackReward(Reward):
    """Another model's judgement of the extracted answer, given image and question."""

    name: Literal["feedback"]
    backend: Literal["local", "classify", "chat"] = "classify"
    model: str | None = None
    revision: str | None = None
    base_url: str | None = Field(None, pattern="^https?://.+")
    serve: Serve | None = None
    prompt: Literal["auto", "judge", "conversation"] = "auto"  # for a classify server that does not say what it wants
    request: dict[str, Any] = Field(default_factory=dict)  # put into the request's JSON, over what r1v sends
    api_key_env: str = "OPENAI_API_KEY"
    timeout_s: float = Field(60, gt=0)
    max_retries: int = Field(4, ge=0)
    concurrency: int = Field(32, ge=1)
    requests_per_minute: float | None = Field(None, gt=0)
    step_deadline_s: float = Field(600, gt=0)
    required: bool = True
    max_failed_fraction: float = Field(0.25, ge=0, le=1)
    max_cost: float | None = Field(None, gt=0)
    price: Price | None = None
    cache: bool | str = True
    max_answer_chars: int = Field(2000, ge=1)
    floor: float = 0.0
    canaries: Canaries | None = Field(default_factory=Canaries)

    @model_validator(mode="after")
    def _where(self):
        backend = f"{self.backend} with serve" if self.backend == "classify" and self.serve else self.backend
        needed, unused = _BACKENDS[backend]
        if wrong := [key for key in unused if getattr(self, key)]:
            sets = " and ".join(f"rewards.{self.key}.{key}: {'{}' if key == 'request' else 'null'}" for key in wrong)
            raise ValueError(f"backend {backend} does not use {' and '.join(wrong)}: set {sets}")
        if backend == "classify" and not self.base_url:
            one = "exactly one of base_url (a server that runs) and serve (r1v starts one)"
            raise ValueError(f"backend classify needs {one}")
        if missing := [key for key in needed if not getattr(self, key)]:
            raise ValueError(f"backend {backend} needs {' and '.join(missing)}")
        if self.max_cost is not None and self.price is None:
            raise ValueError("max_cost needs price: {input: ..., output: ...} per million tokens")
        return self


class UserReward(Reward):
    """A function or class of the user's; every key that is not below is its keyword argument.

    `name` is `FILE.py:FUNCTION` or `package.module:FUNCTION`.
    """

    model_config = ConfigDict(extra="allow")

    name: str = Field(pattern=r"^(.+\.py|[A-Za-z_][\w.]*):[A-Za-z_]\w*$")
    max_failed_fraction: float = Field(0.25, ge=0, le=1)  # of the completions of a step, where it is required

    @property
    def key(self) -> str:
        return self.label or self.function

    @property
    def source(self) -> str:
        """The file or module."""
        return self.name.rpartition(":")[0]

    @property
    def function(self) -> str:
        return self.name.rpartition(":")[2]

    @property
    def arguments(self) -> dict[str, Any]:
        return self.model_extra or {}


OWN_REWARDS = ("format", "accuracy", "feedback")


def _kind(reward: Any) -> str | None:
    name = reward.get("name") if isinstance(reward, dict) else getattr(reward, "name", None)
    return name if name in OWN_REWARDS else "user" if isinstance(name, str) and ":" in name else None


AnyReward = Annotated[
    Annotated[FormatReward, Tag("format")]
    | Annotated[AccuracyReward, Tag("accuracy")]
    | Annotated[FeedbackReward, Tag("feedback")]
    | Annotated[UserReward, Tag("user")],
    Discriminator(_kind),
]
