"""The shared-prefix engine against TRL as it is: the same losses, gradients and tokens, on tiny real models in f32."""

from __future__ import annotations

import functools
import inspect
import itertools
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, Features, Image, List, Value
from peft import LoraConfig
from tiny_models import TAKES_FEATURES, draw, load_tiny, save_tiny, tiny_model
from torch import nn
from torch.distributed.utils import _recursive_to
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForImageTextToText,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainerCallback,
    modeling_flash_attention_utils,
)
from trl import GRPOConfig, GRPOTrainer
from trl.data_utils import prepare_multimodal_messages

from r1vfree_cli.core.errors import DataError
from r1vfree_cli.models.sampling import keyed_draws
from r1vfree_cli.shared_prefix import buckets
from r1vfree_cli.shared_prefix import cpu as shared_prefix_cpu
from r1vfree_cli.shared_prefix import decode as shared_prefix_decode
from r1vfree_cli.shared_prefix.attention import PREFIX, PackedLayout, Segment, install
from r1vfree_cli.shared_prefix.cache import BranchCache
from r1vfree_cli.shared_prefix.decode import _GraphedStep, _Step
from r1vfree_cli.shared_prefix.mixin import SharedPrefixMixin, chunks
from r1vfree_cli.shared_prefix.pack import Group, find_groups
from r1vfree_cli.shared_prefix.prompts import RowsByReference, model_images

SMALL, WIDE, TALL = (56, 56), (84, 56), (56, 84)
# (question, image sizes): several sizes and lengths; text alone; several images
PLAIN_ROWS = (("What colour is it?", [SMALL]), ("How many squares are there in this picture?", [WIDE]))
MIXED_ROWS = (
    ("What colour is the square?", [TALL]),
    ("Is there a circle?", []),
    ("Which of the two is larger?", [WIDE, SMALL]),
    ("Yes or No?", [SMALL]),
)
needs_features = pytest.mark.skipif(not TAKES_FEATURES, reason="transformers takes no ready image features")
# Of two ranks the second has text alone, which ZeRO-3 does not take, or other images.
RANK_ROWS = {
    "ddp": (*MIXED_ROWS[:2], ("What is it called?", [])),
    "zero3": (MIXED_ROWS[0], ("Is there a circle?", [SMALL]), ("What is it called?", [WIDE, TALL])),
}
FEATURES = Features({"prompt": List({"role": Value("string"), "content": Value("string")}), "images": List(Image())})


@functools.cache
def folder(kind: str, base: str) -> str:
    return str(save_tiny(Path(base) / kind, kind))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """kind -> folder of a tiny model, written once."""
    base = str(tmp_path_factory.mktemp("models"))
    return lambda kind="qwen2_5_vl": folder(kind, base)


def rows(spec=PLAIN_ROWS) -> Dataset:
    made = [
        {
            "prompt": [{"role": "user", "content": text}],
            "images": [draw(10 * i + j, size) for j, size in enumerate(sizes)],
        }
        for i, (text, sizes) in enumerate(spec)
    ]
    return Dataset.from_list(made, features=FEATURES)


def completions(n: int, lengths=(12, 1, 7, 3, 5), seed: int = 0) -> list[list[int]]:
    """Token ids of `n` completions; those shorter than 12 end with an end token, a single one among them."""
    rng = random.Random(seed)
    made = []
    for i in range(n):
        length = lengths[i % len(lengths)]
        made.append([rng.randrange(20, 300) for _ in range(length)])
        if 1 < length < 12:
            made[-1][-1] = END
    return made


END = tiny_model()[1].tokenizer.eos_token_id


def reward(completion_ids, **_):
    return [float((sum(ids) * 7 + len(ids)) % 11) for ids in completion_ids]


class Fixed:
    """Answers generation with given completions, if any."""

    table: list[list[int]] | None = None

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        if self.table is None:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        assert len(self.table) == len(prompt_ids)
        return [list(ids) for ids in self.table], None


class Plain(Fixed, GRPOTrainer):
    pass


class Shared(Fixed, SharedPrefixMixin, GRPOTrainer):
    pass


class Gradients(TrainerCallback):
    def __init__(self):
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def take_flat_images(processor) -> None:
    """TRL 1.16 hands the processor None for a row without images in a batch that has some, which it refuses."""

    class Flat(type(processor)):
        def __call__(self, images=None, **kwargs):
            if images is not None and (images[0] is None or isinstance(images[0], list)):
                images = [x for row in images for x in row or []]
            return super().__call__(images=images, **kwargs)

    Flat.__name__ = type(processor).__name__
    processor.__class__ = Flat


def build(cls, path: str, out: Path, data: Dataset | None = None, *, prepare=None, peft=None, **config):
    """A trainer on the model in `path`, its policy moved a little away from the reference."""
    model, processor = load_tiny(path)
    processor.tokenizer.padding_side = "left"
    if cls is Plain:
        take_flat_images(processor)
    noise = torch.Generator().manual_seed(5)
    for p in model.parameters():
        p.data += 0.01 * torch.randn(p.shape, generator=noise)
    if prepare:
        prepare(model)
    defaults = {
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "report_to": [],
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 12,
        "beta": 0.1,
        "max_steps": 1,
        "learning_rate": 0.0,
        "max_grad_norm": 1e9,
        "save_strategy": "no",
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
    }
    trainer = cls(
        model=model,
        reward_funcs=config.pop("reward", reward),
        args=GRPOConfig(str(out), **{**defaults, **config}),
        train_dataset=rows() if data is None else data,
        processing_class=processor,
        callbacks=[Gradients()],
        peft_config=peft,
    )
    trainer.gradients = next(c for c in trainer.callback_handler.callbacks if isinstance(c, Gradients)).steps
    return trainer


