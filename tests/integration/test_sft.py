"""Supervised warm start on tiny models of the real classes: what is learnt from, what is left out, what is written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from PIL import Image

from r1vfree_cli.config import recipes
from r1vfree_cli.core import prompts
from r1vfree_cli.core.errors import DataError, Interrupted, UsageError
from r1vfree_cli.core.files import read_jsonl
from r1vfree_cli.data.load import load_rows
from r1vfree_cli.launch import plan as plans
from r1vfree_cli.launch import processes as launch
from r1vfree_cli.models.adapter import base_signature
from r1vfree_cli.models.load import load_processor
from r1vfree_cli.run import checkpoint, contract
from r1vfree_cli.run.attempt import Attempt
from r1vfree_cli.run.run_dir import RunDir
from r1vfree_cli.training import checkpoints, merge, sft
from r1vfree_cli.training import run as skeleton
from r1vfree_cli.training.recorder import summarise_metrics, truncate_lines, update_summary


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("R1V_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(skeleton, "is_main", lambda: True)
        torch.set_num_threads(1)
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, Path]:
    """A folder for each kind; the names say the other class, which must not matter."""
    root = tmp_path_factory.mktemp("models")
    names = {"qwen2_vl": "Qwen2.5-VL-copy", "qwen2_5_vl": "Qwen2-VL-copy"}
    return {kind: tiny_models.save_tiny(root / name, kind) for kind, name in names.items()}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny_models.write_rows(tmp_path_factory.mktemp("data"), tiny_models.draw_rows(12))


def make_recipe(
    model: Path, data: Path, *, lora=None, launch=None, max_prompt_tokens=None, pixels=(784, 7056), **train
):
    settings = {
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_steps": 2,
        "gradient_checkpointing": False,
        "report_to": "none",
        "dataloader_num_workers": 0,
        "seed": 7,
    }
    document = {
        "model": {
            "name": str(model),
            "dtype": "float32",
            "min_pixels": pixels[0],
            "max_pixels": pixels[1],
            "lora": lora,
        },
        "data": {"path": str(data), "max_prompt_tokens": max_prompt_tokens},
        "train": settings | train,
        "launch": launch or {"preset": "cpu"},
    }
    return recipes.validate("sft", document, "of the test")


def train(recipe, path: Path, *, resume: bool = False) -> RunDir:
    """The worker's main, in this process."""
    run = RunDir(path)
    run.begin(recipes.to_yaml(recipe), resume=resume)
    sft.main(recipe, Attempt.of(run, resume=resume))
    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def rows_of(n: int = 6, **kwargs) -> list[dict]:
    return tiny_models.draw_rows(n, **kwargs)


def test_steps_smaller_than_a_16_bit_weight_can_tell_are_not_lost(tiny, data, tmp_path):
    recipe = make_recipe(tiny["qwen2_5_vl"], data, max_steps=2, learning_rate=1e-6, lr_scheduler_type="constant")
    run = train(
        recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": "bfloat16"})}), tmp_path / "run"
    )
    before, saved, final = weights(tiny["qwen2_5_vl"]), weights(run.checkpoints / "checkpoint-2"), weights(run.final)
    assert sum(int((saved[k] != before[k]).sum()) for k in saved) > 0.9 * sum(v.numel() for v in saved.values())
    assert {v.dtype for v in saved.values()} == {torch.float32} and {v.dtype for v in final.values()} == {
        torch.bfloat16
    }


# --- what the loss is on ---------------------------------------------------------------------------------------


def hand_loss(model, processor, rows) -> float:
    """Cross-entropy of the assistant's tokens and <|im_end|>, each row alone and unpadded."""
    total, count = 0.0, 0
    for row in rows:
        messages = prompts.build_messages(row["problem"], len(row["images"]))
        prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        text = prompt + prompts.target_text(row["thinking"], row["solution"]) + "<|im_end|>"
        start = processor(text=[prompt], images=row["images"], return_tensors="pt")["input_ids"].shape[1]
        inputs = processor(text=[text], images=row["images"], return_tensors="pt")
        ids = inputs["input_ids"][0]
        with torch.no_grad():
            logits = model(**inputs).logits[0].double()  # [tokens, vocabulary]
        for place in range(start, len(ids)):
            total -= torch.log_softmax(logits[place - 1], -1)[ids[place]].item()
            count += 1
    return total / count


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
def test_loss_equals_a_hand_computed_masked_cross_entropy(kind, tiny, data, tmp_path):
    """Rows of different images and lengths in one batch: wrong pairs of image and prompt, or a token of the prompt
    in the loss, would change it."""
    recipe = make_recipe(tiny[kind], data)
    model, processor = tiny_models.load_tiny(tiny[kind])
    rows = rows_of()
    expected = hand_loss(model, processor, rows)
    trainer = sft.R1VSFTTrainer(
        model=model,
        args=sft.sft_config(recipe, RunDir(tmp_path)),
        data_collator=sft.Collator(processor),
        train_dataset=load_rows(str(data)),
        processing_class=processor,
    )
    loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(sft.Collator(processor)(rows)))
    assert loss.item() == pytest.approx(expected, abs=1e-5)


