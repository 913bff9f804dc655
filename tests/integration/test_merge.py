"""Merging on tiny models of the real classes: what comes out answers as what went in, or nothing comes out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from r1vfree_cli.core.errors import DataError, UsageError
from r1vfree_cli.run import checkpoint, contract
from r1vfree_cli.run.run_dir import RunDir
from r1vfree_cli.training import merge

CONTRACT = {"schema": 1, "stage": "grpo", "max_pixels": 7056, "base_model": "somewhere", "template_hash": "abc"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_models.save_tiny(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    """A LoRA adapter that matters, with the trained run's processor and contract beside it."""
    folder = tmp_path_factory.mktemp("adapter") / "final"
    model, processor = tiny_models.load_tiny(base)
    model = get_peft_model(model, LoraConfig(r=3, lora_alpha=7, target_modules="all-linear"))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    processor.image_processor.size = {"shortest_edge": 1568, "longest_edge": 6272}
    processor.save_pretrained(folder)
    contract.write(folder, CONTRACT)
    return folder


def answers(folder: Path) -> torch.Tensor:
    """Logits of a model folder, on images and text that `merge` does not use itself."""
    model, processor = tiny_models.load_tiny(folder)
    inputs = processor(
        text=["<|vision_start|><|image_pad|><|vision_end|>What is it?<|im_end|>"],
        images=[tiny_models.draw(5, (84, 56))],
        return_tensors="pt",
    )
    with torch.no_grad():
        return model(**inputs).logits


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir()]


# --- what comes out --------------------------------------------------------------------------------------------


def test_adapter_becomes_a_model_that_answers_the_same(adapter, base, tmp_path):
    summary = merge.merge(adapter, tmp_path / "out")
    assert (summary["kind"], summary["dtype"], summary["base"]) == ("adapter", "float32", str(base))
    assert summary["max_logit_difference"] <= summary["tolerance"] < 0.01
    assert sorted(os.listdir(tmp_path / "out")) == summary["files"]
    assert leftovers(tmp_path) == ["out"]
    assert not list((tmp_path / "out").glob("adapter*"))
    merged = answers(tmp_path / "out")
    assert torch.allclose(merged, answers(adapter), atol=1e-4)
    assert not torch.allclose(merged, answers(base), atol=1e-2)


def test_processor_limits_template_and_contract_are_carried_on(adapter, tmp_path):
    merge.merge(adapter, tmp_path / "out")
    _, processor = tiny_models.load_tiny(tmp_path / "out")
    assert processor.image_processor.size.longest_edge == 6272  # the trained run's, not the base's
    assert processor.chat_template == tiny_models.tiny_processor().chat_template
    found = contract.read(tmp_path / "out")
    assert {key: found[key] for key in CONTRACT} == CONTRACT and found["merge"]["kind"] == "adapter"


def test_merge_keeps_the_end_token(adapter, base, tmp_path):
    """A merge that lost the end token makes a model that never stops."""
    merge.merge(adapter, tmp_path / "out")
    model, processor = tiny_models.load_tiny(tmp_path / "out")
    before, _ = tiny_models.load_tiny(base)
    assert model.generation_config.eos_token_id == before.generation_config.eos_token_id
    assert model.generation_config.pad_token_id == before.generation_config.pad_token_id is not None
    assert processor.tokenizer.eos_token == "<|im_end|>" and processor.tokenizer.pad_token == "<|endoftext|>"


def test_merge_finds_the_end_token_where_the_base_names_none(base, tmp_path):
    shutil.copytree(base, tmp_path / "in")
    (tmp_path / "in" / "generation_config.json").write_text("{}")
    merge.merge(tmp_path / "in", tmp_path / "out")
    model, processor = tiny_models.load_tiny(tmp_path / "out")
    assert processor.tokenizer.eos_token_id in model.generation_config.eos_token_id
    assert model.generation_config.pad_token_id == processor.tokenizer.pad_token_id


def test_a_written_model_without_end_token_is_refused(base, tmp_path, monkeypatch):
    shutil.copytree(base, tmp_path / "in")
    (tmp_path / "in" / "generation_config.json").write_text('{"eos_token_id": 5}')
    monkeypatch.setattr(merge, "end_tokens", lambda model, tokenizer: [5])
    with pytest.raises(DataError, match="does not end at"):
        merge.merge(tmp_path / "in", tmp_path / "out")
    assert leftovers(tmp_path) == ["in"]