def train_both(path, tmp_path, table=None, data=None, **config):
    """Both trainers after training on the same completions."""
    pair = []
    for cls in (Plain, Shared):
        trainer = build(cls, path, tmp_path / cls.__name__, data, **config)
        trainer.table = table
        torch.manual_seed(11)
        trainer.train()
        pair.append(trainer)
    assert pair[1].shared_prefix_off is None
    return pair


# What decays the states of linear attention: products of many float32 exponentials. Plain TRL's gradients of these are
# themselves 2e-4 away from the same computation in float64, and ours as much; every other gradient is 2e-6 away.
DECAYS = ("linear_attn.A_log", "linear_attn.dt_bias", "linear_attn.in_proj_a")


def assert_same_gradients(plain: dict, shared: dict, tolerance: float = 1e-5) -> None:
    """Each gradient within `tolerance` of its own size, or of the mean size where it is next to nothing."""
    assert plain.keys() == shared.keys() and plain
    typical = (sum(float(g.norm()) ** 2 for g in plain.values()) / len(plain)) ** 0.5
    worst = {n: float((plain[n] - shared[n]).norm() / max(float(plain[n].norm()), 1e-2 * typical)) for n in plain}
    worst = {n: w / 10 if any(d in n for d in DECAYS) else w for n, w in worst.items()}
    name = max(worst, key=worst.get)
    assert typical > 1e-4 and worst[name] < tolerance, f"{name}: {worst[name]:.2e}"


def assert_same_run(plain, shared, tolerance: float = 1e-5) -> None:
    for a, b in zip(plain.gradients, shared.gradients, strict=True):
        assert_same_gradients(a, b, tolerance)
    logged = [[h for h in t.state.log_history if "loss" in h] for t in (plain, shared)]
    for a, b in zip(*logged, strict=True):
        keys = ["loss", "grad_norm", "reward", "num_tokens"]
        if plain.args.gradient_accumulation_steps == 1:  # else means of means, over micro-batches of other samples
            keys += ["kl", "entropy", "clip_ratio/region_mean"]
        for key in keys:
            assert (key in a) == (key in b)
            if key in a:
                assert a[key] == pytest.approx(b[key], rel=10 * tolerance, abs=10 * tolerance), key


# --- passes: loss and every gradient -------------------------------------------------------------------------------

MIXED8 = {"per_device_train_batch_size": 16, "data": MIXED_ROWS}
CASES = {
    "two groups, early ends, one token": {},
    "beta 0": {"beta": 0.0},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "reentrant checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "text alone, several images": MIXED8,
    "text alone only": {"data": (("Yes or No?", []), ("What?", []))},
    "groups cut by the micro-batch": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "micro-batches of six": {
        "per_device_train_batch_size": 6,
        "gradient_accumulation_steps": 4,
        "data": MIXED_ROWS * 2,
    },
    "accumulation": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "data": MIXED_ROWS},
    "old log-probabilities": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": 2,
        "max_steps": 2,
        "loss_type": "dr_grpo",
    },
    "two iterations": {"num_iterations": 2, "max_steps": 2, "learning_rate": 0.05},
    "truncated completions masked": {"mask_truncated_completions": True},
    "all completions masked": {"mask_truncated_completions": True, "lengths": (12,), "beta": 0.0, "no_gradient": True},
    "entropy": {"top_entropy_quantile": 0.5, "entropy_coef": 0.01},
    "sequence level": {"importance_sampling_level": "sequence"},
    "padded to a multiple": {"pad_to_multiple_of": 8},
    "completions of one token": {"lengths": (1,)},
    "completions of equal length": {"lengths": (9,)},
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_those_of_trl(name, models, tmp_path):
    case = dict(CASES[name])
    data = rows(case.pop("data", PLAIN_ROWS))
    lengths = case.pop("lengths", (12, 1, 7, 3, 5))
    no_gradient = case.pop("no_gradient", False)
    local = case.get("per_device_train_batch_size", 8) * case.get(
        "steps_per_generation", case.get("gradient_accumulation_steps", 1)
    )
    plain, shared = train_both(models(), tmp_path, completions(local, lengths), data, **case)
    if no_gradient:
        for grads in (plain.gradients[0], shared.gradients[0]):
            assert all(float(g.abs().max()) == 0 for g in grads.values())
        return
    if "steps_per_generation" in case:  # the parts of a generation batch hold other samples: compare their sum
        for trainer in (plain, shared):
            total = {n: sum(step[n] for step in trainer.gradients) for n in trainer.gradients[0]}
            trainer.gradients[:] = [total]
            trainer.state.log_history.clear()
    assert_same_run(plain, shared)


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen3_vl", "qwen3_5"])
def test_other_model_classes(kind, models, tmp_path):
    plain, shared = train_both(
        models(kind), tmp_path, completions(16), rows(MIXED_ROWS), per_device_train_batch_size=16
    )
    assert_same_run(plain, shared)


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_shapes_are_rounded_on_a_gpu_and_no_number_changes(kind, models, tmp_path, monkeypatch):
    """As on a GPU: few shapes of attention, wherever it runs, and TRL's loss, gradients and greedy tokens."""
    greedy = {"do_sample": False, "top_k": None, "top_p": None, "temperature": None}
    options = {"per_device_train_batch_size": 16, "generation_kwargs": greedy}
    plain, _ = train_both(models(kind), tmp_path / "cpu", completions(16), rows(MIXED_ROWS), **options)
    # What is added must matter where it is seen: rooms of 4 are seldom filled, and many chunks need several calls.
    for name, least in {"PROMPT": 4, "BRANCHES": 3, "BRANCH": 4, "WINDOW": 16, "WINDOWS": 3, "IMAGE": 24}.items():
        monkeypatch.setattr(buckets, name, least)
    monkeypatch.setattr(buckets, "wanted", lambda device: True)
    made, shapes, attention = [], set(), F.scaled_dot_product_attention
    chunks = buckets._Chunks.of
    monkeypatch.setattr(buckets._Chunks, "of", lambda *args: made.append(args[0][-1]) or chunks(*args))

    def seen(q, k, *args, **kwargs):
        own = k.shape[-2] - q.shape[-2]  # a branch sees its prompt's room before its own
        shapes.update((q.shape[-2], own or q.shape[-2]))
        return attention(q, k, *args, **kwargs)

    shared = build(Shared, models(kind), tmp_path / "gpu", rows(MIXED_ROWS), **options)
    shared.table = completions(16)
    torch.manual_seed(11)
    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", seen)
        shared.train()
    assert_same_run(plain, shared)
    assert all(n in (24, 48, 96) or n & (n - 1) == 0 for n in shapes), shapes
    assert 0 < len(made) <= 4, "once a pass for all images, and once for all windows, however many layers"
    plain.table = shared.table = None
    assert generate(plain) == generate(shared)