def test_labels_are_the_target_and_the_end_of_turn_and_never_the_prompt_none_or_vision_tokens(tiny):
    _, processor = tiny_models.load_tiny(tiny["qwen2_5_vl"])
    rows = rows_of()  # every other one has no thinking: "None" must not stand there
    batch = sft.Collator(processor)(rows)
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    for row, ids, labels in zip(rows, batch["input_ids"], batch["labels"]):
        learnt = labels[labels != -100]
        assert learnt.tolist() == ids[labels != -100].tolist()
        assert learnt[-1] == end and (learnt == end).sum() == 1
        text = processor.tokenizer.decode(learnt)
        assert text == prompts.target_text(row["thinking"], row["solution"]) + "<|im_end|>"
        assert "None" not in text
        visual = {processor.tokenizer.convert_tokens_to_ids(t) for t in tiny_models.SPECIAL_TOKENS if "vision" in t}
        assert not set(learnt.tolist()) & (visual | {processor.image_token_id})


def test_image_before_text_and_the_same_prompt_as_grpo(tiny):
    _, processor = tiny_models.load_tiny(tiny["qwen2_5_vl"])
    row = rows_of(1)[0]
    batch = sft.Collator(processor)([row])
    prompt = batch["input_ids"][0][batch["labels"][0] == -100]
    # What TRL's GRPOTrainer does with the row's `prompt`: template with generation prompt, then the processor.
    messages = prompts.build_messages(row["problem"], 1)
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt.tolist() == processor(text=[text], images=row["images"])["input_ids"][0]
    decoded = processor.tokenizer.decode(prompt)
    assert decoded.index("<|image_pad|>") < decoded.index(row["problem"])


def test_mm_token_type_ids_and_mask_mark_image_and_padding(tiny):
    _, processor = tiny_models.load_tiny(tiny["qwen2_5_vl"])
    batch = sft.Collator(processor)(rows_of())
    image = batch["input_ids"] == processor.image_token_id
    assert torch.equal(batch["mm_token_type_ids"] == 1, image)
    assert torch.equal(batch["attention_mask"] == 0, batch["input_ids"] == processor.tokenizer.pad_token_id)
    assert image.sum() == batch["image_grid_thw"].prod(-1).sum() // 4


def test_rows_without_images_and_with_two(tiny):
    _, processor = tiny_models.load_tiny(tiny["qwen2_5_vl"])
    rows = rows_of(3)
    rows[0]["images"] = []
    rows[2]["images"] = [tiny_models.draw(1), tiny_models.draw(2, (84, 84))]
    batch = sft.Collator(processor)(rows)
    assert (batch["input_ids"] == processor.image_token_id).sum(-1).tolist() == [0, 6, 4 + 9]
    assert "pixel_values" not in sft.Collator(processor)(rows[:1])


# --- what is left out ------------------------------------------------------------------------------------------


def select(tmp_path, rows, processor, **limits):
    limits = {"max_prompt_tokens": None, "max_length": None} | limits
    return sft.select_rows(load_rows(str(tiny_models.write_rows(tmp_path / "rows", rows))), processor, **limits)


def test_rows_without_solution_or_with_control_tokens_are_dropped_and_counted(tiny, tmp_path):
    _, processor = tiny_models.load_tiny(tiny["qwen2_5_vl"])
    rows = rows_of()
    rows[0]["solution"] = None
    rows[1]["solution"] = "  "
    rows[2]["problem"] = "What is in <|image_pad|>?"
    rows[3]["solution"] = "red<|im_end|>"
    kept, dropped = select(tmp_path, rows, processor)
    assert kept["id"][:] == [rows[4]["id"], rows[5]["id"]]
    assert dropped == {"no solution": 2, "control tokens in the text": 2}