def test_dtype_is_the_bases_or_the_asked_one(adapter, base, tmp_path):
    summary = merge.merge(adapter, tmp_path / "out", dtype="bfloat16")
    assert 0 < summary["max_logit_difference"] <= summary["tolerance"]
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    again = merge.merge(tmp_path / "out", tmp_path / "copy")  # a whole model: a verified copy, bit for bit
    assert (again["kind"], again["dtype"], again["max_logit_difference"]) == ("model", "bfloat16", 0.0)
    first, second = (load_file(tmp_path / f / "model.safetensors") for f in ("out", "copy"))
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    with pytest.raises(UsageError, match="unknown dtype 'int8'"):
        merge.merge(adapter, tmp_path / "no", dtype="int8")


def test_tied_weights_and_the_other_class(tmp_path):
    """Qwen2-VL 2B shares its embedding with the head."""
    tiny_models.save_tiny(tmp_path / "in", "qwen2_vl", dtype=torch.bfloat16)
    assert merge.merge(tmp_path / "in", tmp_path / "out")["dtype"] == "bfloat16"
    assert torch.equal(answers(tmp_path / "in"), answers(tmp_path / "out"))


def test_run_dir_means_its_final_model_else_its_last_complete_checkpoint_is_named(base, tmp_path):
    run = RunDir(tmp_path / "run")
    run.begin("model: {}\n")
    with pytest.raises(DataError, match="has no final/ model") as e:
        checkpoint.resolve(str(run.path))
    assert "no complete checkpoint yet" in e.value.hint
    for step in (9, 10, 11):
        shutil.copytree(base, run.checkpoints / f"checkpoint-{step}")
        if step != 11:
            (run.checkpoints / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    with pytest.raises(DataError, match="has no final/ model") as e:  # as eval says it
        merge.merge(run.path, tmp_path / "out")
    last = run.checkpoints / "checkpoint-10"
    assert str(last) in e.value.hint and checkpoint.resolve(str(last)).kind == "model"
    shutil.copytree(base, run.final)
    assert checkpoint.resolve(str(run.path)).path == str(run.final)


# --- what is refused -------------------------------------------------------------------------------------------


def test_wrong_merge_is_found_and_deleted(adapter, tmp_path, monkeypatch):
    from peft import PeftModel

    # The adapter taken off instead of merged: the base's weights, no error by itself.
    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self: self.unload(), raising=False)
    with pytest.raises(DataError, match="merging the adapter changed the model") as caught:
        merge.merge(adapter, tmp_path / "out")
    assert caught.value.exit_code == 3 and leftovers(tmp_path) == []