@pytest.mark.parametrize("length, least, room", [(0, 64, 64), (1, 64, 64), (64, 64, 64), (65, 64, 128), (129, 64, 256)])
def test_rooms_double(length, least, room):
    assert buckets.rounded(length, least) == room


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_lora(kind, models, tmp_path):
    linear = ["in_proj_qkv", "out_proj"] if kind == "qwen3_5" else []

    def peft():
        modules = ["q_proj", "v_proj", "gate_proj", *linear]
        return LoraConfig(r=4, target_modules=modules, init_lora_weights=False)

    pair = []
    for cls in (Plain, Shared):
        torch.manual_seed(3)
        trainer = build(cls, models(kind), tmp_path / cls.__name__, peft=peft(), gradient_checkpointing=True)
        trainer.table = completions(8)
        trainer.train()
        pair.append(trainer)
    assert pair[1].shared_prefix_off is None and all("lora" in n for n in pair[1].gradients[0])
    assert_same_run(*pair)


def test_all_loss_types_that_trl_has(models, tmp_path):
    """One batch, every loss, with old log-probabilities far enough away that ratios are clipped."""
    pair = [build(cls, models(), tmp_path / cls.__name__) for cls in (Plain, Shared)]
    source = inspect.getsource(GRPOTrainer._compute_loss)
    types = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "luspo", "sapo", "vespo"]
    assert all(f'"{t}"' in source for t in types)
    losses = {}
    for trainer in pair:
        trainer.table = completions(8)
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()
        torch.manual_seed(0)
        batch = dict(trainer._prepare_inputs([trainer.train_dataset[i // 4] for i in range(8)]))
        order = batch["completion_ids"].sum(dim=1).argsort()  # rows may stand in another order
        shift = torch.empty(8, 12)
        shift[order] = torch.linspace(-0.5, 0.5, 96).view(8, 12)
        batch["old_per_token_logps"] = batch["ref_per_token_logps"] + shift * batch["completion_mask"]
        for loss_type in types:
            trainer.loss_type = loss_type
            trainer.model.zero_grad()
            loss = trainer.compute_loss(trainer.model, batch)
            loss.backward()
            grads = {n: p.grad.clone() for n, p in trainer.model.named_parameters()}
            losses.setdefault(loss_type, []).append((float(loss), grads))
    for loss_type, ((a, grads), (b, others)) in losses.items():
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6), loss_type
        assert_same_gradients(grads, others)
    assert len({round(x[0][0], 5) for x in losses.values()}) > 4


def test_bf16_to_its_own_noise(models, tmp_path):
    """Under bf16 both differ from f32 by about the same."""
    exact, _ = train_both(models(), tmp_path / "f32", completions(8))
    plain, shared = train_both(models(), tmp_path / "bf16", completions(8), bf16=True)
    whole = [torch.cat([g.float().flatten() for g in t.gradients[0].values()]) for t in (exact, plain, shared)]
    noise, ours = ((g - whole[0]).norm() / whole[0].norm() for g in whole[1:])
    assert 0 < ours < 2 * noise and noise < 0.2


class Casts(TorchDispatchMode):
    """Counts the float32 matrices that autocast copies to a smaller type."""

    def __init__(self):
        super().__init__()
        self.weights = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].dtype == torch.float32 and out.dtype == torch.bfloat16:
            self.weights += isinstance(args[0], torch.nn.Parameter)
        return out


def test_float32_weights_under_autocast(models, tmp_path):
    """Generation casts each weight once and not once a token, and keeps keys in the type in which they are used."""
    casts, caches = [], []
    for tokens in (3, 9):
        trainer = build(
            Shared, models(), tmp_path, beta=0.0, bf16=True, max_completion_length=tokens,
            generation_kwargs={"min_new_tokens": tokens},
        )  # fmt: skip
        trainer.model = trainer.accelerator.prepare_model(trainer.model)
        trainer.model_wrapped = trainer.model

        class Kept(BranchCache):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                caches.append(self)

        with pytest.MonkeyPatch.context() as patch, Casts() as counted:
            patch.setattr(shared_prefix_decode, "BranchCache", Kept)
            trainer._generate(
                [
                    prepare_multimodal_messages(row["prompt"], images=row["images"])
                    for row in (trainer.train_dataset[i // 4] for i in range(8))
                ]
            )
        casts.append(counted.weights)
    assert casts[0] == casts[1] > 0
    stored = [x.dtype for cache in caches for held in (cache.prompt, cache.branch) for kv in held.values() for x in kv]
    assert set(stored) == {torch.bfloat16}


def test_groups_without_a_gradient_skip_the_backward_pass(models, tmp_path):
    """With beta 0 a group of equal rewards adds nothing; its log-probabilities are still reported."""

    def half(completion_ids, prompts, **_):
        return [float(sum(ids) % 5) if "colour" in str(p) else 1.0 for ids, p in zip(completion_ids, prompts)]

    plain, shared = (build(cls, models(), tmp_path / cls.__name__, beta=0.0, reward=half) for cls in (Plain, Shared))
    tokens = []
    embed = shared.model.get_input_embeddings()
    embed.register_forward_hook(lambda m, a, out: tokens.append((torch.is_grad_enabled(), a[0].shape[1])))
    for trainer in (plain, shared):
        trainer.table = completions(8)
        trainer.train()
    assert_same_run(plain, shared)
    with_gradient = [n for grad, n in tokens if grad]
    without = [n for grad, n in tokens if not grad]
    assert len(with_gradient) == 1 and len(without) == 1

    kept = build(Shared, models(), tmp_path / "kl", beta=0.1, reward=half)
    kept._advantages = torch.zeros(8)
    groups = [Group(0, 4, slice(0), slice(0)), Group(4, 8, slice(0), slice(0))]
    assert kept._split_idle(groups) == (groups, []), "with a KL term their gradient is not zero"
    kept.beta = 0.0
    assert kept._split_idle(groups) == (groups[:1], groups[1:]), "something must be left to run backward through"


def test_evaluation_is_that_of_trl(models, tmp_path):
    figures = []
    for cls in (Plain, Shared):
        trainer = build(cls, models(), tmp_path / cls.__name__, per_device_eval_batch_size=4, num_generations_eval=2)
        trainer.table = completions(4)
        figures.append(trainer.evaluate(rows(PLAIN_ROWS)))
    for key in ("eval_loss", "eval_reward", "eval_kl", "eval_entropy"):
        assert figures[0][key] == pytest.approx(figures[1][key], rel=1e-4, abs=1e-5)


# --- generation ----------------------------------------------------------------------------------------------------


def generate(trainer, times: int = 1):
    """Completions of the trainer's own generation for its rows, four of each."""
    data = [trainer.train_dataset[i] for i in range(len(trainer.train_dataset)) for _ in range(trainer.num_generations)]
    found = []
    original = trainer._generate_single_turn

    def record(*args, **kwargs):
        out = original(*args, **kwargs)
        found.append(out[0])
        return out

    trainer._generate_single_turn = record
    trainer.model.train()
    for _ in range(times):
        trainer._generate_and_score_completions(data)
    trainer._generate_single_turn = original
    return found if times > 1 else found[0]


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_greedy_tokens_are_those_of_trl(kind, models, tmp_path):
    greedy = {"do_sample": False, "top_k": None, "top_p": None, "temperature": None, "repetition_penalty": 1.2}
    found = []
    for cls in (Plain, Shared):
        trainer = build(
            cls,
            models(kind),
            tmp_path / cls.__name__,
            rows(MIXED_ROWS),
            beta=0.0,
            max_completion_length=20,
            generation_kwargs=greedy,
        )
        # A stale value of another batch: nothing of it may reach the positions.
        trainer.model.base_model.rope_deltas = torch.full((16, 1), 7)
        found.append(generate(trainer))
    assert found[0] == found[1]
    assert len({tuple(ids) for ids in found[1]}) > 1 and max(map(len, found[1])) > 8


@pytest.mark.parametrize("peft", [None, {"r": 4, "target_modules": ["q_proj", "up_proj"]}], ids=["full", "lora"])
def test_packed_weights_decode_the_tokens_of_the_weights_as_they_are_now(peft, models, tmp_path, monkeypatch):
    greedy = {"do_sample": False, "top_k": None, "top_p": None, "temperature": None, "repetition_penalty": 1.2}
    used, reorder = [], torch.ops.mkldnn._reorder_linear_weight
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", lambda w: used.append(w.shape) or reorder(w))
    monkeypatch.setattr(shared_prefix_cpu, "LEAST", 1)
    found = {}
    for cls in (Plain, Shared):
        options = {"peft": LoraConfig(**peft)} if peft else {}
        trainer = build(
            cls, models(), tmp_path / cls.__name__, rows(), beta=0.0, max_completion_length=20,
            generation_kwargs=greedy, **options,
        )  # fmt: skip
        found[cls] = [generate(trainer)]
        with torch.no_grad():
            for i, weight in enumerate(p for n, p in trainer.model.named_parameters() if p.dim() == 2):
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(i)), alpha=0.05)
        found[cls].append(generate(trainer))
        assert not any("forward" in vars(module) for module in trainer.model.modules() if type(module) is nn.Linear)
        assert bool(used) == (cls is Shared)
    assert found[Plain] == found[Shared] and found[Shared][0] != found[Shared][1]


def test_packed_weights_leave_what_they_cannot_help(monkeypatch):
    monkeypatch.setattr(shared_prefix_cpu, "LEAST", 8)
    x = torch.randn(3, 4)

    def packed(model: nn.Module, **autocast) -> bool:
        before = model(x.to(next(model.parameters()).dtype))
        with torch.inference_mode(), torch.autocast("cpu", **autocast), shared_prefix_cpu.packed_weights(model):
            torch.testing.assert_close(model(x.to(before.dtype)).to(before.dtype), before, rtol=2e-2, atol=2e-2)
            found = any("forward" in vars(module) for module in model.modules())
        assert not any("forward" in vars(module) for module in model.modules())
        return found

    off = {"enabled": False}
    assert packed(nn.Sequential(nn.Linear(4, 3)), **off) and packed(nn.Linear(4, 3, bias=False), **off)
    assert not packed(nn.Linear(4, 1), **off), "too small"
    assert not packed(nn.Linear(4, 3).bfloat16(), **off)
    assert not packed(nn.Linear(4, 3), dtype=torch.bfloat16), "autocast casts"
    monkeypatch.setattr(shared_prefix_cpu, "MOST", 11)
    assert not packed(nn.Linear(4, 3), **off), "too large"
    wrapped = nn.Linear(4, 3)
    wrapped.forward = lambda x: x.new_zeros(3, 3)
    with shared_prefix_cpu.packed_weights(wrapped):
        assert not wrapped(x).any()
    assert "forward" in vars(wrapped)


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_sampled_tokens_are_those_of_trl_for_the_same_random_numbers(penalty, models, tmp_path):
    """A repetition penalty knows the padding of each row: of those that are left, once some have finished."""
    sampling = {"top_p": 0.9, "top_k": 40, "repetition_penalty": penalty}
    found = []
    for cls in (Plain, Shared):
        trainer = build(cls, models(), tmp_path / cls.__name__, rows(MIXED_ROWS), beta=0.0, **sampling)
        trainer.eos_token_ids = trainer.generation_config.eos_token_id = [*trainer.eos_token_ids, *range(20, 40)]
        with keyed_draws((4,), range(16), 12):  # rows that have finished leave one loop and stay in the other
            found.append(generate(trainer))
    assert found[0] == found[1] and len({tuple(ids) for ids in found[1]}) > 8


def test_first_tokens_come_as_often_as_they_should(models, tmp_path):
    """3000 draws of a first token: the chi-square of their counts against the model's own probabilities."""
    trainer = build(
        Shared, models(), tmp_path, rows(PLAIN_ROWS[:1]), beta=0.0, num_generations=500, max_completion_length=2,
        per_device_train_batch_size=500, top_k=12, generation_kwargs={"min_new_tokens": 2},
    )  # fmt: skip
    torch.manual_seed(0)
    drawn = [ids[0] for found in generate(trainer, times=6) for ids in found]
    prompt = [
        {"role": "user", "content": [{"type": "image", "image": draw(0)}, {"type": "text", "text": PLAIN_ROWS[0][0]}]}
    ]
    inputs = trainer.processing_class.apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        logits = trainer.model(**inputs).logits[0, -1]
    banned = [*trainer.eos_token_ids, trainer.model.config.image_token_id]
    logits[banned] = -torch.inf
    best = logits.topk(12)
    expected = torch.softmax(best.values, 0) * len(drawn)
    counts = torch.tensor([drawn.count(t) for t in best.indices.tolist()]).float()
    assert counts.sum() == len(drawn) == 3000
    chi = float(((counts - expected) ** 2 / expected).sum())
    assert chi < 31.3, "11 degrees of freedom: above this with probability 0.001"


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_every_decoding_step_sees_what_a_whole_pass_sees(kind, models, tmp_path, monkeypatch):
    """Logits of each step against one pass over prompt and completion: a cache that holds too much, or positions left
    from an earlier batch, would show here."""
    trainer = build(Shared, models(kind), tmp_path, rows(MIXED_ROWS), num_generations=3, per_device_train_batch_size=12)
    trainer.eos_token_ids = trainer.generation_config.eos_token_id = list(range(20, 60))  # rows end early, and leave
    seen: list[list[torch.Tensor]] = [[] for _ in range(12)]
    left: list[int] = []
    model = trainer.model
    original = model.forward

    class Followed(_Step):
        def keep(self, rows):
            left[:] = [left[i] for i in rows]
            super().keep(rows)

    def record(*args, **kwargs):
        out = original(*args, **kwargs)
        if "logits" in out and "shared_prefix" in kwargs:
            # The prompts' last tokens, (1, 4, V), then a token of each row that is left, (b, 1, V).
            logits = out.logits[:, -1] if left else out.logits[0].repeat_interleave(3, dim=0)
            left[:] = left or range(12)
            for i, row in zip(left, logits, strict=True):
                seen[i].append(row)
        return out

    model.forward = record
    monkeypatch.setattr(shared_prefix_decode, "_Step", Followed)
    found = generate(trainer)
    model.forward = original
    assert len({len(ids) for ids in found}) > 3
    for i, (text, sizes) in enumerate(MIXED_ROWS):
        images = [draw(10 * i + j, size) for j, size in enumerate(sizes)]
        content = [*({"type": "image", "image": x} for x in images), {"type": "text", "text": text}]
        inputs = trainer.processing_class.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        )  # fmt: skip
        width = inputs["input_ids"].shape[1]
        for j in range(3):
            ids = torch.tensor(found[3 * i + j])
            whole = dict(inputs)
            whole["input_ids"] = torch.cat([inputs["input_ids"][0], ids])[None]
            whole["attention_mask"] = torch.ones_like(whole["input_ids"])
            kinds = inputs.get("mm_token_type_ids", torch.zeros(1, width, dtype=torch.long))
            whole["mm_token_type_ids"] = torch.cat([kinds[0], torch.zeros(len(ids), dtype=kinds.dtype)])[None]
            with torch.no_grad():
                expected = model(**whole).logits[0, width - 1 : width - 1 + len(ids)]
            assert torch.allclose(torch.stack(seen[3 * i + j][: len(ids)]), expected, atol=2e-4)


class Static(_GraphedStep):
    """Whole buffers and a mask in place of slices that grow, and nothing recorded."""

    captures = False

    def __init__(self, *args):
        super().__init__(*args)
        self.captures = False


class Traced(_GraphedStep):
    """A step that is recorded once, as a CUDA graph records it: what is no tensor is frozen as it is in that moment, and
    reading a tensor's value is an error."""

    recordings = 0

    def _capture(self):
        states = {k: (s.conv.clone(), s.recurrent.clone()) for k, s in self.cache.states.items()}
        self._run(self.tokens, self.at)
        self.graph = make_fx(lambda tokens, at: self._run(tokens, at), tracing_mode="real")(self.tokens, self.at)
        for k, (conv, recurrent) in states.items():
            self.cache.states[k].conv.copy_(conv), self.cache.states[k].recurrent.copy_(recurrent)
        Traced.recordings += 1

    def _replay(self):
        return self.graph(self.tokens, self.at)


class Refused(_GraphedStep):
    def _capture(self):
        raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_5"])
def test_one_recorded_step_serves_a_run(kind, models, tmp_path, monkeypatch, capsys):
    """Three calls, with other prompts and other weights each, on one recording, whose rows do not leave: the tokens of
    steps that are not recorded, whose rows do. And a step that cannot be recorded goes on as it is, said once."""
    found = {}
    data = [rows(MIXED_ROWS), rows(tuple(reversed(MIXED_ROWS))), rows(tuple(MIXED_ROWS[i] for i in (2, 0, 3, 1)))]
    for step in (_Step, Static, Traced, Refused):
        monkeypatch.setattr(shared_prefix_decode, "_Step", step)
        trainer = build(Shared, models(kind), tmp_path, data[0], beta=0.0)
        trainer.eos_token_ids = trainer.generation_config.eos_token_id = list(range(20, 60))  # rows end early
        for call, prompts in enumerate(data):
            trainer.train_dataset = prompts
            with torch.no_grad():
                for p in trainer.model.parameters():
                    p.mul_(1 + 0.02 * call)
            with keyed_draws((4, call), range(16), 12):
                found.setdefault(step, []).append(generate(trainer))
    assert found[_Step] == found[Static] == found[Traced] == found[Refused]
    lengths = [len(ids) for call in found[_Step] for ids in call]
    assert max(lengths) == 12 and len(set(lengths)) > 6
    assert Traced.recordings == 1
    assert capsys.readouterr().err.count("cannot be captured") == 1
    Traced.recordings = 0


def test_generation_that_the_loop_cannot_do_is_left_to_transformers(models, tmp_path):
    """Beam search, here: prompts and images are repeated again for it."""
    found = []
    for cls in (Plain, Shared):
        trainer = build(
            cls, models(), tmp_path / cls.__name__, rows(MIXED_ROWS), beta=0.0, max_completion_length=6,
            generation_kwargs={"num_beams": 2, "do_sample": False, "top_k": None},
        )  # fmt: skip
        found.append(generate(trainer))
    assert found[0] == found[1]


# --- vLLM: only the passes are shared --------------------------------------------------------------------------------


class FakeVLLM:
    """Answers as TRL's vLLM client does, and keeps what it was asked."""

    def __init__(self, table):
        self.table, self.asked = table, []

    def sync_weights(self):
        pass

    def generate(self, prompts, images, num_generations, profiler=None):
        self.asked.append((prompts, images, num_generations))
        return prompts, [list(x) for x in self.table], [[[-2.0] for _ in x] for x in self.table], None


def test_vllm_rollouts_share_the_passes(models, tmp_path):
    pair = []
    for cls in (Plain, Shared):
        trainer = build(cls, models(), tmp_path / cls.__name__)
        trainer.use_vllm, trainer._last_loaded_step = True, -1
        trainer.vllm_generation = FakeVLLM(completions(8))
        trainer.train()
        pair.append(trainer)
    assert_same_run(*pair)
    (prompts, images, _), (others, theirs, _) = pair[0].vllm_generation.asked[0], pair[1].vllm_generation.asked[0]
    assert prompts == others and [len(x) for x in images] == [len(x) for x in theirs] == [1] * 8


# --- what is done once -------------------------------------------------------------------------------------------------


class Counts:
    """How many images were processed, patches encoded, prompt tokens seen, rows loaded."""

    def __init__(self, trainer):
        self.images = self.patches = 0
        self.tokens: list[int] = []
        processor = trainer.processing_class.image_processor
        preprocess = type(processor).preprocess

        def counted(processor, images, *args, **kwargs):
            out = preprocess(processor, images, *args, **kwargs)
            self.images += len(out["image_grid_thw"])
            return out

        processor.preprocess = functools.partial(counted, processor)
        for model in (trainer.model, trainer.ref_model):
            if model is not None:
                model.base_model.visual.register_forward_pre_hook(self._vision)
        trainer.model.get_input_embeddings().register_forward_hook(self._text)

    def _vision(self, module, args, kwargs=None):
        self.patches += len(args[0])

    def _text(self, module, args, out):
        self.tokens.append(args[0].numel())


def test_images_and_prompts_are_processed_once_per_group(models, tmp_path):
    data = rows(PLAIN_ROWS)
    counts = {}
    for cls in (Plain, Shared):
        trainer = build(cls, models(), tmp_path / cls.__name__, data, max_completion_length=6)
        counts[cls] = Counts(trainer)
        trainer.table = None
        torch.manual_seed(1)
        trainer.train()
    once = 16 + 24  # patches of a 56 x 56 and an 84 x 56 image
    assert counts[Shared].images == 2 and counts[Shared].patches == 3 * once  # generation, reference, policy
    assert counts[Plain].images == 16 and counts[Plain].patches == 3 * 4 * once
    assert sum(counts[Shared].tokens) < 0.6 * sum(counts[Plain].tokens)


@needs_features
def test_a_frozen_vision_tower_runs_once_per_step(models, tmp_path):
    def freeze(model):
        clean, _ = load_tiny(models())
        model.base_model.visual.load_state_dict(clean.base_model.visual.state_dict())
        model.base_model.visual.requires_grad_(False)

    pair, counts = [], []
    for cls in (Plain, Shared):
        trainer = build(cls, models(), tmp_path / cls.__name__, rows(MIXED_ROWS), prepare=freeze, num_generations=2)
        counts.append(Counts(trainer))
        trainer.table = completions(8)
        trainer.train()
        pair.append(trainer)
    assert_same_run(*pair)
    assert counts[1].patches == 16 + 24 + 24 + 16 and counts[0].patches == 2 * 2 * counts[1].patches


@needs_features
def test_a_frozen_vision_tower_serves_generation_and_deepstack_too(models, tmp_path):
    def freeze(model):
        clean, _ = load_tiny(models("qwen3_vl"))
        model.base_model.visual.load_state_dict(clean.base_model.visual.state_dict())
        model.base_model.visual.requires_grad_(False)

    pair = []
    for cls in (Plain, Shared):
        trainer = build(
            cls,
            models("qwen3_vl"),
            tmp_path / cls.__name__,
            rows(MIXED_ROWS),
            prepare=freeze,
            num_generations=2,
            generation_kwargs={"min_new_tokens": 12},
        )
        assert cls is Plain or trainer._encodes_once
        torch.manual_seed(2)
        trainer.train()
        pair.append(trainer)
    assert_same_run(*pair)


def test_encoded_images_survive_the_move_to_another_device(models):
    """DDP on a GPU rebuilds the arguments of a forward pass from their items when it moves one of them."""
    whole = load_tiny(models("qwen3_vl"))[0]
    hidden = whole.config.text_config.hidden_size
    images = model_images(whole, torch.zeros(2, 3 * hidden), None, encoded=True)
    moved = _recursive_to(images, torch.device("meta"), False)[0]["mm_encoder_outputs"]["image"]
    assert moved.pooler_output[0].is_meta and [x[0].shape[1] for x in moved.deepstack_features] == [hidden, hidden]


def test_a_vision_tower_that_differs_from_the_reference_is_not_shared(models, tmp_path):
    trainer = build(Shared, models(), tmp_path, prepare=lambda m: m.base_model.visual.requires_grad_(False))
    assert not trainer._encodes_once  # `build` moved the policy's weights

    def same_but_trained(model):
        model.load_state_dict(load_tiny(models())[0].state_dict())

    assert not build(Shared, models(), tmp_path, prepare=same_but_trained)._encodes_once


def test_each_row_is_loaded_once_and_repeated_by_reference():
    class Loaded:
        seen: list[int] = []  # noqa: RUF012

        def __len__(self):
            return 3

        def __getitem__(self, i):
            self.seen.append(i)
            return {"row": i}

    data = RowsByReference(Loaded())
    first = data.__getitems__([2, 2, 0, 0])
    again = data.__getitems__([2, 2, 0, 0])
    assert Loaded.seen == [2, 0] and first[0] is first[1] is again[0] and first[2] == {"row": 0}
    assert data[1] == {"row": 1} and len(data) == 3


def test_groups_are_found_by_prompt_and_leading_images():
    prompts = torch.tensor([[0, 5, 6], [0, 5, 6], [7, 5, 6], [7, 5, 6], [7, 5, 6]])
    mask = (prompts != 0).long()
    grid = torch.tensor([[1, 2, 4], [1, 2, 2], [1, 4, 4]])
    found = find_groups(prompts, mask, [1, 0, 1, 0, 1], grid)
    assert [(g.start, g.stop) for g in found] == [(0, 2), (2, 4), (4, 5)]
    assert [g.pixels for g in found] == [slice(0, 8), slice(8, 12), slice(12, 28)]
    assert [(g.start, g.stop) for g in find_groups(prompts, mask, None, None)] == [(0, 2), (2, 5)]


def test_chunks_depend_on_numbers_of_rows_only():
    def group(a, b):
        return Group(a, b, slice(0), slice(0))

    cut = chunks([group(0, 2), group(2, 6), group(6, 8)], 4, 4)
    assert [[(g.start, g.stop) for g in part] for part in cut] == [[(0, 2), (2, 4)], [(4, 6), (6, 8)]]
    assert len(chunks([group(0, 4), group(4, 8)], 1, 4)) == 2  # never less than a whole group
    assert len(chunks([group(0, 4), group(4, 8)], 8, 4)) == 1


# --- traps -----------------------------------------------------------------------------------------------------------


def test_a_layout_is_never_ignored(models, tmp_path):
    """Plain SDPA would take the packed row for one causal sequence without a word."""
    trainer = build(Shared, models(), tmp_path)
    trainer.table = completions(8)
    for model in (trainer.model, trainer.ref_model):
        assert model.config.text_config._attn_implementation == PREFIX + "sdpa"
        assert model.config._attn_implementation == "sdpa"
    trainer.ref_model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="sdpa"):
        trainer.train()