def test_long_rows_are_dropped_and_counted_and_no_image_is_cut(tiny, tmp_path):
    _, processor = tiny_models.load_tiny(tiny["qwen2_5_vl"])
    rows = rows_of()
    lengths = [int(sft.Collator(processor)([row])["attention_mask"].sum()) for row in rows]
    limit = sorted(lengths)[2]
    kept, dropped = select(tmp_path, rows, processor, max_length=limit)
    assert kept["id"][:] == [r["id"] for r, n in zip(rows, lengths) if n <= limit]
    assert dropped == {f"longer than {limit} tokens": sum(n > limit for n in lengths)}
    batch = sft.Collator(processor)([kept[i] for i in range(len(kept))])
    assert batch["attention_mask"].sum(-1).max() == limit
    assert (batch["input_ids"] == processor.image_token_id).sum() == batch["image_grid_thw"].prod(-1).sum() // 4


def test_nothing_left_is_one_clear_error(tiny, tmp_path):
    _, processor = tiny_models.load_tiny(tiny["qwen2_5_vl"])
    with pytest.raises(DataError, match=r"no row is left.*6 prompt longer than 5 tokens"):
        select(tmp_path, rows_of(), processor, max_prompt_tokens=5)


def test_max_length_of_the_recipe_reaches_the_rows_and_never_trl(tiny, data, tmp_path):
    recipe = make_recipe(tiny["qwen2_5_vl"], data, max_length=10)
    assert sft.sft_config(recipe, RunDir(tmp_path / "a")).max_length is None
    with pytest.raises(DataError, match="longer than 10 tokens"):
        train(recipe, tmp_path / "b")


@pytest.mark.parametrize(
    "change, words", [({"lr_scheduler_type": "nope"}, "lr_scheduler_type"), ({"packing": True}, "acking")]
)
def test_trl_refusals_are_usage_errors(change, words, tiny, data, tmp_path):
    with pytest.raises(UsageError) as refused:
        train(make_recipe(tiny["qwen2_5_vl"], data, **change), tmp_path / "run")
    assert words in "\n".join([refused.value.message, *refused.value.details])


# --- the run ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tiny, data, tmp_path_factory) -> RunDir:
    """An uninterrupted run of 4 steps."""
    return train(make_recipe(tiny["qwen2_5_vl"], data, pixels=(1568, 6272)), tmp_path_factory.mktemp("sft") / "run")


def test_final_loads_and_keeps_processor_template_limits_and_end_tokens(finished, tiny):
    model, processor = tiny_models.load_tiny(finished.final)
    base, base_processor = tiny_models.load_tiny(tiny["qwen2_5_vl"])
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert any(not torch.equal(a, b) for a, b in zip(model.state_dict().values(), base.state_dict().values()))
    assert processor.chat_template == base_processor.chat_template
    assert set(model.generation_config.eos_token_id) == set(base.generation_config.eos_token_id)
    assert model.generation_config.pad_token_id == base.generation_config.pad_token_id
    assert processor.tokenizer.eos_token == "<|im_end|>"
    # Pixel limits that do not reach the processor, or that are lost when it is saved, show here.
    training = load_processor(make_recipe(tiny["qwen2_5_vl"], tiny["qwen2_vl"], pixels=(1568, 6272)).model)
    assert (processor.image_processor.size.shortest_edge, processor.image_processor.size.longest_edge) == (1568, 6272)
    for each in (training, processor):
        ids = each(text=["<|image_pad|>"], images=[Image.new("RGB", (400, 400))])["input_ids"][0]
        assert ids == [processor.image_token_id] * 4
    assert not list(finished.path.rglob("*.bin"))


def test_metrics_status_summary_and_contract(finished):
    lines = [line for _, line in read_jsonl(finished.metrics)]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for key in ("loss", "learning_rate", "grad_norm", "mean_token_accuracy", "step_time"):
        assert all(isinstance(line[key], float) for line in lines), key
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert finished.status["state"] == "finished" and finished.status["step"] == 4
    summary = json.loads(finished.summary.read_text())
    assert summary["rows"] == 12 and summary["loss"]["last"] == lines[-1]["loss"]
    for folder in (finished.final, finished.checkpoints / "checkpoint-2", finished.checkpoints / "checkpoint-4"):
        found = contract.read(folder)
        assert found and found["max_pixels"] == 6272 and found["template_hash"] == prompts.template_hash()
        assert found["data"]["sha256"]


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
def test_model_class_is_chosen_from_the_config_not_from_the_path(kind, tiny, data, tmp_path):
    run = train(make_recipe(tiny[kind], data, max_steps=1, save_strategy="no"), tmp_path / "run")
    assert json.loads((run.final / "config.json").read_text())["model_type"] == kind


