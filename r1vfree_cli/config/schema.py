"""Strict typed models of a recipe. Everything is checked before anything heavy is imported.

Keys of `train` that r1v does not own are TRL's: their names, types and defaults are read from TRL's and
transformers' source (`trl_keys`), so a misspelt key is found without importing torch.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..core import prompts
from .rewards import AnyReward, FeedbackReward, Serve, Strict

TOKEN_SIDE = 28  # pixels a side of a visual token of Qwen2-VL and Qwen2.5-VL, the smallest of the families
FEWEST_PIXELS = TOKEN_SIDE**2
MIN_PIXELS, MAX_PIXELS = 3136, 401408  # of an image after resizing, where a recipe says nothing


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
    family: str | None = Field(None, pattern=r"^.+:[A-Za-z_]\w*$")  # FILE.py:NAME or package.module:NAME of a Family
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    min_pixels: int = Field(MIN_PIXELS, ge=FEWEST_PIXELS)
    max_pixels: int = Field(MAX_PIXELS, ge=FEWEST_PIXELS)
    freeze_vision: bool = False
    lora: Lora | None = None
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _pixels(self):
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels ({self.min_pixels}) must not be above max_pixels ({self.max_pixels})")
        return self


class Rows(Strict):
    """`path` is a folder written by prepare-data, a parquet file, a known hub name, or `shapes`."""

    path: str = Field(min_length=1)
    split: str = "train"
    limit: int | None = Field(None, ge=1)


class Heldout(Rows):
    """Rows with reference answers, used to measure accuracy before and after; never trained on."""

    split: str = "test"


class Data(Rows):
    """What is trained on."""

    max_prompt_tokens: int | None = Field(1024, ge=1)  # text and image tokens; longer rows are dropped and counted
    heldout: Heldout | None = None


class Prompt(Strict):
    """What is said to the policy beside the question; the request to reason and answer in tags always follows.

    `instruction` takes the place of "Look at the image"; without `system` the chat template's own system message stays.
    """

    instruction: str | None = Field(None, min_length=1)
    system: str | None = Field(None, min_length=1)

    @field_validator("*")
    @classmethod
    def _plain(cls, text):
        if text and (token := re.search(r"<\|.*?\|>|<image>", text)):
            raise ValueError(f"must be plain text, found the control token {token.group()}")
        return text


class Evaluation(Strict):
    """Greedy answers of the current weights before step 1, every `every_steps` and after the last one.

    `benchmark`: `heldout`, scored by its solutions and the run's judges, or one of `r1v eval`, scored by its rule,
    image questions alone. `keep_best`: the metric whose best checkpoint is never deleted. `judge_holdout`: a judge that
    training does not see; when the rewarding judge's score rises and this one's does not, the guard stops the run.
    """

    every_steps: int = Field(50, ge=1)
    benchmark: str = "heldout"
    questions: str | None = None
    images: str | None = None
    limit: int | None = Field(None, ge=1)
    keep_best: str | None = None
    judge_holdout: FeedbackReward | None = None

    @model_validator(mode="after")
    def _judge(self):
        if self.judge_holdout and self.benchmark != "heldout":
            needs = f"it needs benchmark heldout, found {self.benchmark}"
            raise ValueError(f"judge_holdout judges held-out answers: {needs}")
        if self.judge_holdout and self.judge_holdout.serve:
            raise ValueError("judge_holdout does not use serve: start it by r1v serve-reward and give its base_url")
        return self


class Guard(Strict):
    """When a GRPO run stops itself. Each threshold must hold for `patience` logged steps in a row.

    sampler_difference_warning: mean difference of the log-probabilities of vLLM and trainer; one step is enough.
    """

    patience: int = Field(20, ge=1)
    zero_spread_fraction: float = Field(0.95, gt=0, le=1)
    clipped_fraction: float = Field(0.95, gt=0, le=1)
    duplicate_fraction: float = Field(0.95, gt=0, le=1)
    length_correlation_warning: float = Field(0.8, gt=0, le=1)
    sampler_difference_warning: float = Field(0.1, gt=0)


class SftTrain(BaseModel):
    """Every key must be a field of trl.SFTConfig. `max_length` drops and counts longer rows; nothing is cut."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())


class GrpoTrain(SftTrain):
    """r1v's own keys; every other key must be a field of trl.GRPOConfig."""

    num_generations: int = Field(8, ge=2)
    prompts_per_device: int = Field(1, ge=1)
    shared_prefix: bool = True
    show_rollouts: int = Field(0, ge=0)
    guard: Guard | None = Field(default_factory=Guard)


class Launch(Strict):
    """How accelerate starts the workers. `processes` counts all nodes together."""

    preset: Literal["cpu", "ddp", "zero1", "zero2", "zero3", "zero3-offload"] = "ddp"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    devices: list[Annotated[int, Field(ge=0)]] | None = None
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
            several = "preset ddp with device cpu runs several on the CPU"
            raise ValueError(f"preset cpu is one process, found processes {self.processes}; {several}")
        return self

    @property
    def on_cpu(self) -> bool:
        return self.device == "cpu" or self.preset == "cpu"