def test_a_pass_that_lost_its_layout_is_noticed():
    layout = PackedLayout([Segment(0, 2, [1])], torch.device("cpu"))
    query = torch.randn(1, 2, 3, 4)
    layout.attend(None, query, query, query, 0.0, None)
    layout.assert_used(1)
    with pytest.raises(RuntimeError, match="1 of 2 layers"):
        layout.assert_used(2)


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
@pytest.mark.parametrize("base", ["sdpa", "eager"])
def test_ordinary_padded_passes_keep_their_mask(kind, base, models):
    model = AutoModelForImageTextToText.from_pretrained(models(kind), attn_implementation=base)
    ids = torch.tensor([[0, 0, 0, 40, 50, 60], [30, 31, 32, 33, 34, 35]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6])
    with torch.no_grad():
        before = model(input_ids=ids, attention_mask=mask).logits
        install(model)
        after = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(before, after)
    assert model.config.text_config._attn_implementation == PREFIX + base
    told = model.config.to_json_string(use_diff=False)
    assert PREFIX not in told and buckets.VISION not in told, "a saved model must load without this package"


def fake_flash_attention(monkeypatch) -> list[str]:
    """Flash attention 2 as transformers finds it where it is installed, computed by SDPA; the kernels that were asked."""
    asked = []

    def dense(q, k, v, causal=False, softmax_scale=None, **_):  # (B, L, H, D)
        asked.append("dense")
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        causal = causal and q.shape[2] > 1
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=True)
        return out.transpose(1, 2)

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, *_, **kwargs):  # (tokens, H, D)
        asked.append("varlen")
        ends = [x.tolist() for x in (cu_seqlens_q, cu_seqlens_k)]
        parts = zip(*map(itertools.pairwise, ends), strict=True)
        rows = [(q[a:b], k[c:d], v[c:d]) for (a, b), (c, d) in parts]
        return torch.cat([dense(*(x[None] for x in row), **kwargs)[0] for row in rows])

    package, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    package.flash_attn_func, package.flash_attn_varlen_func, package.flash_attn_with_kvcache = dense, varlen, dense
    padding.pad_input = modeling_flash_attention_utils._pad_input
    padding.unpad_input = modeling_flash_attention_utils._unpad_input
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    monkeypatch.setattr(modeling_flash_attention_utils, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None, raising=False)
    return asked