def test_lora_trains_an_adapter_over_an_unchanged_base(tiny, data, tmp_path):
    run = train(make_recipe(tiny["qwen2_5_vl"], data, lora={"r": 3, "alpha": 5}, max_steps=2), tmp_path / "run")
    assert (run.final / "adapter_model.safetensors").is_file() and not (run.final / "model.safetensors").exists()
    model, processor = tiny_models.load_tiny(run.final)  # the Auto class follows the adapter to its base
    base, _ = tiny_models.load_tiny(tiny["qwen2_5_vl"])
    inputs = sft.Collator(processor)(rows_of(2))
    inputs.pop("labels")
    with torch.no_grad():
        assert not torch.allclose(model(**inputs).logits, base(**inputs).logits, atol=1e-4)
    assert contract.read(run.final)["base_signature"] == base_signature(base)
    assert contract.read(run.checkpoints / "checkpoint-2")["base_signature"] == base_signature(base)


# --- resume ----------------------------------------------------------------------------------------------------


def stop_after(monkeypatch, step: int) -> None:
    """As if SIGTERM had come during `step`."""
    seen = iter(range(1, 1000))
    monkeypatch.setattr(skeleton, "stop_requested", lambda: next(seen) >= step)


def test_interrupted_and_resumed_run_ends_with_the_same_weights(tiny, data, tmp_path, finished, monkeypatch):
    """`--resume` read and ignored would start again; a lost optimizer, RNG or place in the data would show too."""
    recipe = make_recipe(tiny["qwen2_5_vl"], data, pixels=(1568, 6272))
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Interrupted):
            train(recipe, tmp_path / "run")
    run = RunDir(tmp_path / "run")
    assert run.status["state"] == "interrupted" and not run.final.exists()
    assert [step for step, _ in checkpoint.checkpoints(run.checkpoints)] == [2, 3]
    before = [line for _, line in read_jsonl(run.metrics)]
    # Beyond the checkpoint: a killed attempt had logged a step more, and half a line.
    with open(run.metrics, "a") as f:
        f.write('{"step": 4, "loss": 1.0}\n{"step": 5, "lo')
    train(recipe, run.path, resume=True)
    after = [line for _, line in read_jsonl(run.metrics)]
    assert [line["step"] for line in after] == [1, 2, 3, 4]
    assert after[:3] == before  # their times too: no step was done again
    whole = [line for _, line in read_jsonl(finished.metrics)]
    assert [line["num_tokens"] for line in after] == [line["num_tokens"] for line in whole]
    expected = weights(finished.final)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(run.final).items())


def test_resume_point_skips_what_is_not_complete(finished, tmp_path, monkeypatch, capsys):
    run = RunDir(tmp_path)
    shutil.copytree(finished.checkpoints, run.checkpoints)
    assert checkpoints.resume_point(Attempt.of(run)) is None  # not a resume
    assert checkpoints.resume_point(Attempt.of(run, resume=True)).name == "checkpoint-4"
    (run.checkpoints / "checkpoint-4" / "trainer_state.json").unlink()
    shutil.copytree(run.checkpoints / "checkpoint-2", run.checkpoints / checkpoints.STAGING / "checkpoint-6")
    assert checkpoints.resume_point(Attempt.of(run, resume=True)).name == "checkpoint-2"
    said = capsys.readouterr().err
    assert "that was being written when the run ended is skipped" in said
    assert "checkpoint-4 is not complete (trainer_state.json missing), it is skipped" in said
    assert "resuming from step 2" in said
    optimizer = run.checkpoints / "checkpoint-2" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-1])  # copied in part
    assert checkpoints.resume_point(Attempt.of(run, resume=True)) is None
    assert "checkpoint-2 is not complete (optimizer.pt cut), it is skipped" in capsys.readouterr().err
    optimizer.unlink()
    files = run.checkpoints / "checkpoint-2" / checkpoint.FILES
    files.write_text(json.dumps({k: v for k, v in json.loads(files.read_text()).items() if k != "optimizer.pt"}))
    with pytest.raises(UsageError, match="save_only_model"):
        checkpoints.resume_point(Attempt.of(run, resume=True))
    shutil.rmtree(run.checkpoints)
    assert checkpoints.resume_point(Attempt.of(run, resume=True)) is None


