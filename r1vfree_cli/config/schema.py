"""Strict typed models of a recipe. Everything is checked before anything heavy is imported.

Keys of `train` that r1v does not own are TRL's: their names, types and defaults are read from TRL's and
transformers' source (`trl_keys`), so a misspelt key is found without importing torch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Strict(BaseModel):
    """Unknown keys and wrong types are errors; nothing is coerced but int to float."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class Lora(Strict):
    """A LoRA adapter (PEFT), optionally over a quantised base (QLoRA)."""

    r: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | list[str] = "all-linear"
    quantize: Literal["4bit", "8bit"] | None = None


class Model(Strict):
    """The policy. `name` is a hub name, a folder, or `embedded:...` for the models that r1v makes itself."""

    name: str = Field(min_length=1)
    revision: str | None = None
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    min_pixels: int = Field(3136, ge=784)
    max_pixels: int = Field(401408, ge=784)
    freeze_vision: bool = False
    lora: Lora | None = None
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _pixels(self):
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels ({self.min_pixels}) must not be above max_pixels ({self.max_pixels})")
        return self


class Heldout(Strict):
    """Rows with reference answers, used to measure accuracy before and after; never trained on."""

    path: str = Field(min_length=1)
    split: str = "test"
    limit: int | None = Field(None, ge=1)


class Data(Strict):
    """`path` is a folder written by prepare-data, a parquet file, a known hub name, or `shapes`."""

    path: str = Field(min_length=1)
    split: str = "train"
    limit: int | None = Field(None, ge=1)
    max_prompt_tokens: int | None = Field(512, ge=1)  # text and image tokens; longer rows are dropped and counted
    heldout: Heldout | None = None


class Serve(Strict):
    """A reward server that r1v starts with the run and stops with it."""

    model: str = Field(min_length=1)
    revision: str | None = None
    devices: list[int] = Field(default_factory=list)
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


class Reward(Strict):
    """Any reward: its weight in the sum."""

    weight: float = 1.0


class FormatReward(Reward):
    """1 when the reply has exactly the asked form, else 0."""

    name: Literal["format"]


class AccuracyReward(Reward):
    """1 when math-verify finds the answer equal to the row's `solution`, else 0. Needs labels."""

    name: Literal["accuracy"]


class FeedbackReward(Reward):
    """Another model's judgement of the extracted answer, given image and question."""

    name: Literal["feedback"]
    backend: Literal["local", "classify", "chat"] = "classify"
    model: str | None = None
    revision: str | None = None
    base_url: str | None = None
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
        if self.backend == "local" and not self.model:
            raise ValueError("backend local needs `model`: a folder, a hub name or embedded:tiny-judge")
        if self.backend == "local" and (self.base_url or self.serve):
            raise ValueError("backend local runs in this process; base_url and serve are for classify and chat")
        if self.backend == "classify" and bool(self.base_url) == bool(self.serve):
            raise ValueError(
                "backend classify needs exactly one of base_url (a server that runs) and serve (r1v starts one)"
            )
        if self.backend == "chat" and not (self.base_url and self.model):
            raise ValueError("backend chat needs base_url and model")
        if self.backend == "chat" and self.serve:
            raise ValueError("serve starts a classify server; use backend classify with it")
        if self.max_cost is not None and self.price is None:
            raise ValueError("max_cost needs price: {input: ..., output: ...} per million tokens")
        return self


AnyReward = Annotated[FormatReward | AccuracyReward | FeedbackReward, Field(discriminator="name")]


class Guard(Strict):
    """When a GRPO run stops itself. Each threshold must hold for `patience` logged steps in a row."""

    patience: int = Field(20, ge=1)
    zero_spread_fraction: float = Field(0.95, gt=0, le=1)
    clipped_fraction: float = Field(0.95, gt=0, le=1)
    duplicate_fraction: float = Field(0.95, gt=0, le=1)
    length_correlation_warning: float = Field(0.8, gt=0, le=1)


class GrpoTrain(BaseModel):
    """r1v's own keys; every other key must be a field of trl.GRPOConfig."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())

    num_generations: int = Field(8, ge=2)
    prompts_per_device: int = Field(1, ge=1)
    shared_prefix: bool = True
    show_rollouts: int = Field(0, ge=0)
    guard: Guard | None = Field(default_factory=Guard)


class SftTrain(BaseModel):
    """Every key must be a field of trl.SFTConfig. `max_length` drops and counts longer rows; nothing is cut."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())