class _Recipe(Strict):
    model: Model
    data: Data
    prompt: Prompt = Field(default_factory=Prompt)
    train: Any
    launch: Launch = Field(default_factory=Launch)

    @model_validator(mode="after")
    def _image_fits(self):
        # Tags, question and chat template take some more.
        limit, image = self.data.max_prompt_tokens, self.model.max_pixels // FEWEST_PIXELS
        if limit is not None and image + 32 > limit:
            tokens = f"model.max_pixels ({self.model.max_pixels}) allows images of {image} tokens"
            limits = f"data.max_prompt_tokens ({limit}): raise the one or lower the other"
            raise ValueError(f"{tokens}, which with a question do not fit {limits}")
        return self

    @property
    def policy_prompt(self) -> prompts.Prompt:
        """What `core.prompts` builds the policy's messages with."""
        return prompts.Prompt(self.prompt.instruction, self.prompt.system)

    @property
    def trl(self) -> dict[str, Any]:
        """The keys of `train` that are TRL's."""
        return self.train.model_extra or {}

    @property
    def seed(self) -> int:
        """`train.seed`; 42 is transformers' default."""
        return self.trl.get("seed", 42)

    @property
    def weights_dtype(self) -> str:
        """What trained weights are held in. `model.dtype` is what is computed with.

        A bfloat16 weight of 0.02 has neighbours 1e-4 away, so a step of 1e-6 leaves it as it is. DeepSpeed keeps 32-bit
        copies, PEFT 32-bit adapters; else the weights are float32, and autocast computes (Micikevicius et al., 2018).
        """
        exact = self.launch.preset.startswith("zero") or self.model.lora is not None
        return self.model.dtype if exact else "float32"

    @property
    def judges(self) -> list[FeedbackReward]:
        """The AI feedback rewards."""
        return [r for r in getattr(self, "rewards", ()) if isinstance(r, FeedbackReward)]

    @property
    def every_judge(self) -> list[FeedbackReward]:
        """Those, and the one that training does not see."""
        evaluation: Evaluation | None = getattr(self, "eval", None)
        return self.judges + ([evaluation.judge_holdout] if evaluation and evaluation.judge_holdout else [])

    @property
    def served(self) -> Serve | None:
        """The reward server that the run starts, if any."""
        return next((r.serve for r in self.judges if r.serve), None)


class GrpoRecipe(_Recipe):
    """A complete `r1v grpo` recipe."""

    rewards: list[AnyReward] = Field(min_length=1)
    train: GrpoTrain
    eval: Evaluation | None = None

    @field_validator("rewards")
    @classmethod
    def _once(cls, rewards):
        keys = [r.key for r in rewards]
        for key in dict.fromkeys(k for k in keys if keys.count(k) > 1):
            raise ValueError(f"{keys.count(key)} rewards are called {key!r}: give each a label of its own")
        if sum(isinstance(r, FeedbackReward) and r.serve is not None for r in rewards) > 1:
            raise ValueError("serve stands at two rewards: start one by r1v serve-reward and give its base_url")
        return rewards

    @model_validator(mode="after")
    def _evaluated(self):
        if self.eval and self.eval.benchmark == "heldout" and not self.data.heldout:
            raise ValueError("eval.benchmark heldout needs data.heldout: the rows to answer")
        if self.eval and self.eval.judge_holdout and not self.judges:
            raise ValueError("eval.judge_holdout is compared with a feedback reward, and rewards has none")
        return self

    @model_validator(mode="after")
    def _groups(self):
        gives_up = self.trl.get("ddp_timeout", 1800)
        for judge in self.judges if self.launch.processes > 1 and isinstance(gives_up, int) else ():
            if judge.step_deadline_s >= gives_up:
                raise ValueError(
                    f"rewards.{judge.key}.step_deadline_s ({judge.step_deadline_s:g}) must be below train.ddp_timeout "
                    f"({gives_up}): after that many seconds the processes that wait for this one end with an error"
                )
        size = self.train.prompts_per_device * self.train.num_generations * self.launch.processes
        generation = self.trl.get("generation_batch_size")
        if isinstance(generation, int) and generation % size:
            product = f"prompts_per_device x num_generations x processes = {size}"
            raise ValueError(f"train.generation_batch_size ({generation}) must be a multiple of {product}")
        return self


class SftRecipe(_Recipe):
    """A complete `r1v sft` recipe. `role: judge` trains one: to say Yes to a right answer and No to a wrong one.

    `wrong`: judged answers of your own; without it each row gives its solution, and another row's as a wrong answer.
    """

    role: Literal["policy", "judge"] = "policy"
    wrong: Rows | None = None  # whose `solution` is a wrong answer to their question
    train: SftTrain

    @model_validator(mode="after")
    def _role(self):
        if self.wrong and self.role != "judge":
            raise ValueError("wrong answers are for role: judge")
        return self


Recipe = GrpoRecipe | SftRecipe
STAGES: dict[str, type[Strict]] = {"grpo": GrpoRecipe, "sft": SftRecipe}