def test_a_checkpoint_that_cannot_be_read_is_named_and_no_bug(tiny, data, finished, tmp_path, monkeypatch):
    """Of an earlier version, whose list has sizes alone; a pickle that holds more than tensors is not run."""
    run = RunDir(tmp_path)
    recipe = make_recipe(tiny["qwen2_5_vl"], data, pixels=(1568, 6272))
    run.begin(recipes.to_yaml(recipe))
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        shutil.rmtree(run.checkpoints, ignore_errors=True)
        shutil.copytree(finished.checkpoints, run.checkpoints)
        last = run.checkpoints / "checkpoint-4"
        (last / name).write_bytes(b"x" * (last / name).stat().st_size)
        sizes = {n: entry["bytes"] for n, entry in json.loads((last / checkpoint.FILES).read_text()).items()}
        (last / checkpoint.FILES).write_text(json.dumps(sizes))
        with pytest.raises(DataError, match=f"cannot resume from {run.checkpoints}/checkpoint-4: ") as e:
            train(recipe, run.path, resume=True)
        assert "deleted" in e.value.hint and not run.final.exists()


def test_changed_bytes_are_noticed_in_every_file_and_the_run_goes_on_before_them(
    tiny, data, finished, tmp_path, monkeypatch, capsys
):
    run = RunDir(tmp_path)
    recipe = make_recipe(tiny["qwen2_5_vl"], data, pixels=(1568, 6272))
    run.begin(recipes.to_yaml(recipe))
    shutil.copytree(finished.checkpoints, run.checkpoints)
    last = run.checkpoints / "checkpoint-4"
    listed = json.loads((last / checkpoint.FILES).read_text())
    assert sorted(listed) == sorted(p.name for p in last.iterdir() if p.name != checkpoint.FILES)
    for name in listed:
        content = (last / name).read_bytes()
        middle = len(content) // 2
        (last / name).write_bytes(content[:middle] + bytes(b ^ 1 for b in content[middle:]))
        assert f"{name} has other bytes" in checkpoint.lacking(last)
        assert checkpoints.resume_point(Attempt.of(run, resume=True)).name == "checkpoint-2"
        assert f"checkpoint-4 is not complete ({name} has other bytes), it is skipped" in capsys.readouterr().err
        (last / name).write_bytes(content)
    with open(last / "model.safetensors", "r+b") as f:
        f.seek(9000)
        f.write(bytes(4096))
    train(recipe, run.path, resume=True)  # steps 3 and 4 again
    expected = weights(finished.final)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in weights(run.final).items())
    assert not checkpoint.lacking(last)


def test_what_a_run_leaves_has_usual_modes_and_is_checked_before_it_is_used(finished, tmp_path):
    (tmp_path / "plain").touch()
    modes = {p.stat().st_mode for folder in (finished.final, finished.checkpoints) for p in folder.rglob("*.*")}
    assert {m for m in modes if m & 0o100000} == {(tmp_path / "plain").stat().st_mode}
    shutil.copytree(finished.final, tmp_path / "final")
    assert checkpoint.resolve(str(tmp_path / "final")).kind == "model"
    with open(tmp_path / "final" / "model.safetensors", "r+b") as f:
        f.seek(5000)
        f.write(bytes(64))
    assert checkpoint.resolve(str(tmp_path / "final"), verify=False)
    with pytest.raises(DataError, match=r"is damaged: model\.safetensors has other bytes"):
        checkpoint.resolve(str(tmp_path / "final"))
    with pytest.raises(DataError, match=r"is damaged: model\.safetensors has other bytes"):
        merge.merge(tmp_path / "final", tmp_path / "merged")


# --- the end of a run ------------------------------------------------------------------------------------------


