"""What a checkpoint argument means, and whether its bytes are those that were written; no model is loaded."""

import json
import os

import pytest

from r1vfree_cli.core.errors import DataError
from r1vfree_cli.launch import preflight
from r1vfree_cli.run import checkpoint, contract
from r1vfree_cli.run.run_dir import RunDir


def make(folder, *, adapter=False, trained=False):
    folder.mkdir(parents=True)
    name = "adapter_model.safetensors" if adapter else "model.safetensors"
    (folder / name).write_bytes(bytes(range(256)) * 2000)
    settings = {"peft_type": "LORA", "base_model_name_or_path": "org/base"} if adapter else {}
    (folder / (checkpoint.ADAPTER if adapter else "config.json")).write_text(json.dumps(settings))
    if trained:
        (folder / "trainer_state.json").write_text("{}")
        checkpoint.seal(folder)
    return folder


@pytest.mark.parametrize(
    "listed", ['{"x": Infinity}', '{"' + "y" * 5000 + '": {"bytes": 1}}', '{"x": NaN}', "[]", '{"x": []}']
)
def test_a_file_list_that_was_edited_is_damage(listed, tmp_path):
    (tmp_path / "r1v_files.json").write_text(listed)
    assert checkpoint.damage(tmp_path) and checkpoint.lacking(tmp_path)


def test_a_mistyped_run_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    """`runs/tril` has the form of a hub name; where runs lie beside it, it is one of them."""
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "Qwen" / "Qwen2.5-VL-3B")  # models that were copied here do not hide the hub's
    assert checkpoint.resolve("Qwen/Qwen2.5-VL-7B").kind == "hub"
    make(tmp_path / "runs" / "trial" / "final")
    (tmp_path / "runs" / "trial" / "recipe.yaml").write_text("")
    with pytest.raises(DataError, match="no checkpoint at runs/tril") as told:
        checkpoint.resolve("runs/tril")
    assert told.value.hint == "did you mean runs/trial?"


def test_every_meaning_of_a_name(tmp_path):
    model, adapter = make(tmp_path / "model"), make(tmp_path / "adapter", adapter=True)
    contract.write(model, {"schema": 1, "min_pixels": 784})
    found = checkpoint.resolve(str(model))
    assert (found.path, found.kind, found.contract["min_pixels"]) == (str(model), "model", 784) and found.fingerprint
    assert checkpoint.resolve(str(adapter)).kind == "adapter" and checkpoint.adapter_base(adapter) == "org/base"
    assert checkpoint.resolve("org/model") == checkpoint.Checkpoint("org/model", "org/model")
    for name in ("nowhere", "../x/y", str(tmp_path / "none"), "x" * 5000):
        with pytest.raises(DataError, match="no checkpoint at"):
            checkpoint.resolve(name)
    shards = tmp_path / "shards"
    (shards / "global_step1").mkdir(parents=True)
    (shards / "config.json").write_text("{}")
    assert checkpoint.resolve(str(shards), shards=True).kind == "shards"
    with pytest.raises(DataError, match="holds ZeRO shards") as e:
        checkpoint.resolve(str(shards))
    assert f"r1v merge {shards} --out" in e.value.hint


def test_a_run_dir_is_its_final_model_or_refused_with_its_last_complete_checkpoint(tmp_path):
    run = RunDir(tmp_path / "run")
    run.begin("model: {min_pixels: 784, max_pixels: 1568}\n")
    for step in (9, 10, 11):
        folder = make(run.checkpoints / f"checkpoint-{step}", trained=True)
        os.utime(folder, (1e9 - step, 1e9 - step))  # a clock that was set back: the step counts, not the time
    (run.checkpoints / "checkpoint-11" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(DataError, match="has no final/ model") as e:
        checkpoint.resolve(str(run.path))
    last = run.checkpoints / "checkpoint-10"
    assert e.value.hint.endswith(f"its last complete checkpoint is {last}")
    assert checkpoint.resolve(str(last)).contract == {"min_pixels": 784, "max_pixels": 1568}
    make(run.final)
    assert checkpoint.resolve(str(run.path)).path == str(run.final)


def test_complete_means_the_bytes(tmp_path):
    folder = make(tmp_path / "checkpoint-1", trained=True)
    weights = folder / "model.safetensors"
    weights.chmod(0o600)
    checkpoint.seal(folder)
    (tmp_path / "plain").touch()
    assert weights.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert checkpoint.lacking(folder) == []
    before = weights.read_bytes()
    weights.write_bytes(before[:1000] + bytes(256 << 10) + before[1000 + (256 << 10) :])
    assert checkpoint.lacking(folder, verify=False) == []
    assert checkpoint.lacking(folder) == ["model.safetensors has other bytes"]
    with pytest.raises(DataError, match="is damaged: model.safetensors has other bytes") as e:  # noqa: RUF043
        checkpoint.resolve(str(folder))
    assert checkpoint.FILES in e.value.hint
    weights.write_bytes(before[:-1])
    (folder / "trainer_state.json").unlink()
    assert checkpoint.lacking(folder) == ["trainer_state.json missing", "model.safetensors cut"]
    (folder / checkpoint.FILES).write_text("[]")
    assert f"{checkpoint.FILES} cannot be read" in checkpoint.lacking(folder)


def test_lists_of_sizes_alone_are_still_read(tmp_path):
    folder = make(tmp_path / "checkpoint-1", trained=True)
    sizes = {p.name: p.stat().st_size for p in folder.iterdir() if p.name != checkpoint.FILES}
    (folder / checkpoint.FILES).write_text(json.dumps(sizes))
    assert checkpoint.lacking(folder) == [] and checkpoint.resolve(str(folder)).kind == "model"
    (folder / "model.safetensors").write_bytes(b"cut")
    assert checkpoint.lacking(folder) == ["model.safetensors cut"]


def test_an_adapter_as_model_name_is_refused_before_the_launch_with_the_command_that_merges_it(tmp_path):
    from r1vfree_cli.config import recipes

    adapter = make(tmp_path / "adapter", adapter=True)
    document = {
        "model": {"name": str(adapter), "dtype": "float32"},
        "data": {"path": "shapes"},
        "train": {},
        "launch": {"preset": "cpu"},
    }
    errors = preflight.check(recipes.validate("sft", document, "of the test"), dry_run=True).errors
    assert any("model.name" in e and f"r1v merge {adapter} --out {adapter}-merged" in e for e in errors), errors
