"""GRPO with tiny real models: the worker in this process, and as several ranks through the real launcher."""

import asyncio
import math
import os
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path

import datasets
import grpo_worker
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import trl
from PIL.Image import Image
from safetensors.torch import load_file
from tiny_models import draw, draw_rows, load_tiny, save_tiny, tiny_model
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import GRPOConfig

from r1vfree_cli.config import recipes
from r1vfree_cli.core.errors import DataError, GuardStop, Interrupted, UsageError
from r1vfree_cli.core.files import read_json, read_jsonl, write_text
from r1vfree_cli.core.prompts import build_messages, template_hash
from r1vfree_cli.launch import plan as plans
from r1vfree_cli.launch import processes as launch
from r1vfree_cli.models import family
from r1vfree_cli.models.lengths import drop_long_prompts, prompt_lengths
from r1vfree_cli.models.sampling import keyed_draws
from r1vfree_cli.run import contract
from r1vfree_cli.run.attempt import Attempt
from r1vfree_cli.run.checkpoint import checkpoints, lacking
from r1vfree_cli.run.run_dir import RunDir
from r1vfree_cli.training import grpo
from r1vfree_cli.training import worker as common
from r1vfree_cli.training.recorder import rollout_file
from r1vfree_cli.training.trainer import R1VGRPOTrainer, comparable
from r1vfree_cli.training.worker import to_prompts

pytestmark = pytest.mark.xdist_group("grpo_worker")
FEATURES = datasets.Features(
    {name: datasets.Value("string") for name in ("id", "problem", "solution", "thinking", "source")}
    | {"images": datasets.List(datasets.Image())}
)


def dataset(rows):
    return datasets.Dataset.from_list(rows, features=FEATURES)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Model and data that all tests share, and a cache of their own."""
    root = tmp_path_factory.mktemp("grpo")
    old = os.environ.get("R1V_CACHE")
    os.environ["R1V_CACHE"] = str(root / "cache")
    save_tiny(root / "model")
    (root / "data").mkdir()
    for split, seed in (("train", 0), ("test", 1)):
        dataset(draw_rows(12, seed=seed)).to_parquet(root / "data" / f"{split}-00000.parquet")
    yield root
    if old is None:
        del os.environ["R1V_CACHE"]
    else:
        os.environ["R1V_CACHE"] = old


def document(home: Path, **changes) -> dict:
    """A recipe; `changes` go into `train`, but keys with a dot where they say."""
    doc = {
        "model": {"name": str(home / "model"), "dtype": "float32", "min_pixels": 784, "max_pixels": 84 * 84},
        "data": {"path": str(home / "data")},
        "rewards": [{"name": "format", "weight": 0.5}, {"name": "accuracy"}],
        "train": {
            "num_generations": 4,
            "prompts_per_device": 2,
            "max_steps": 2,
            "beta": 0.04,
            "loss_type": "grpo",
            "max_completion_length": 8,
            "gradient_checkpointing": False,
            "logging_steps": 1,
            "save_steps": 50,
            "learning_rate": 1e-3,
            "shared_prefix": False,
        },
        "launch": {"preset": "cpu"},
    }
    for key, value in changes.items():
        node, _, name = key.rpartition(".")
        (doc[node] if node else doc["train"])[name] = value
    return doc


def start(home, where: Path, **changes):
    """(recipe, run dir) of a new attempt."""
    recipe = recipes.validate("grpo", document(home, **changes), "test")
    run = RunDir(where)
    run.begin(recipes.to_yaml(recipe), resume=run.holds_run)
    return recipe, run


@pytest.fixture
def made_up(monkeypatch):
    """The worker in this process with rewards that are made up."""
    monkeypatch.setattr(grpo, "build_rewards", grpo_worker.build)
    monkeypatch.setattr(common, "_stop", threading.Event())


def metrics(run: RunDir) -> list[dict]:
    return [line for _, line in read_jsonl(run.metrics)]


def rollouts(run: RunDir, step: int) -> dict:
    return pq.read_table(rollout_file(run, step)).to_pydict()


# --- required rewards ------------------------------------------------------------------------------------------

TABLE = np.array(
    [
        # format, judge (required), bonus (optional)
        [[1, 0.9, 5], [0, None, 5], [0, 0.2, 6], [1, 0.4, 7]],  # one unscored
        [[1, None, 1], [0, None, 1], [1, 0.7, 1], [1, None, 1]],  # one left
        [[1, 0.1, None], [0, 0.5, 2], [1, None, 3], [0, 0.7, 4]],  # the bonus misses a row that stays
        [[1, 0.1, 3], [0, 0.5, 2], [1, None, None], [0, 0.7, 9]],  # the bonus misses only a row that is out anyway
        [[0, 0.5, None], [0, 0.5, None], [0, 0.5, None], [0, 0.5, None]],  # no spread
        [[1, None, 1], [0, None, 2], [1, None, 3], [1, None, 4]],  # none left
    ],
    dtype=object,
)
WEIGHTS = [0.5, 2.0, 0.25]
ALL_OF_IT = TABLE.reshape(-1, 3)


def expected_advantages(table, scale: str, aggregation: str) -> np.ndarray:
    """Advantages in float64, row by row, from the text of the failure contract and TRL's formulas."""
    sums, per_reward = {}, {}
    for g, group in enumerate(table):
        rows = [i for i, row in enumerate(group) if row[1] is not None]
        usable = [k for k in range(3) if rows and all(group[i][k] is not None for i in rows)]
        if len(rows) < 2 or not usable:
            continue
        for i in rows:
            sums[g, i] = math.fsum(WEIGHTS[k] * group[i][k] for k in usable)
            z = 0.0
            for k in usable:
                values = np.array([group[j][k] for j in rows], dtype=np.float64)
                z += WEIGHTS[k] * (group[i][k] - values.mean()) / (values.std(ddof=1) + 1e-4)
            per_reward[g, i] = z
    out = np.zeros(table.shape[:2])
    if aggregation == "normalize_then_sum":
        values = np.array(list(per_reward.values()))
        for key, z in per_reward.items():
            out[key] = (z - values.mean()) / (values.std(ddof=1) + 1e-4)
        return out.reshape(-1)
    everything = np.array(list(sums.values()))
    for (g, i), value in sums.items():
        own = np.array([v for (h, _), v in sums.items() if h == g])
        spread = {"group": own.std(ddof=1) + 1e-4, "batch": everything.std(ddof=1) + 1e-4, "none": 1.0}[scale]
        out[g, i] = (value - own.mean()) / spread
    return out.reshape(-1)


