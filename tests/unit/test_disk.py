"""What the checkpoints of a run take, and runs that would not fit."""

import json
from pathlib import Path

import pytest

from r1vfree_cli.config import recipes
from r1vfree_cli.launch import disk, preflight

B3 = 3_754_622_976  # parameters of Qwen2.5-VL-3B


def load(*sets):
    return recipes.load("grpo", "qwen25vl-3b-rlhfv", ["launch.preset=zero3", *sets])


@pytest.mark.parametrize("name", recipes.shipped())
def test_every_recipe_bounds_its_checkpoints(name):
    stage, short = name.split("/")
    if stage != "eval":
        assert recipes.load(stage, short).train.model_extra["save_total_limit"] == 2


@pytest.mark.parametrize(
    ("sets", "bytes_each"),
    [
        (["launch.preset=zero3"], 14),  # 16-bit weights; 32-bit weights and two moments
        (["launch.preset=zero2"], 16),  # DeepSpeed's file holds the 16-bit weights again
        (["launch.preset=ddp"], 12),  # float32 weights and two moments
        (["train.save_only_model=true"], 2),
        (["launch.preset=ddp", "model.lora={r: 16}"], 0.12),
    ],
)
def test_bytes_of_a_checkpoint(sets, bytes_each):
    assert disk.checkpoint_bytes(load(*sets), B3) == pytest.approx(bytes_each * B3, rel=1e-6)


@pytest.mark.parametrize(
    ("sets", "most"),
    [
        ([], 3),  # the new one is complete before the oldest goes
        (["train.max_steps=100"], 1),
        (["train.max_steps=5000", "train.save_total_limit=null"], 50),
        (["train.max_steps=1000", "train.save_total_limit=null", "train.save_steps=0.1"], 10),
        (["train.save_strategy=epoch", "train.save_total_limit=null"], 10),
        (["train.save_strategy='no'"], 0),
        (["train.save_total_limit=null"], None),
    ],
)
def test_checkpoints_at_once(sets, most):
    assert disk.checkpoints_at_once(load(*sets)) == most


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A folder whose safetensors say that they hold a 3B model."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    header = json.dumps({"__metadata__": {}, "w": {"dtype": "BF16", "shape": [2, B3 // 2], "data_offsets": [0, 0]}})
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode())
    return folder


def findings(model, where, *sets):
    return preflight.check(load(f"model.name={model}", *sets), where=where)


def test_a_run_that_cannot_fit_is_refused(model, tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "disk_free", lambda path: 150_000_000_000)
    [error] = [e for e in findings(model, tmp_path / "run").errors if e.startswith("disk")]
    assert "3 of them and the final model 165" in error and "150 free" in error
    monkeypatch.setattr(disk, "disk_free", lambda path: 170_000_000_000)
    assert not [e for e in findings(model, tmp_path / "run").errors if e.startswith("disk")]
    [warning] = [w for w in findings(model, tmp_path, "train.save_total_limit=null").warnings if "save_total" in w]
    assert "every checkpoint is kept" in warning and "52.6 GB" in warning


def test_checkpoints_of_an_earlier_attempt_are_not_counted_twice(model, tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "disk_free", lambda path: 0)
    old = tmp_path / "run" / "checkpoints" / "checkpoint-1" / "model.safetensors"
    old.parent.mkdir(parents=True)
    with open(old, "wb") as f:
        f.truncate(166_000_000_000)  # takes no space
    assert not [e for e in findings(model, tmp_path / "run").errors if e.startswith("disk")]


@pytest.mark.parametrize(
    "content", [b"", b"\x10\0\0\0\0\0\0\0", (1 << 62).to_bytes(8, "little") + b"{}", b"\x02\0\0\0\0\0\0\0[]"]
)
def test_damaged_weights_are_not_counted(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert disk.parameters(tmp_path) == 0


def test_a_model_that_is_not_here_is_unchecked():
    found = preflight.check(load("model.name=nobody/has-this-3B"), dry_run=True, where=Path("runs"))
    assert any(line.startswith("disk") for line in found.unchecked)
