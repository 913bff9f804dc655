"""Trackers as they are: wandb without a network, tensorboard, trackio where it can be; and ones that fail."""

import json
import os
import sqlite3
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import grpo_worker
import pytest
from tiny_models import draw_rows, save_tiny, write_rows
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from r1vfree_cli.config import recipes
from r1vfree_cli.core.errors import UsageError
from r1vfree_cli.core.files import read_jsonl
from r1vfree_cli.run.attempt import Attempt
from r1vfree_cli.run.run_dir import RunDir
from r1vfree_cli.training import grpo, sft
from r1vfree_cli.training import worker as common

pytestmark = pytest.mark.xdist_group("trackers")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    root = tmp_path_factory.mktemp("trackers")
    save_tiny(root / "model")
    for split in ("train", "test"):
        write_rows(root / "data", draw_rows(4), split)
    return root


def begin(home: Path, where: Path, stage: str = "grpo", **train):
    """(recipe, run dir) of two steps; the recipe's text is recognised by its learning rate."""
    document = {
        "model": {"name": str(home / "model"), "dtype": "float32", "min_pixels": 784, "max_pixels": 84 * 84},
        "data": {"path": str(home / "data")},
        "train": {"max_steps": 2, "logging_steps": 1, "save_steps": 1, "learning_rate": 0.00123} | train,
        "launch": {"preset": "cpu"},
    }
    document["train"]["gradient_checkpointing"] = False
    if stage == "grpo":
        document["rewards"] = [{"name": "format"}, {"name": "accuracy"}]
        document["train"] |= {"num_generations": 2, "max_completion_length": 4}
        document["data"]["heldout"] = {"path": str(home / "data"), "limit": 2}
    else:
        document["train"] |= {"per_device_train_batch_size": 2, "dataloader_num_workers": 0}
    recipe = recipes.validate(stage, document, "test")
    run = RunDir(where)
    run.begin(recipes.to_yaml(recipe))
    return recipe, run


@pytest.fixture
def here(monkeypatch):
    """The worker in this process, with rewards that are made up."""
    monkeypatch.setattr(grpo, "build_rewards", grpo_worker.build)
    monkeypatch.setattr(common, "_stop", threading.Event())


def failing(phase: str):
    """A tracker that fails in one phase of a run: a class of its own, as transformers keeps them."""

    def fail(*_, **__):
        raise RuntimeError(f"no network in {phase}")

    return type(f"{phase.title().replace('_', '')}Callback", (TrainerCallback,), {phase: fail})


PHASES = ("__init__", "on_train_begin", "on_log", "on_save", "on_train_end")


def test_wandb_and_tensorboard_get_all_of_a_run_and_those_that_fail_cost_nothing(
    home, tmp_path, here, monkeypatch, capsys
):
    """Curves, held-out figures, a table with images, the recipe and the names; failures in every phase are warnings."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    for phase in PHASES:
        monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, phase, failing(phase))
    recipe, run = begin(
        home, tmp_path / "my run", report_to=["wandb", *PHASES, "tensorboard"], log_completions=True,
        num_completions_to_print=3,
    )  # fmt: skip
    grpo.main(recipe, Attempt.of(run))
    assert run.status["state"] == "finished" and (run.final / "model.safetensors").is_file()
    said = capsys.readouterr().err
    for phase in PHASES:
        assert said.count(f"no network in {phase}") == 1, said
    assert said.count("failed and is left out") == len(PHASES)
    reward = next(line for _, line in read_jsonl(run.metrics))["reward"]

    logged = next((run.path / "wandb").glob("offline-run-*/*.wandb"))
    assert f"wandb sync {logged.parent}" in said
    text = logged.read_bytes()
    for part in (
        "r1v",
        "my run",
        "0.00123",
        "train/reward",
        "train/grad_norm",
        "eval/heldout_accuracy_greedy",
        "rollouts",
    ):
        assert part.encode() in text, part
    assert repr(reward)[:8].encode() in text
    tables = sorted((logged.parent / "files" / "media" / "table").glob("*.json"))
    table = json.loads(tables[0].read_text())
    assert len(tables) == 2 and len(table["data"]) == 2
    row = dict(zip(table["columns"], table["data"][0], strict=True))
    assert row["step"] == 1 and row["question"] in {r["problem"] for r in draw_rows(4)}
    assert {"completion", "format", "advantage", "image"} <= row.keys()
    assert b"run_table" in text and b"media/images/" in text  # images travel in the artifact that holds the table

    assert f"tensorboard --logdir {run.path / 'tensorboard'}" in said
    events = EventAccumulator(str(run.path / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert events.Scalars("train/reward")[0].value == pytest.approx(reward)
    assert len(events.Scalars("eval/heldout_accuracy_greedy")) == 2  # before and after
    assert [e.step for e in events.Images("rollouts/0")] == [1, 2]
    assert b"0.00123" in events.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0]
    assert not {"runs", "completions"} & {p.name for p in run.checkpoints.iterdir()}


def test_sft_has_them_too_and_an_unknown_one_is_refused(home, tmp_path, here):
    recipe, run = begin(home, tmp_path / "run", "sft", report_to="tensorboard")
    sft.main(recipe, Attempt.of(run))
    assert list((run.path / "tensorboard").glob("events.*"))
    recipe, run = begin(home, tmp_path / "other", "sft", report_to="wandbb")
    with pytest.raises(UsageError, match="wandbb is not supported"):
        sft.main(recipe, Attempt.of(run))


@pytest.mark.skipif(find_spec("trackio") is None, reason="trackio is not installed: 0.43 needs pillow below 13")
def test_trackio_gets_all_of_a_run(home, tmp_path):
    _, run = begin(home, tmp_path / "my-run", report_to="trackio", log_completions=True)
    Attempt.of(run).write(run.path)
    env = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "ACCELERATE_USE_CPU": "true"}
    worker = subprocess.run([sys.executable, grpo_worker.__file__, str(run.path)], env=env, capture_output=True)
    assert worker.returncode == 0, (run.logs / "rank-0.log").read_text()[-3000:]
    assert (run.final / "model.safetensors").is_file()
    said = " ".join(line["text"] for _, line in read_jsonl(run.logs / "said.jsonl"))
    assert "trackio show --project r1v" in said and "failed" not in said
    with sqlite3.connect(tmp_path / "trackio" / "r1v.db") as db:
        text = "\n".join(str(row) for table in ("metrics", "configs") for row in db.execute(f"SELECT * FROM {table}"))
    for part in ("my-run", "train/reward", "eval/heldout_accuracy_greedy", "trackio.table", "0.00123"):
        assert part in text, part
    assert list((tmp_path / "trackio" / "media").rglob("*.png"))