class Launch(Strict):
    """How accelerate starts the workers. `processes` counts all nodes together."""

    preset: Literal["cpu", "ddp", "zero1", "zero2", "zero3", "zero3-offload"] = "ddp"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    devices: list[int] | None = None
    processes: int = Field(1, ge=1)
    nodes: int = Field(1, ge=1)
    node_rank: int = Field(0, ge=0)
    main_address: str | None = None
    main_port: int | None = Field(None, ge=1, le=65535)

    @model_validator(mode="after")
    def _shape(self):
        if self.processes % self.nodes:
            raise ValueError(f"processes ({self.processes}) must be a multiple of nodes ({self.nodes})")
        if self.node_rank >= self.nodes:
            raise ValueError(f"node_rank ({self.node_rank}) must be below nodes ({self.nodes})")
        if self.nodes > 1 and not self.main_address:
            raise ValueError("nodes above 1 need main_address: the address of node 0")
        if self.preset == "cpu" and self.device == "cuda":
            raise ValueError("preset cpu cannot use device cuda")
        if self.preset == "cpu" and self.processes > 1:
            raise ValueError(
                f"preset cpu is one process, found processes {self.processes}; "
                "preset ddp with device cpu runs several on the CPU"
            )
        return self

    @property
    def on_cpu(self) -> bool:
        return self.device == "cpu" or self.preset == "cpu"


class _Recipe(Strict):
    model: Model
    data: Data
    train: Any
    launch: Launch = Field(default_factory=Launch)

    @model_validator(mode="after")
    def _seed(self):
        for key in ("seed", "data_seed"):
            seed = (self.train.model_extra or {}).get(key)
            if isinstance(seed, int) and not 0 <= seed < 2**32:
                raise ValueError(f"train.{key} must be from 0 to {2**32 - 1}, found {seed}")
        return self

    @property
    def seed(self) -> int:
        """`train.seed`; 42 is transformers' default."""
        return (self.train.model_extra or {}).get("seed", 42)

    @property
    def weights_dtype(self) -> str:
        """What trained weights are held in. `model.dtype` is what is computed with.

        A bfloat16 weight of 0.02 has neighbours 1e-4 away, so a step of 1e-6 leaves it as it is. DeepSpeed keeps
        32-bit copies for the optimizer, PEFT keeps adapters in 32 bits; without them the weights themselves are
        float32, and autocast computes in `model.dtype` (Micikevicius et al., 2018).
        """
        exact = self.launch.preset.startswith("zero") or self.model.lora is not None
        return self.model.dtype if exact else "float32"

    @property
    def served(self) -> Serve | None:
        """The reward server that the run starts, if any."""
        return None


class GrpoRecipe(_Recipe):
    """A whole `r1v grpo` recipe."""

    rewards: list[AnyReward] = Field(min_length=1)
    train: GrpoTrain

    @field_validator("rewards")
    @classmethod
    def _once(cls, rewards):
        names = [r.name for r in rewards]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"reward {name!r} is listed {names.count(name)} times")
        return rewards

    @model_validator(mode="after")
    def _groups(self):
        extra: dict[str, Any] = self.train.model_extra or {}
        for key in ("gradient_accumulation_steps", "steps_per_generation"):
            value = extra.get(key)
            if isinstance(value, int) and value < 1:
                raise ValueError(f"train.{key} must be at least 1, found {value}")
        waits, gives_up = self.feedback.step_deadline_s if self.feedback else 0, extra.get("ddp_timeout", 1800)
        if self.launch.processes > 1 and isinstance(gives_up, int) and waits >= gives_up:
            raise ValueError(
                f"rewards.feedback.step_deadline_s ({waits:g}) must be below train.ddp_timeout ({gives_up}): "
                "after that many seconds the processes that wait for this one end with an error"
            )
        size = self.train.prompts_per_device * self.train.num_generations * self.launch.processes
        generation = extra.get("generation_batch_size")
        if isinstance(generation, int) and generation % size:
            raise ValueError(
                f"train.generation_batch_size ({generation}) must be a multiple of prompts_per_device x "
                f"num_generations x processes = {size}"
            )
        return self

    @property
    def feedback(self) -> FeedbackReward | None:
        return next((r for r in self.rewards if isinstance(r, FeedbackReward)), None)

    @property
    def served(self) -> Serve | None:
        return self.feedback.serve if self.feedback else None


class SftRecipe(_Recipe):
    """A whole `r1v sft` recipe."""

    train: SftTrain


STAGES: dict[str, type[Strict]] = {"grpo": GrpoRecipe, "sft": SftRecipe}