def with_generation_config(model: Path, folder: Path, **settings) -> Path:
    shutil.copytree(model, folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


def test_a_generation_config_that_contradicts_itself_costs_no_run(tiny, data, tmp_path, capsys):
    """As published: greedy, with a temperature. transformers loads it and refuses to save it."""
    base = with_generation_config(
        tiny["qwen2_5_vl"], tmp_path / "base", do_sample=False, temperature=0.1, top_p=0.9, repetition_penalty=1.1
    )
    run = train(make_recipe(base, data, max_steps=1, save_steps=5), tmp_path / "run")
    assert "contradicts itself" in capsys.readouterr().err
    saved, given = (json.loads((d / "generation_config.json").read_text()) for d in (run.final, base))
    assert saved["eos_token_id"] == given["eos_token_id"] and saved["pad_token_id"] == given["pad_token_id"]
    assert saved["do_sample"] is False and saved["repetition_penalty"] == 1.1 and "temperature" not in saved
    tiny_models.load_tiny(run.final)
    merge.merge(base, tmp_path / "merged")


def test_damaged_lines_of_metrics_are_named_and_left_out(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"step": 1, "loss": 2.0}\n{"step": 2, "lo\x00s": \n[]\n{"loss": 1}\n{"step": 3}\n{"step": 9}\n{"st'
    )
    truncate_lines(path, 3)
    assert [line["step"] for _, line in read_jsonl(path)] == [1, 3]
    said = capsys.readouterr().err
    assert all(f"line {n} is damaged" in said for n in (2, 3, 4)) and "line 7" not in said


@pytest.mark.parametrize(
    "edit",
    [
        {"loss": "2.0", "reward": [1]}, {"loss": float("nan")}, {"loss": float("inf")}, {"step": 1.5}, {"step": True},
        {"judge/calls": "3", "reward": {}}, {"rewards/format/mean": 10**400}, {"reward": True, "loss": None},
    ],
)  # fmt: skip
def test_metrics_that_were_edited_do_not_end_a_run_at_its_end(edit, tmp_path):
    """What a resume keeps of them is summarised, and written, after the last step."""
    run = RunDir(tmp_path)
    lines = [{"step": s, "loss": 1.0, "reward": 0.5, "judge/calls": 2.0, "rewards/format/mean": 1.0} for s in (1, 2)]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in (lines[0] | edit, lines[1])))
    truncate_lines(run.metrics, 2)
    summary = update_summary(run, summarise_metrics(run))
    assert summary["reward"]["last"] == 0.5 and 2 <= summary["judge"]["calls"] <= 4


def test_a_chat_template_that_loops_is_cut_off_and_named(tiny, tmp_path, monkeypatch):
    shutil.copytree(tiny["qwen2_5_vl"], tmp_path / "model")
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    endless = "<|vision_start|><|image_pad|><|vision_end|>?{{ 'a ' * 10**7 }}"
    for template, limit, said in (
        (loop, 0.5, "does not work: it took longer than 0.5"),
        (endless, 60, "writes 20,000,0"),
        ("{{ 'a' * 10**15 }}", 60, "does not work: MemoryError"),
    ):
        monkeypatch.setattr("r1vfree_cli.models.load.TEMPLATE_S", limit)
        (tmp_path / "model" / "chat_template.jinja").write_text(template)
        with pytest.raises(DataError, match=f"chat template of model {tmp_path}/model {said}"):
            load_processor(make_recipe(tmp_path / "model", tmp_path).model)


