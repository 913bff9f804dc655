"""`r1v doctor` through its own processes: a machine, a recipe that is ready, one that is not, a full disk; memory by hand."""

import os
import shutil
from collections import namedtuple
from types import SimpleNamespace

import pyarrow.parquet
import pytest
import yaml
from tiny_models import draw_rows, save_tiny, write_rows
from transformers import AutoTokenizer, Qwen2_5_VLConfig

from r1vfree_cli.config import recipes
from r1vfree_cli.data.load import load_rows
from r1vfree_cli.doctor import checks as doctor
from r1vfree_cli.doctor import probe
from r1vfree_cli.doctor.checks import diagnose
from r1vfree_cli.doctor.probe import memory_estimate
from r1vfree_cli.launch import job as jobs
from r1vfree_cli.models.lengths import prompt_lengths
from r1vfree_cli.models.load import load_processor
from r1vfree_cli.run.attempt import Attempt
from r1vfree_cli.training import grpo

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe with a small local model and local data; its path."""
    root = tmp_path_factory.mktemp("doctor")
    save_tiny(root / "model")
    write_rows(root / "data", draw_rows(12))
    train = {
        "num_generations": 2,
        "prompts_per_device": 1,
        "max_completion_length": 8,
        "beta": 0.0,
        "learning_rate": 1e-4,
    }
    document = {
        "model": {"name": str(root / "model"), "dtype": "float32", "min_pixels": 784, "max_pixels": 84 * 84},
        "data": {"path": str(root / "data")},
        "rewards": [{"name": "format"}],
        "train": train | {"gradient_checkpointing": False},
        "launch": {"preset": "cpu"},
    }  # fmt: skip
    path = root / "r.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("R1V_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def lines(result: dict, state: str) -> dict[str, str]:
    return {c["name"]: c["found"] for c in result["checks"] if c["state"] == state}


def test_a_ready_recipe_is_tried_to_the_end_of_a_step_and_leaves_nothing(recipe, tmp_path):
    result = diagnose(str(recipe), step=True)
    assert result["ready"], result
    ok = lines(result, "ok")
    assert ok["prompt tokens"].startswith("12 rows: ") and "one step" in ok and "memory" in ok and "cuda" in ok
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]


def test_a_trial_step_takes_the_longest_rows_at_full_length(recipe, monkeypatch):
    """What makes the peak of memory, also where the policy would end at once."""
    tokenizer = AutoTokenizer.from_pretrained(recipe.parent / "model")
    chatty = {tokenizer.eos_token_id, tokenizer.encode("a")[0]}  # half of all tokens drawn are the end
    others = sorted(set(range(len(tokenizer))) - chatty)
    seen, run = {}, jobs.run

    def watched(stage, recipe, where, **more):
        summary = run(stage, recipe, where, **more)
        (file,) = where.rollout_files.values()
        seen["rollouts"] = pyarrow.parquet.read_table(file).to_pylist()
        return summary

    monkeypatch.setattr(jobs, "run", watched)
    sets = [f"train.generation_kwargs={{suppress_tokens: {others}}}", "train.mask_truncated_completions=true"]
    result = diagnose(str(recipe), sets, step=True)
    assert result["ready"], result
    assert [r["tokens"] for r in seen["rollouts"]] == [8, 8]
    loaded = recipes.load("grpo", str(recipe))
    rows = load_rows(loaded.data.path, "train", None)
    lengths = prompt_lengths(rows, load_processor(loaded.model, loaded.seed), loaded.policy_prompt)
    assert seen["rollouts"][0]["id"] == rows["id"][lengths.index(max(lengths))]


@pytest.mark.parametrize(("vllm", "least"), [(False, "min_new_tokens"), (True, "min_tokens")])
def test_a_trial_step_leaves_nothing_out_of_its_passes(vllm, least, recipe, tmp_path, monkeypatch):
    """Completions that are cut may be masked in training, and groups of equal rewards skipped."""
    monkeypatch.setattr(grpo, "R1VGRPOTrainer", lambda **given: SimpleNamespace(_may_skip_idle=True))
    sets = ["train.mask_truncated_completions=true", "train.generation_kwargs={a: 1}", f"train.use_vllm={vllm}"]
    loaded = recipes.load("grpo", str(recipe), sets)
    for trial in (True, False):
        training = grpo.GrpoTraining(loaded, Attempt(str(tmp_path), str(tmp_path), trial=trial))
        training.rewards, training.rows = [], load_rows(loaded.data.path, "train", None)
        args = training.config()
        assert args.generation_kwargs == {"a": 1} | ({least: 8} if trial else {})
        assert args.mask_truncated_completions != trial
        assert training.make_trainer()._may_skip_idle != trial


def test_what_would_stop_the_run_is_an_error(recipe, monkeypatch):
    """A judge that is not there; a preset without its GPUs; a model that only the hub has: each is one line."""
    chat = "rewards=[{name: feedback, backend: chat, model: m, base_url: 'http://127.0.0.1:9/v1', step_deadline_s: 1}]"
    down = diagnose(str(recipe), [chat])
    assert not down["ready"] and "127.0.0.1:9" in lines(down, "error")["judge"], down
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    far = diagnose("qwen25vl-3b-rlhfv")
    errors = lines(far, "error")
    assert "8 GPUs" in errors["preflight"] and "Qwen/Qwen2.5-VL-3B-Instruct" in errors["memory"], far
    assert not far["ready"] and "probe" not in errors


def test_a_hub_out_of_reach_is_waited_for_once(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    result = diagnose()
    assert "not reached" in lines(result, "warning")["hub"] and "wandb login" in lines(result, "ok")
    assert os.environ["HF_HUB_OFFLINE"] == "1"  # the libraries' word for it, in this process and in those it starts


def test_the_canaries_that_failed_are_a_table(recipe, capsys):
    judge = f"{{name: feedback, backend: local, model: {recipe.parent / 'model'}, canaries: {{max_empty_score: -1, samples: 4}}}}"
    asked, canaries = probe.judge_check(recipes.load("grpo", str(recipe), [f"rewards=[{judge}]"]), None)
    assert (asked["state"], canaries["state"]) == ("ok", "error") and "max_empty_score" in canaries["hint"]
    doctor.show({"checks": [canaries]})
    told = capsys.readouterr().out.splitlines()
    assert told[0].split() == ["error", "canaries", "the", "judge", "fails", "its", "canaries"]
    assert sum("FAILED    template: " in line for line in told) == 4 and told[-1].strip().startswith("hint: ")
    assert all(line.startswith(" " * 25) for line in told[1:])


def test_a_full_disk_is_said_before_anything_is_written(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 10**12 - 10**6, 10**6))
    result = diagnose(str(recipe), step=True)
    assert not result["ready"] and "0.001 GB free" in lines(result, "error")["disk, here"]
    assert list(tmp_path.iterdir()) == []


TEXT = {
    "3b": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064},
}  # fmt: skip
PARAMETERS = {"3b": 3_754_622_976, "7b": 8_292_166_656}  # of the published checkpoints
# Bytes a parameter on one of 6 processes, bfloat16: weights, gradients, optimizer, reference.
BYTES = {
    "ddp": (4, 8, 8, 4),  # float32; DDP's buckets hold the gradients again
    "zero1": (2, 2, 12 / 6, 2),
    "zero2": (2, 2 / 6, 12 / 6, 2),
    "zero3": (2 / 6, 2 / 6, 12 / 6, 2 / 6),
}


@pytest.mark.parametrize("kind", ["3b", "7b"])
def test_memory_is_what_a_calculation_by_hand_gives(kind, tmp_path):
    tied = kind == "3b"
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": TEXT[kind]["hidden_size"]}
    Qwen2_5_VLConfig(text_config=TEXT[kind] | {"tie_word_embeddings": tied}, vision_config=vision, tie_word_embeddings=tied).save_pretrained(tmp_path)  # fmt: skip

    def estimate(*sets):
        return memory_estimate(recipes.load("grpo", "qwen25vl-3b-rlhfv", [f"model.name={tmp_path}", *sets]), 512)

    billions = PARAMETERS[kind] / 1e9
    for preset, each in BYTES.items():
        found = estimate(f"launch.preset={preset}")
        parts = [found[k] for k in ("weights", "gradients", "optimizer", "reference")]
        assert parts == pytest.approx([b * billions for b in each], rel=1e-6), preset
    offload = estimate("launch.preset=zero3-offload")
    assert offload["host"] == pytest.approx(18 / 6 * billions) and "weights" not in offload
    # 512 + 8 x 512 tokens share a prompt; 401408 pixels are 2048 patches. Bytes a layer keeps of each: MLP and norms.
    h, inner, layers = (TEXT[kind][k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    tokens = 4608 * layers * (8 * inner + 21 * h)
    tokens += 8 * (512 + 512) * layers * 2 * 2 * h  # keys and values that each branch sees, for all query heads
    patches = 2048 * 32 * (8 * 3420 + 31 * 1280)
    assert offload["activations"] == pytest.approx((tokens + patches) / 1e9)
    assert estimate("train.shared_prefix=false")["activations"] > 1.5 * offload["activations"]
    assert estimate("train.gradient_checkpointing=true")["activations"] < 0.1 * offload["activations"]