def fixed(name: str, column: int, required: bool = False, fraction: float | None = None):
    def reward(completions, **_):
        assert len(completions) == len(ALL_OF_IT)
        return [row[column] for row in ALL_OF_IT]

    reward.__name__, reward.required, reward.max_failed_fraction = name, required, fraction
    return reward


def trainer(home, where: Path, rewards, *, guard=None, shared_prefix=False, model=None, rows=None, **config):
    settings = {
        "output_dir": str(where),
        "per_device_train_batch_size": 24,
        "num_generations": 4,
        "max_steps": 1,
        "max_completion_length": 6,
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": False,
        "report_to": "none",
        "remove_unused_columns": False,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    policy, processor = load_tiny(home / "model")
    processor.tokenizer.padding_side = "left"
    return R1VGRPOTrainer(
        model=policy if model is None else model,
        reward_funcs=rewards,
        guard=guard,
        shared_prefix=shared_prefix,
        args=GRPOConfig(**(settings | config)),
        train_dataset=to_prompts(dataset(draw_rows(12)) if rows is None else rows),
        processing_class=processor,
    )


@pytest.mark.parametrize(
    "scale, aggregation",
    [
        ("group", "sum_then_normalize"),
        ("batch", "sum_then_normalize"),
        ("none", "sum_then_normalize"),
        ("group", "normalize_then_sum"),
    ],
)
def test_a_missing_required_reward_is_no_zero_and_has_advantage_exactly_0(home, tmp_path, scale, aggregation):
    made = trainer(
        home,
        tmp_path,
        [fixed("format", 0), fixed("judge", 1, required=True, fraction=1.0), fixed("bonus", 2)],
        reward_weights=WEIGHTS,
        scale_rewards=scale,
        multi_objective_aggregation=aggregation,
    )
    made.train()
    found = made.recorder.take()
    advantages = np.array([r.advantage for r in found])
    np.testing.assert_allclose(advantages, expected_advantages(TABLE, scale, aggregation), rtol=2e-5, atol=2e-6)
    unscored = [row[1] is None for row in ALL_OF_IT]
    assert all(a == 0.0 for a, missing in zip(advantages, unscored, strict=True) if missing)
    assert [r.rewards["judge"] is None for r in found] == unscored
    assert [r.rewards["format"] for r in found] == [float(row[0]) for row in ALL_OF_IT]
    assert [r.group for r in found] == [i // 4 for i in range(24)]
    line = made.state.log_history[0]
    # A reward's mean is over what it scored, rows that another reward threw out included.
    assert line["rewards/format/mean"] == pytest.approx(np.mean([row[0] for row in ALL_OF_IT]))
    scores = [row[1] for row in ALL_OF_IT if row[1] is not None]
    assert line["rewards/judge/mean"] == pytest.approx(np.mean(scores))
    assert line["rewards/judge/unscored"] == pytest.approx(1 - len(scores) / 24)


def test_comparable_leaves_complete_rewards_alone():
    rewards = torch.arange(24, dtype=torch.float32).view(12, 2)
    assert torch.equal(comparable(rewards, [True, False], 4), rewards)


# --- sampling --------------------------------------------------------------------------------------------------


def test_sampling_is_the_recipes_not_the_checkpoints(home, tmp_path):
    """The published checkpoints' generation configs are near-greedy: left to them, all rollouts are equal."""
    assert load_tiny(home / "model")[0].generation_config.top_k == 1
    made = trainer(home, tmp_path, [grpo_worker.Letters()], per_device_train_batch_size=8, num_generations=8)
    assert made.model.generation_config.top_k is None and made.model.generation_config.repetition_penalty is None
    made.train()
    assert len({r.completion for r in made.recorder.take()}) == 8
    ids = made._tokenizer.convert_tokens_to_ids
    assert set(made.eos_token_ids) == {ids("<|im_end|>"), ids("<|endoftext|>")}


def test_judging_overlaps_other_rewards(home, tmp_path):
    asked, counted = threading.Event(), threading.Event()

    def counts(completions, **_):  # needs the judge to have been asked, which TRL does after all synchronous rewards
        scores = [float(asked.wait(20))] * len(completions)
        counted.set()
        return scores

    async def judge(completions, **_):
        asked.set()
        return [float(await asyncio.to_thread(counted.wait, 20))] * len(completions)

    config = {"per_device_train_batch_size": 4, "max_completion_length": 2}
    made = trainer(home, tmp_path, [counts, judge], **config)
    made.train()
    assert all(r.rewards == {"counts": 1.0, "judge": 1.0} for r in made.recorder.take())


def test_images_are_not_gathered_for_a_table_that_is_off(home, tmp_path, monkeypatch):
    sent = []
    gather = trl.trainer.grpo_trainer.gather_object
    monkeypatch.setattr(trl.trainer.grpo_trainer, "gather_object", lambda x: (sent.append(x), gather(x))[1])
    for kept in (False, True):
        sent.clear()
        made = trainer(
            home, tmp_path / str(kept), [grpo_worker.Letters()], per_device_train_batch_size=4, max_completion_length=2,
            log_completions=kept,
        )  # fmt: skip
        made.train()
        images = [x for rows in sent for row in rows if isinstance(row, list) for x in row if isinstance(x, Image)]
        assert bool(images) == kept


@pytest.mark.parametrize("shared_prefix", [False, True])
def test_visual_tokens_are_never_sampled(home, tmp_path, shared_prefix):
    model = load_tiny(home / "model")[0]
    with torch.no_grad():
        model.lm_head.weight.normal_(std=1e-6)  # every token as likely as any other
    made = trainer(
        home, tmp_path, [grpo_worker.Letters()], model=model, shared_prefix=shared_prefix, max_completion_length=40
    )
    seen = []
    original = made._calculate_rewards
    made._calculate_rewards = lambda *a: (seen.extend(t for ids in a[-1] for t in ids), original(*a))[1]
    made.train()
    forbidden = set(made._tokenizer.convert_tokens_to_ids(list(family.of(made.model.config).placeholders)))
    assert len(seen) > 700 and len(set(seen)) > 200
    assert not forbidden & set(seen)


def test_keyed_draws_have_the_distribution_and_do_not_depend_on_the_layout():
    probs = torch.tensor([[0.1, 0.0, 0.6, 0.3, 0.0]]).expand(2000, -1)
    with keyed_draws((7, 0, 3), range(2000), 2):
        tokens = [torch.multinomial(probs, num_samples=1)[:, 0] for _ in range(2)]
    for drawn in tokens:
        share = torch.bincount(drawn, minlength=5) / 2000
        assert torch.allclose(share, probs[0], atol=0.04) and share[1] == 0 and share[4] == 0
    assert not torch.equal(*tokens)
    with keyed_draws((7, 0, 3), range(1000, 2000), 2):
        assert torch.equal(torch.multinomial(probs[:1000], num_samples=1)[:, 0], tokens[0][1000:])
    with keyed_draws((7, 0, 4), range(2000), 2):
        assert not torch.equal(torch.multinomial(probs, num_samples=1)[:, 0], tokens[0])
    assert torch.multinomial(probs[:3], 2).shape == (3, 2)  # itself again


# --- prompt lengths --------------------------------------------------------------------------------------------


def test_prompt_lengths_are_the_processors_own(home, tmp_path, monkeypatch):
    monkeypatch.setenv("R1V_CACHE", str(tmp_path))
    _, processor = tiny_model()
    rows = draw_rows(6, sizes=((56, 56), (300, 40), (28, 200), (500, 500)))
    rows[1]["images"], rows[2]["images"] = [], [draw(1, (70, 50)), draw(2, (33, 91))]
    rows[3]["problem"] = "Grüße, 你好 <|image_pad|>?".replace("<|image_pad|>", "") * 20
    lengths = prompt_lengths(dataset(rows), processor)
    for row, length in zip(rows, lengths, strict=True):
        text = processor.apply_chat_template(
            build_messages(row["problem"], len(row["images"])), tokenize=False, add_generation_prompt=True
        )
        assert length == len(processor(text=[text], images=row["images"] or None)["input_ids"][0])
    assert prompt_lengths(dataset(rows), processor) == lengths  # from the cache
    processor.image_processor.size = {"shortest_edge": 784, "longest_edge": 784}
    assert prompt_lengths(dataset(rows), processor) != lengths  # other pixel limits, other lengths


def test_long_prompts_are_dropped_and_counted_never_cut(home):
    _, processor = tiny_model()
    rows = draw_rows(4)
    rows[2]["problem"] *= 50
    kept, dropped = drop_long_prompts(dataset(rows), processor, 200)
    assert (kept["id"], dropped) == (["row-0-0", "row-0-1", "row-0-3"], 1)
    assert drop_long_prompts(dataset(rows), processor, None)[1] == 0
    with pytest.raises(DataError, match=r"no row fits .* = 20: all 4"):
        drop_long_prompts(dataset(rows), processor, 20)


# --- the worker ------------------------------------------------------------------------------------------------


def test_a_whole_run(home, tmp_path, made_up, monkeypatch):
    heldout = {"path": str(home / "data"), "split": "test", "limit": 5}
    recipe, run = start(home, tmp_path / "run", show_rollouts=2, **{"data.heldout": heldout})
    # Whoever started this may be gone before its end.
    told = replace(Attempt.of(run), seconds={"train the judge": 60.2}, launched=time.monotonic() - 100)
    grpo.main(recipe, told)
    assert run.status["state"] == "finished" and run.status["step"] == 2
    lines = metrics(run)
    assert [line["step"] for line in lines] == [1, 2]
    wanted = ["reward", "reward_std", "rewards/format/mean", "rewards/feedback/mean", "completions/mean_length", "kl"]
    assert all(
        set([*wanted, "loss", "step_time", "grad_norm", "learning_rate", "judge/calls"]) <= set(x) for x in lines
    )
    for step in (1, 2):
        found = rollouts(run, step)
        assert len(found["id"]) == 8 and set(found["step"]) == {step}
        scored = [v for v in found["rewards/feedback"] if v is not None]
        assert len(scored) >= 4 and np.mean(scored) == pytest.approx(lines[step - 1]["rewards/feedback/mean"])
    summary = read_json(run.summary)
    for how in ("greedy", "sampled"):
        assert set(summary["heldout_accuracy"][how]) == {"before", "after"}
    seconds = summary["seconds"]
    assert list(seconds)[:3] == ["train the judge", "grpo", "load"] and 100 <= seconds["grpo"] < 200
    assert set(seconds) >= {"held-out before", "train", "held-out after", "save"}
    samples = [s for _, s in read_jsonl(run.logs / "samples.jsonl")]
    assert len(samples) == 4 and samples[0]["id"] != samples[1]["id"]

    model = AutoModelForImageTextToText.from_pretrained(run.final)
    processor = AutoProcessor.from_pretrained(run.final)
    assert processor.chat_template and set(model.generation_config.eos_token_id) == {
        processor.tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")
    }
    size = processor.image_processor.size
    assert (size["shortest_edge"], size["longest_edge"]) == (784, 84 * 84)  # the recipe's limits, kept
    found = contract.read(run.final)
    assert found["template_hash"] == template_hash() and found["sampling"]["temperature"] == 1.0
    assert [r["name"] for r in found["rewards"]] == ["format", "feedback"] and found["data"]["sha256"]


@pytest.mark.parametrize("shared_prefix", [False, True])
def test_lora_trains_an_adapter_that_loads(home, tmp_path, made_up, shared_prefix):
    lora = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    recipe, run = start(home, tmp_path, shared_prefix=shared_prefix, beta=0.1, **{"model.lora": lora})
    grpo.main(recipe, Attempt.of(run))
    assert metrics(run)[0]["kl"] == pytest.approx(0, abs=1e-6) and metrics(run)[1]["grad_norm"] > 0
    assert (run.final / "adapter_model.safetensors").is_file() and not (run.final / "model.safetensors").exists()
    model = AutoModelForImageTextToText.from_pretrained(run.final)
    changed = [v for k, v in model.state_dict().items() if "lora_B" in k]
    assert changed and any(v.abs().max() > 0 for v in changed)
    AutoProcessor.from_pretrained(run.final)


TINY_STEPS = {"learning_rate": 1e-6, "lr_scheduler_type": "constant", "save_steps": 2}


@pytest.mark.parametrize(("dtype", "shared_prefix"), [("bfloat16", True), ("float16", True), ("bfloat16", False)])
def test_steps_smaller_than_a_16_bit_weight_can_tell_are_not_lost(home, tmp_path, made_up, dtype, shared_prefix):
    """Weights in bfloat16 without 32-bit copies would keep 99 of 100 steps of 1e-6 from ever being taken."""
    recipe, run = start(home, tmp_path, shared_prefix=shared_prefix, **TINY_STEPS, **{"model.dtype": dtype})
    grpo.main(recipe, Attempt.of(run))
    before, saved, final = (
        weights_of(home / "model"),
        weights_of(run.checkpoints / "checkpoint-2"),
        weights_of(run.final),
    )
    moved = sum(int((saved[k] != before[k]).sum()) for k in saved) / sum(v.numel() for v in saved.values())
    assert moved > 0.9
    for name, value in final.items():
        assert saved[name].dtype == torch.float32 and value.dtype == getattr(torch, dtype)
        assert torch.equal(value, saved[name].to(value.dtype))
    assert AutoModelForImageTextToText.from_pretrained(run.final).dtype == getattr(torch, dtype)


def test_an_adapter_on_16_bit_weights_is_trained_in_32(home, tmp_path, made_up):
    lora = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    recipe, run = start(home, tmp_path, **TINY_STEPS, **{"model.dtype": "bfloat16", "model.lora": lora})
    grpo.main(recipe, Attempt.of(run))
    saved = load_file(run.checkpoints / "checkpoint-2" / "adapter_model.safetensors")
    assert {v.dtype for v in saved.values()} == {torch.float32}
    assert all(0 < v.abs().max() < 1e-5 for k, v in saved.items() if "lora_B" in k)


def test_measuring_does_not_disturb_training(home, tmp_path, made_up):
    plain = start(home, tmp_path / "plain")
    heldout = {"path": str(home / "data"), "split": "test", "limit": 3}
    measured = start(home, tmp_path / "measured", **{"data.heldout": heldout})
    for recipe, run in (plain, measured):
        grpo.main(recipe, Attempt.of(run))
    a, b = (load_file(run.final / "model.safetensors") for _, run in (plain, measured))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_signal_ends_with_a_checkpoint_and_resume_equals_the_uninterrupted_run(home, tmp_path, made_up, monkeypatch):
    """The trap: `--resume` read and ignored."""
    whole = start(home, tmp_path / "whole", max_steps=4)
    grpo.main(whole[0], Attempt.of(whole[1]))
    recipe, run = start(home, tmp_path / "run", max_steps=4)
    with monkeypatch.context() as m:
        m.setattr(grpo, "build_rewards", lambda *a, **k: [grpo_worker.Letters(), SignalInStep(2)])
        with pytest.raises(Interrupted):
            grpo.main(recipe, Attempt.of(run))
    assert run.status["state"] == "interrupted" and [line["step"] for line in metrics(run)] == [1, 2]
    assert (run.checkpoints / "checkpoint-2" / contract.FILE).is_file()
    common._stop.clear()
    rollout_file(run, 3).write_bytes(b"of a step whose checkpoint was never written")
    run.begin(recipes.to_yaml(recipe), resume=True)
    judge = SignalInStep(99)
    monkeypatch.setattr(grpo, "build_rewards", lambda *a, **k: [grpo_worker.Letters(), judge])
    grpo.main(recipe, Attempt.of(run, resume=True))
    assert judge.seen == [2, 3]  # the first two steps were not taken again
    pairs = list(zip(metrics(run), metrics(whole[1]), strict=True))
    assert [a["step"] for a, _ in pairs] == [1, 2, 3, 4]
    for key in ("loss", "grad_norm", "reward", "kl", "learning_rate"):
        assert [a[key] for a, _ in pairs] == [b[key] for _, b in pairs]
    assert rollouts(run, 4) == rollouts(whole[1], 4) and len(rollouts(run, 3)["id"]) == 8
    a, b = load_file(run.final / "model.safetensors"), load_file(whole[1].final / "model.safetensors")
    assert all(torch.equal(a[k], b[k]) for k in a)


class SignalInStep(grpo_worker.Judge):
    """A judge that is there when the signal comes."""

    def __init__(self, step: int):
        self.step = step
        self.seen: list[int] = []

    async def __call__(self, *args, trainer_state, **kwargs):
        self.seen.append(trainer_state.global_step)
        if trainer_state.global_step + 1 == self.step:
            common._stop.set()
        return await super().__call__(*args, trainer_state=trainer_state, **kwargs)


def test_a_signal_that_also_ends_the_judge_ends_with_a_checkpoint(home, tmp_path, made_up, monkeypatch):
    def build(*_, stopping, **__):
        def score(i, trainer_state, **_):
            if trainer_state.global_step == 1:
                common._stop.set()
            return None if stopping() else i / 8

        return [grpo_worker.Letters(), reward_of("feedback", score, required=True, max_failed_fraction=0.25)]

    monkeypatch.setattr(grpo, "build_rewards", build)
    run, _ = stopped_run(home, tmp_path, GuardStop, "8 of 8 rollouts in step 2")
    assert (run.checkpoints / "checkpoint-1" / "trainer_state.json").is_file()


def reward_of(name: str, function, **attributes):
    def reward(completions, **kwargs):
        return [function(i, **kwargs) for i, _ in enumerate(completions)]

    reward.__name__ = name
    for key, value in attributes.items():
        setattr(reward, key, value)
    return reward


@pytest.fixture
def with_rewards(made_up, monkeypatch):
    return lambda *rewards: monkeypatch.setattr(grpo, "build_rewards", lambda *a, **k: list(rewards))


def stopped_run(home, where: Path, error, match: str, **changes):
    recipe, run = start(home, where, **changes)
    with pytest.raises(error, match=match) as caught:
        grpo.main(recipe, Attempt.of(run))
    return run, caught.value


def weights_of(folder: Path) -> dict:
    return load_file(folder / "model.safetensors")


def test_too_many_failed_scores_stop_before_the_weights_change(home, tmp_path, with_rewards):
    failing = reward_of(
        "feedback",
        lambda i, trainer_state, **_: None if i < 3 and trainer_state.global_step == 1 else i / 8,
        required=True,
        max_failed_fraction=0.25,
        failures=["http 503: overloaded"],
    )
    with_rewards(grpo_worker.Letters(), failing)
    run, error = stopped_run(home, tmp_path, GuardStop, "3 of 8 rollouts in step 2 .38%, allowed 25%")
    assert error.exit_code == 5 and "http 503: overloaded" in error.details and "not scored" in error.details[1]
    assert run.status["state"] == "stopped" and "feedback failed" in run.status["reason"]
    assert [line["step"] for line in metrics(run)] == [1]
    assert (run.checkpoints / "checkpoint-1" / "trainer_state.json").is_file()
    found = rollouts(run, 2)
    assert found["rewards/feedback"][:4] == [None, None, None, 3 / 8] and set(found["advantage"]) == {None}
    saved = torch.load(run.checkpoints / "checkpoint-1" / "r1v_state_0.pt", weights_only=True)
    assert saved["carried"]["rollouts"] == {"since": []}  # a resume takes step 2 again: its rollouts count once
    assert not run.final.exists()


def test_failed_scores_below_the_limit_do_not_stop(home, tmp_path, with_rewards):
    with_rewards(
        grpo_worker.Letters(),
        reward_of("feedback", lambda i, **_: None if i < 2 else i / 8, required=True, max_failed_fraction=0.25),
    )
    recipe, run = start(home, tmp_path)
    grpo.main(recipe, Attempt.of(run))
    assert run.status["state"] == "finished"
    assert rollouts(run, 1)["advantage"][:2] == [0.0, 0.0]


def test_a_config_fault_in_a_reward_ends_with_a_checkpoint(home, tmp_path, with_rewards):
    def fault(i, trainer_state, **_):
        if trainer_state.global_step == 1:
            raise UsageError("no such judge")
        return float(i)

    with_rewards(grpo_worker.Letters(), reward_of("feedback", fault))
    run, error = stopped_run(home, tmp_path, UsageError, "no such judge")
    assert error.exit_code == 2 and (run.checkpoints / "checkpoint-1").is_dir()


class Known:
    """A judge that knows the rows: 0.9 for a row's solution about its own image, else 0.1; after `until`, the reverse."""

    __name__ = "feedback"
    required, max_failed_fraction, floor, failures = True, 0.5, 0.0, ()

    def __init__(self, until: int):
        self.asked, self.until = 0, until
        rows = [row for seed in (0, 1) for row in draw_rows(12, seed=seed)]
        self.right = {(row["images"][0].tobytes(), row["problem"]): row["solution"] for row in rows}

    def __call__(self, completions, **_):
        return [i / len(completions) for i, _ in enumerate(completions)]

    def ask(self, items, **_):
        self.asked += 1
        right, wrong = (0.9, 0.1) if self.asked <= self.until else (0.1, 0.9)
        return [right if self.right.get((image.tobytes(), p)) == a else wrong for (image,), p, a in items]


@pytest.mark.parametrize("until", [0, 1, 3])
def test_a_judge_that_fails_its_canaries_is_refused_or_stops_the_run(home, tmp_path, with_rewards, until):
    judge = Known(until)
    with_rewards(grpo_worker.Letters(), judge)
    feedback = {"name": "feedback", "backend": "local", "model": "x", "canaries": {"every_steps": 1, "samples": 8}}
    doc = document(home, max_steps=3) | {"rewards": [{"name": "format"}, feedback]}
    recipe = recipes.validate("grpo", doc, "test")
    run = RunDir(tmp_path)
    run.begin(recipes.to_yaml(recipe))
    if until == 3:
        grpo.main(recipe, Attempt.of(run))
        assert judge.asked == 3 and run.status["state"] == "finished"
    else:
        with pytest.raises(GuardStop if until else UsageError, match="fails its canaries") as caught:
            grpo.main(recipe, Attempt.of(run))
        assert any("FAILED" in line and "right over wrong" in line for line in caught.value.details)
        assert (run.checkpoints / "checkpoint-1").is_dir() == bool(until)
        assert run.metrics.exists() == bool(until)
    found = [line["ok"] for _, line in read_jsonl(run.path / "canaries.jsonl")]
    assert found == ([True] * 3 if until == 3 else [True] * until + [False])


def test_probe_failures_are_known_before_step_1(home, tmp_path, with_rewards):
    def probe():
        raise UsageError("the judge's key is refused")

    with_rewards(grpo_worker.Letters(), reward_of("feedback", lambda i, **_: 0.0, probe=probe))
    run, _ = stopped_run(home, tmp_path, UsageError, "key is refused")
    assert not run.metrics.exists() and not run.checkpoints.exists()


@pytest.mark.parametrize("guard", [True, False])
def test_the_guard_stops_a_collapsed_run(home, tmp_path, with_rewards, guard):
    with_rewards(reward_of("format", lambda i, **_: 1.0), reward_of("feedback", lambda i, **_: 0.5))
    settings = {"patience": 2, "clipped_fraction": 1.0} if guard else None
    if not guard:  # one key turns it off
        recipe, run = start(home, tmp_path, max_steps=3, guard=None)
        grpo.main(recipe, Attempt.of(run))
        assert run.status["state"] == "finished"
        return
    run, error = stopped_run(home, tmp_path, GuardStop, "equal rewards", max_steps=5, guard=settings)
    assert run.status["step"] == 2 and (run.checkpoints / "checkpoint-2").is_dir()
    assert "row-" in error.details[0] and "train.guard" in error.hint
    assert not run.final.exists()


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_stops_before_it_reaches_the_weights(home, tmp_path, with_rewards, monkeypatch, where):
    with_rewards(*grpo_worker.build())
    name = "_compute_loss" if where == "loss" else "_get_grad_norm"
    base = R1VGRPOTrainer.__mro__[[name in vars(c) for c in R1VGRPOTrainer.__mro__[1:]].index(True) + 1]
    original = getattr(base, name)

    def broken(self, *args, **kwargs):
        value = original(self, *args, **kwargs)
        return value * math.nan if self.state.global_step == 1 else value

    monkeypatch.setattr(base, name, broken)
    run, _ = stopped_run(home, tmp_path, GuardStop, f"the {where} is not finite in step 2")
    weights = weights_of(run.checkpoints / "checkpoint-1")
    assert all(torch.isfinite(w).all() for w in weights.values())
    assert len(rollouts(run, 2)["id"]) == 8


def test_too_few_rows_for_one_generation_batch_are_named(home, tmp_path, made_up):
    stopped_run(home, tmp_path, UsageError, "12 rows are fewer than the 13 prompts", prompts_per_device=13)


def test_trl_refusals_are_usage_errors(home, tmp_path, made_up):
    stopped_run(home, tmp_path, UsageError, "can not be both", steps_per_generation=1, generation_batch_size=8)
    stopped_run(home, tmp_path / "later", UsageError, "multimodal", use_transformers_continuous_batching=True)


# --- several ranks ---------------------------------------------------------------------------------------------


def launched(recipe, run: RunDir, *, env: dict | None = None, folder: Path | None = None, resume: bool = False) -> None:
    """The recipe through the real launcher, with the rewards of `grpo_worker`; `folder`: of a node above 0."""
    logs = folder or run.logs
    Attempt(str(run.path), str(logs), resume=resume).write(folder or run.path)
    plan = plans.plan("grpo", recipe, folder or run.path)
    argv = [*plan.argv[:-3], grpo_worker.__file__, plan.argv[-1]]
    path = os.pathsep.join([str(Path(launch.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    added = {"R1V_CACHE": os.environ["R1V_CACHE"], "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    launch.execute(replace(plan, argv=argv, env={**plan.env, **added, **(env or {})}), logs)


FIRST = ("loss", "grad_norm", "reward", "reward_std", "rewards/feedback/mean", "completions/mean_length")


@pytest.fixture(scope="module")
def one_process(home, tmp_path_factory):
    """The first step of 1 process, beta 0.04, half of it accumulated."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(grpo, "build_rewards", grpo_worker.build)
        recipe, run = start(home, tmp_path_factory.mktemp("one"), **EVERY_LAYOUT, prompts_per_device=2)
        grpo.main(recipe, Attempt.of(run))
    return run


# The second step trains on the same rollouts, so its loss is not 0; plain SGD, because Adam's first steps follow the
# sign of gradients that are almost 0.
EVERY_LAYOUT = {"gradient_accumulation_steps": 2, "num_iterations": 2, "shared_prefix": True, "max_steps": 2}
EVERY_LAYOUT |= {"optim": "sgd", "learning_rate": 0.05}


@pytest.mark.parametrize("preset", ["ddp", "zero2", "zero3"])
def test_two_processes_take_the_first_step_of_one(home, tmp_path, one_process, preset):
    layout = {"launch.preset": preset, "launch.processes": 2, "launch.device": "cpu"}
    recipe, run = start(home, tmp_path / "run", **EVERY_LAYOUT, **layout, prompts_per_device=1, save_steps=2)
    launched(recipe, run)
    same_first_step(run, one_process)
    shards = any(run.checkpoints.glob("checkpoint-2/global_step2/*optim*"))
    assert shards == preset.startswith("zero")  # DeepSpeed did run
    AutoModelForImageTextToText.from_pretrained(run.final)
    found, reference = weights_of(run.final), weights_of(one_process.final)
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in reference.items()}
    assert all(torch.allclose(found[k], reference[k], atol=1e-5) for k in found)
    start_weights = weights_of(home / "model")
    assert max((found[k] - start_weights[k]).abs().max() for k in found) > 1e-3
    assert metrics(run)[0]["judge/calls"] == 2 * metrics(one_process)[0]["judge/calls"]  # of both ranks
    assert metrics(run)[0]["judge/latency_p95"] == pytest.approx(1.1)  # the worst of them


def same_first_step(run: RunDir, reference: RunDir) -> None:
    ours, theirs = rollouts(run, 1), rollouts(reference, 1)
    assert ours["completion"] == theirs["completion"] and ours["id"] == theirs["id"]
    assert ours["rewards/feedback"] == theirs["rewards/feedback"] and ours["group"] == theirs["group"]
    np.testing.assert_allclose(ours["advantage"], theirs["advantage"], atol=1e-6)
    first, expected = metrics(run)[0], metrics(reference)[0]
    assert expected["grad_norm"] > 0.01
    for key in FIRST:
        assert first[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-5), key
    second, expected = metrics(run)[1], metrics(reference)[1]
    assert abs(expected["loss"]) > 1e-3
    for key in ("loss", "grad_norm"):  # TRL's kl is a mean of micro-batches, which hold other groups in each layout
        assert second[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), key


def test_two_nodes_of_one_process_take_the_first_step_of_one(home, tmp_path, one_process):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    layout = {"preset": "ddp", "device": "cpu", "processes": 2, "nodes": 2, "main_address": "127.0.0.1"}
    layout = {f"launch.{k}": v for k, v in (layout | {"main_port": port}).items()}
    recipe, run = start(home, tmp_path / "run", **EVERY_LAYOUT, **layout, prompts_per_device=1, save_steps=1)
    second = recipe.model_copy(update={"launch": recipe.launch.model_copy(update={"node_rank": 1})})
    logs = run.path / "nodes" / "1"  # the two share a file system, and a run dir
    write_text(logs / "recipe.yaml", recipes.to_yaml(second))
    errors = []

    def node():
        try:
            launched(second, run, folder=logs)
        except Exception as e:
            errors.append(e)

    thread = threading.Thread(target=node)
    # Signals belong to the main thread, which launches node 0.
    with pytest.MonkeyPatch.context() as m:
        m.setattr(launch, "_Signals", NoSignals)
        thread.start()
        launched(recipe, run)
        thread.join()
    assert not errors
    same_first_step(run, one_process)
    AutoModelForImageTextToText.from_pretrained(run.final)
    assert [step for step, path in checkpoints(run.checkpoints) if not lacking(path)] == [1, 2]
    assert (run.checkpoints / "checkpoint-2" / "r1v_state_1.pt").is_file()


class NoSignals:
    count, again = 0, False

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        return None


@pytest.mark.parametrize(
    "mode, error, match",
    [("failing", GuardStop, "4 of 8 rollouts in step 2"), ("misconfigured", UsageError, "no such")],
)
def test_ranks_stop_together(home, tmp_path, mode, error, match):
    layout = {"launch.preset": "ddp", "launch.processes": 2, "launch.device": "cpu"}
    recipe, run = start(home, tmp_path, prompts_per_device=1, **layout)
    with pytest.raises(error, match=match):
        launched(recipe, run, env={"R1V_TEST_JUDGE": mode})
    codes = [read_json(run.logs / f"rank-{k}.error.json")["exit_code"] for k in (0, 1)]
    assert codes == [error.exit_code] * 2
    assert run.status["state"] == "stopped" and run.status["step"] == 1
    assert (run.checkpoints / "checkpoint-1" / "model.safetensors").is_file()
    if mode == "failing":
        assert [v is None for v in rollouts(run, 2)["rewards/feedback"]] == [False] * 4 + [True] * 4
        run.begin(recipes.to_yaml(recipe), resume=True)
        launched(recipe, run, env={"R1V_TEST_JUDGE": "some"}, resume=True)  # the judge is back
        assert [line["step"] for line in metrics(run)] == [1, 2] and run.status["state"] == "finished"