def test_doctors_trial_step_takes_the_longest_rows(tiny, data, tmp_path):
    recipe = make_recipe(tiny["qwen2_5_vl"], data, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    training = sft.SftTraining(recipe, Attempt(str(tmp_path), str(tmp_path), trial=True))
    training.args, training.processor = training.config(), load_processor(recipe.model)
    rows = load_rows(str(data), "train", None)
    kept, _ = training.select(rows)
    totals = {}
    for row in rows:
        if not row["solution"]:
            continue
        text = prompts.build_messages(row["problem"], 1)
        asked = training.processor.apply_chat_template(text, add_generation_prompt=True, tokenize=False)
        ids = training.processor(text=[asked], images=row["images"])["input_ids"][0]
        totals[row["id"]] = len(ids) + len(sft.target_ids(training.processor, [row])[0])
    assert list(kept["id"]) == sorted(totals, key=totals.__getitem__, reverse=True)[:2] and len(totals) > 3


def test_what_cannot_be_saved_is_known_before_the_first_step(tiny, data, tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise ValueError("this processor cannot be saved")

    with monkeypatch.context() as patch:
        patch.setattr("transformers.Qwen2_5_VLProcessor.save_pretrained", refuse)
        with pytest.raises(DataError, match="this processor cannot be saved"):
            train(make_recipe(tiny["qwen2_5_vl"], data, max_steps=1), tmp_path / "early")
    assert not RunDir(tmp_path / "early").metrics.exists()


@pytest.mark.parametrize("what", ["transformers.Qwen2_5_VLProcessor", "transformers.GenerationConfig"])
def test_a_failed_final_save_keeps_the_weights_and_says_where(what, tiny, data, tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise ValueError("cannot be saved")

    monkeypatch.setattr(
        skeleton, "try_final_save", lambda trainer: monkeypatch.setattr(f"{what}.save_pretrained", refuse)
    )
    with pytest.raises(DataError, match=r"could not be saved to .*final: cannot be saved") as e:
        train(make_recipe(tiny["qwen2_5_vl"], data, max_steps=1, save_strategy="no"), tmp_path / "run")
    file = next(Path(word) for word in e.value.hint.split() if word.endswith(".safetensors"))
    from safetensors.torch import load_file

    assert len(load_file(file)) == len(weights(tiny["qwen2_5_vl"])) and not (tmp_path / "run" / "final").exists()


@pytest.mark.parametrize("what", ["no room", "read-only"])
def test_weights_that_the_run_dir_cannot_take_are_kept_elsewhere(what, tmp_path, monkeypatch):
    model, _ = tiny_models.tiny_model()
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
    code = errno.ENOSPC if what == "no room" else errno.EROFS

    def refuse(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    def write(model, file):
        return refuse() if Path(file).is_relative_to(run) else save_model(model, file)

    save_model = checkpoints.save_model
    monkeypatch.setattr(checkpoints, "save_model", write)
    accelerator = SimpleNamespace(unwrap_model=lambda m: m, wait_for_everyone=lambda: None)
    args = SimpleNamespace(should_save=True, push_to_hub=False, output_dir=str(run / "checkpoints"))
    trainer = SimpleNamespace(model=model, accelerator=accelerator, args=args, contract={}, save_model=refuse)
    with pytest.raises(DataError, match=os.strerror(code)) as e:
        checkpoints.save_final(trainer, run / "final")
    file = next(Path(word) for word in e.value.hint.split() if word.endswith(".safetensors"))
    assert file.is_relative_to(elsewhere) and file.stat().st_size > 4 * model.lm_head.weight.numel()


def test_a_push_that_fails_at_the_end_costs_no_run(tmp_path, capsys):
    model, _ = tiny_models.tiny_model()

    def push():
        raise OSError("no route to the hub")

    args = SimpleNamespace(should_save=True, push_to_hub=True, hub_model_id="me/x", output_dir=str(tmp_path / "c"))
    accelerator = SimpleNamespace(unwrap_model=lambda m: m, wait_for_everyone=lambda: None)
    trainer = SimpleNamespace(model=model, accelerator=accelerator, args=args, contract={"schema": 1}, push_to_hub=push)
    trainer.save_model = lambda folder, _internal_call: model.save_pretrained(folder)
    checkpoints.save_final(trainer, tmp_path / "final")
    said = " ".join(capsys.readouterr().err.split())
    assert "no route to the hub" in said and f"hf upload me/x {tmp_path / 'final'}" in said.replace("final ", "final")
    assert (tmp_path / "final" / "model.safetensors").is_file()


def test_a_disk_without_room_for_the_model_is_known_before_the_first_step(tmp_path, monkeypatch):
    model, processor = tiny_models.tiny_model()
    args = SimpleNamespace(output_dir=str(tmp_path / "checkpoints"))
    accelerator = SimpleNamespace(unwrap_model=lambda m: m)
    trainer = SimpleNamespace(
        model=model, processing_class=processor, args=args, accelerator=accelerator, contract={"schema": 1}
    )
    checkpoints.try_final_save(trainer)
    assert not list(tmp_path.iterdir())
    needed = 2 * sum(p.numel() for p in model.parameters())
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(UsageError, match="the trained model alone takes"):
        checkpoints.try_final_save(trainer)


def test_a_tokenizer_without_its_files_is_refused(tiny, tmp_path):
    """transformers makes one with an empty vocabulary: every text would be no token."""
    shutil.copytree(tiny["qwen2_5_vl"], tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="has no vocabulary") as e:
        load_processor(make_recipe(tmp_path / "model", tmp_path).model)
    assert "tokenizer.json" in e.value.hint


def test_a_damaged_checkpoint_of_a_later_step_does_not_cost_a_whole_one(tiny, data, finished, tmp_path, monkeypatch):
    run = RunDir(tmp_path)
    recipe = make_recipe(tiny["qwen2_5_vl"], data, pixels=(1568, 6272), max_steps=3, save_total_limit=1)
    run.begin(recipes.to_yaml(recipe))
    for step, of in ((2, 2), (9, 4)):
        shutil.copytree(finished.checkpoints / f"checkpoint-{of}", run.checkpoints / f"checkpoint-{step}")
    (run.checkpoints / "checkpoint-9" / "optimizer.pt").write_bytes(b"")
    train(recipe, run.path, resume=True)
    assert [step for step, path in checkpoint.checkpoints(run.checkpoints) if not checkpoint.lacking(path)] == [3]


def test_the_second_node_to_name_a_checkpoint_leaves_it_there(tmp_path):
    for node in (0, 1):
        if node == 0:
            (tmp_path / "aside").mkdir()
            (tmp_path / "aside" / "x").write_text("new")
            (tmp_path / "checkpoint-1").mkdir()
            (tmp_path / "checkpoint-1" / "x").write_text("of an attempt that was killed")
        checkpoints._move(tmp_path / "aside", tmp_path / "checkpoint-1")
        assert (tmp_path / "checkpoint-1" / "x").read_text() == "new"


def test_a_killed_save_leaves_no_checkpoint_and_the_limit_bounds_the_rest(tiny, data, tmp_path, monkeypatch):
    recipe = make_recipe(tiny["qwen2_5_vl"], data, max_steps=4, save_steps=1, save_total_limit=2)
    run = train(recipe, tmp_path / "run")
    assert [step for step, _ in checkpoint.checkpoints(run.checkpoints)] == [3, 4]

    def no_space(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.Trainer._save_rng_state", no_space)
    with pytest.raises(UsageError, match="no space left"):
        train(recipe, tmp_path / "full")
    assert checkpoint.checkpoints(tmp_path / "full" / "checkpoints") == []


# --- several processes -----------------------------------------------------------------------------------------


def merges_shards(shards: Path, final: Path, out: Path) -> None:
    """The shards alone give the trained model; one missing is a clear error."""
    (shards / "model.safetensors").unlink()
    (shards / checkpoint.FILES).unlink()
    assert checkpoint.kind_of(shards) == "shards"
    summary = merge.merge(shards, out)
    assert summary["dtype"] == "float32" and contract.read(out)["merge"]["kind"] == "shards"
    expected, got = weights(final), weights(out)
    assert expected.keys() == got.keys() and all(torch.equal(got[name], expected[name]) for name in got)
    next(shards.glob("global_step2/*rank_1*optim*")).unlink()
    with pytest.raises(DataError, match="cannot put the shards"):
        merge.merge(shards, out.with_name("none"))
    assert not out.with_name("none").exists()


@pytest.mark.parametrize("preset", ["ddp", "zero2", "zero3"])
def test_two_processes_give_the_same_first_step_and_a_model_that_loads(
    preset, tiny, data, tmp_path, finished, monkeypatch
):
    monkeypatch.setenv("CXX", "no-compiler")  # DeepSpeed must not need one
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    recipe = make_recipe(
        tiny["qwen2_5_vl"],
        data,
        pixels=(1568, 6272),
        per_device_train_batch_size=2,
        max_steps=2,
        launch={"preset": preset, "device": "cpu", "processes": 2},
    )
    run = RunDir(tmp_path / "run")
    run.begin(recipes.to_yaml(recipe))
    launch.execute(plans.plan("sft", recipe, run.path), run.logs)
    first = next(line for _, line in read_jsonl(run.metrics))
    alone = next(line for _, line in read_jsonl(finished.metrics))
    assert first["loss"] == pytest.approx(alone["loss"], rel=1e-4)
    assert first["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)
    trained = tiny_models.load_tiny(run.final)[0].state_dict()
    base = tiny_models.load_tiny(tiny["qwen2_5_vl"])[0].state_dict()
    assert trained.keys() == base.keys()
    changed = [name for name in base if not torch.equal(trained[name], base[name])]
    assert len(changed) == len(base)
    # Under the names that published checkpoints have: other programs read the file too.
    assert weights(run.final).keys() == weights(tiny["qwen2_5_vl"]).keys()
    last = run.checkpoints / "checkpoint-2"
    assert not checkpoint.lacking(last)
    assert any(last.glob("global_step2/*optim*")) == preset.startswith("zero")  # DeepSpeed did run
    if preset == "zero3":
        merges_shards(last, run.final, tmp_path / "merged")