def test_wrong_file_is_found_and_deleted(adapter, tmp_path, monkeypatch):
    reload = merge._reload

    def spoiled(folder, processor, inputs):
        weights = load_file(folder / "model.safetensors")
        name = next(n for n in weights if "q_proj.weight" in n)
        save_file(weights | {name: weights[name] * 1.05}, folder / "model.safetensors", metadata={"format": "pt"})
        return reload(folder, processor, inputs)

    monkeypatch.setattr(merge, "_reload", spoiled)
    with pytest.raises(DataError, match="written model is not the merged one"):
        merge.merge(adapter, tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_existing_output_is_kept_unless_overwrite(base, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    merge.merge(base, out)  # empty: fine
    (out / "mine.txt").write_text("kept")
    with pytest.raises(UsageError, match="exists already"):
        merge.merge(base, out)
    assert (out / "mine.txt").exists()
    merge.merge(base, out, overwrite=True)
    assert not (out / "mine.txt").exists() and leftovers(tmp_path) == ["out"]
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("x")
    with pytest.raises(UsageError, match="not a model folder"):
        merge.merge(base, tmp_path / "letters", overwrite=True)
    for place in (base, base.parent):
        with pytest.raises(UsageError, match="holds the checkpoint itself"):
            merge.merge(base, place, overwrite=True)


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("pwned",))


def _break(case: str, folder: Path, base: Path, adapter: Path) -> None:
    """Make `folder` a checkpoint that is broken in one way."""
    if case == "missing folder":
        return
    shutil.copytree(adapter if "adapter" in case else base, folder)
    settings = folder / "adapter_config.json"
    if case == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
    elif case == "pickle":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif case == "truncated":
        os.truncate(folder / "model.safetensors", 20_000)
    elif case == "tensor missing":
        weights = load_file(folder / "model.safetensors")
        weights.pop(next(n for n in weights if "down_proj" in n))
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    elif case == "other shape":
        weights = load_file(folder / "model.safetensors")
        name = next(n for n in weights if "down_proj" in n)
        save_file(
            weights | {name: weights[name].T.contiguous()}, folder / "model.safetensors", metadata={"format": "pt"}
        )
    elif case == "config not json":
        (folder / "config.json").write_text("{")
    elif case == "text model":
        (folder / "config.json").write_text('{"model_type": "qwen2"}')
    elif case == "shard missing":
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif case == "adapter without weights":
        (folder / "adapter_model.safetensors").unlink()
    elif case == "adapter truncated":
        os.truncate(folder / "adapter_model.safetensors", 300)
    elif case == "adapter config not json":
        settings.write_text("nonsense")
    elif case == "adapter of a missing base":
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"base_model_name_or_path": "/no/such/base"}))
    elif case == "adapter of no base":
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"base_model_name_or_path": None}))
    elif case == "adapter of another rank":
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"r": 5}))
    elif case == "adapter with strange keys":
        weights = load_file(folder / "adapter_model.safetensors")
        save_file(
            {f"{k}.x" if i == 0 else k: v for i, (k, v) in enumerate(weights.items())},
            folder / "adapter_model.safetensors",
        )
    elif case == "evil shards" or case == "no latest":
        (folder / "model.safetensors").unlink()
        (folder / "global_step1").mkdir()
        torch.save({"buffer_names": Evil()}, folder / "global_step1" / "zero_pp_rank_0_mp_rank_00_model_states.pt")
        torch.save({}, folder / "global_step1" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
        if case == "evil shards":
            (folder / "latest").write_text("global_step1")


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing folder", "no checkpoint at"),
        ("empty", "holds no model; it holds nothing"),
        ("pickle", "holds no model"),
        ("truncated", "cannot load"),
        ("tensor missing", "lacks weights"),
        ("other shape", "lacks weights|cannot load"),
        ("config not json", "cannot load"),
        ("text model", "cannot load"),
        ("shard missing", "cannot load"),
        ("adapter without weights", "adapter_model.safetensors is missing"),
        ("adapter truncated", "does not fit|cannot"),
        ("adapter config not json", "cannot read"),
        ("adapter of a missing base", "base model: no model folder /no/such/base"),
        ("adapter of no base", "does not name its base"),
        ("adapter of another rank", "does not fit its base"),
        ("adapter with strange keys", "does not fit its base"),
        ("evil shards", "hold more than tensors"),
        ("no latest", "has no shards"),
    ],
)
def test_broken_checkpoint_is_one_clear_error(case, message, base, adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _break(case, tmp_path / "in", base, adapter)
    before = sorted(leftovers(tmp_path))
    with pytest.raises(DataError, match=message) as caught:
        merge.merge(tmp_path / "in", tmp_path / "out")
    assert "\n" not in caught.value.message
    assert sorted(leftovers(tmp_path)) == before


def test_weights_that_the_config_does_not_describe_are_refused(base, tmp_path):
    shutil.copytree(base, tmp_path / "in")
    weights = load_file(base / "model.safetensors") | {"model.extra.weight": torch.ones(3)}
    save_file(weights, tmp_path / "in" / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match="has weights that its config") as caught:
        merge.merge(tmp_path / "in", tmp_path / "out")
    assert caught.value.details == ["unexpected: model.language_model.extra.weight"]


def test_adapter_over_another_base_is_refused(adapter, tmp_path):
    other = tiny_models.save_tiny(tmp_path / "other", "qwen2_vl")
    with pytest.raises(DataError, match="does not fit its base"):
        merge.merge(adapter, tmp_path / "out", base=str(other))
    assert leftovers(tmp_path) == ["other"]


def test_command_prints_one_json_document(adapter, tmp_path):
    argv = [sys.executable, "-m", "r1vfree_cli.training.merge", str(adapter), str(tmp_path / "out")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and json.loads(done.stdout)["kind"] == "adapter"
    assert (tmp_path / "out" / "config.json").is_file()


def test_command_leaves_the_error_and_its_exit_code(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(merge, "die_with_parent", lambda number: None)
    monkeypatch.setattr(merge.signal, "signal", lambda *args: None)
    assert merge.main([str(tmp_path / "none"), str(tmp_path / "out")]) == 3
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["exit_code"] == 3 and "no checkpoint at" in error["message"]