def test_ordinary_passes_keep_flash_attention(models, monkeypatch):
    """Held-out questions and beam search go through the model as it is; transformers finds the kernels by the name."""
    model, _ = load_tiny(models())
    ids = torch.tensor([[0, 0, 0, 40, 50, 60], [30, 31, 32, 33, 34, 35]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6])
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
        asked = fake_flash_attention(monkeypatch)
        model.config.text_config._attn_implementation = "flash_attention_2"
        install(model)
        found = model(input_ids=ids, attention_mask=mask).logits
    assert asked and torch.allclose(found[mask.bool()], expected[mask.bool()], atol=1e-5)
    assert model.config.text_config._attn_implementation == PREFIX + "flash_attention_2"


def test_an_unknown_model_is_trained_as_trl_does_and_said_once(models, tmp_path, capsys):
    processor = load_tiny(models())[1]
    config = Qwen2Config(
        vocab_size=400, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    figures = []
    for cls in (Plain, Shared):
        torch.manual_seed(0)
        trainer = cls(
            model=Qwen2ForCausalLM(config),
            reward_funcs=reward,
            args=GRPOConfig(
                str(tmp_path / cls.__name__), use_cpu=not torch.cuda.is_available(), bf16=False, report_to=[], per_device_train_batch_size=8,
                num_generations=4, max_completion_length=5, max_steps=1, save_strategy="no", logging_steps=1,
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict({"prompt": ["How many?", "Which one?"]}),
            processing_class=processor.tokenizer,
        )  # fmt: skip
        torch.manual_seed(0)
        trainer.train()
        figures.append({k: v for k, v in trainer.state.log_history[0].items() if "time" not in k})
    assert figures[0] == figures[1] and "qwen2" in trainer.shared_prefix_off
    said = [line for line in capsys.readouterr().err.splitlines() if "shared_prefix" in line]
    assert len(said) == 1 and "qwen2" in said[0]


def test_the_switch_gives_plain_trl_back(models, tmp_path, capsys):
    class Off(Shared):
        shared_prefix = False

    figures = []
    for cls in (Plain, Off):
        trainer = build(cls, models(), tmp_path / cls.__name__, max_steps=2, learning_rate=1e-3)
        torch.manual_seed(7)
        trainer.train()
        figures.append(
            [
                {k: v for k, v in h.items() if "time" not in k and "per_second" not in k}
                for h in trainer.state.log_history
            ]
        )
    assert figures[0] == figures[1]
    assert trainer.model.config.text_config._attn_implementation == "sdpa"
    assert "shared_prefix" not in capsys.readouterr().err


def test_trl_still_processes_images_where_the_stand_in_answers():
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    assert "self.processing_class(images=images, text=prompts_text" in source  # what `PreparedProcessor` answers


# --- two processes -----------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_ranks(tmp_path: Path, path: str, *arguments: str) -> dict:
    """What rank 0 of two saw, as `shared_prefix_rank.py` saves it."""
    out = tmp_path / f"{'-'.join(arguments)}.pt"
    port, ranks = str(free_port()), []
    for rank in range(2):
        env = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        command = [sys.executable, str(Path(__file__).with_name("shared_prefix_rank.py")), path, str(out), *arguments]
        with (tmp_path / f"{out.stem}-{rank}.log").open("wb") as log:
            ranks.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
    try:
        for rank in ranks:
            rank.wait(timeout=600)
    finally:
        for rank in ranks:
            rank.kill()
    logs = "\n".join((tmp_path / f"{out.stem}-{i}.log").read_text()[-3000:] for i in range(2))
    assert [r.returncode for r in ranks] == [0, 0], logs
    return torch.load(out)


@pytest.mark.parametrize("preset", ["zero3", "ddp"])
def test_two_processes(preset, models, tmp_path):
    """Two processes that each hold half a step's groups, one group cut between them, against one process with TRL."""
    found = run_ranks(tmp_path, models(), preset)
    settings = {"per_device_train_batch_size": 12, "learning_rate": 0.05, "max_completion_length": 12}
    plain = build(Plain, models(), tmp_path / "plain", rows(RANK_ROWS[preset]), **settings)
    plain.table = completions(12)
    plain.train()
    logged = next(h for h in plain.state.log_history if "loss" in h)
    assert found["loss"] == pytest.approx(logged["loss"], rel=1e-4, abs=1e-5)
    assert found["grad_norm"] == pytest.approx(logged["grad_norm"], rel=1e-4)
    # After one step of gradient descent the weights tell every gradient.
    moved = {n: p.detach() for n, p in plain.model.named_parameters()}
    assert moved.keys() == found["weights"].keys()
    for name, weight in moved.items():
        assert torch.allclose(found["weights"][name], weight, atol=1e-6), name
    assert found["generated"] and all(found["generated"])


def test_zero3_refuses_a_prompt_without_an_image(models, tmp_path, monkeypatch):
    """Its vision tower is gathered from all ranks, and those that have an image would wait for ever."""
    trainer = build(Shared, models(), tmp_path, rows(MIXED_ROWS), per_device_train_batch_size=16)
    monkeypatch.setattr(Shared, "_zero3", True)
    with pytest.raises(DataError, match="a prompt has no image, which ZeRO-3 cannot train on"):
        generate(trainer)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-p", "no:xdist", "-o", "addopts=", "-q"]))
