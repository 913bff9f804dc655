"""Adapters that other versions and wrapper classes wrote: the same answers, or a refusal; never the base's score."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import tiny_models
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from r1vfree_cli.config.schema import Model
from r1vfree_cli.core.errors import DataError
from r1vfree_cli.eval.generate import Generator
from r1vfree_cli.models import adapter as adapters
from r1vfree_cli.models.load import load_policy
from r1vfree_cli.run import contract
from r1vfree_cli.training import merge


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=tiny_models.KINDS)
def pair(request, tmp_path_factory) -> tuple[Path, Path]:
    """(base, a LoRA adapter of it that matters, on language and vision layers)."""
    root = tmp_path_factory.mktemp(request.param)
    base = tiny_models.save_tiny(root / "model", request.param)
    save_adapter(base, root / "adapter", target_modules=["q_proj", "down_proj", "qkv", "proj"])
    return base, root / "adapter"


def save_adapter(base: Path, folder: Path, **settings) -> None:
    model, _ = tiny_models.load_tiny(base)
    wrapped = get_peft_model(model, LoraConfig(r=3, lora_alpha=7, **settings))
    torch.manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    wrapped.save_pretrained(folder)


LAYOUTS = {
    "before transformers 4.52": [
        (r"^base_model\.model\.model\.language_model\.", "base_model.model.model."),
        (r"^base_model\.model\.model\.visual\.", "base_model.model.visual."),
    ],
    "model without its head": [(r"^base_model\.model\.model\.", "base_model.model.")],
    "value head around it": [(r"^base_model\.model\.", "base_model.model.pretrained_model.")],
    "no prefix": [(r"^base_model\.model\.", "")],
    "adapter's name in the keys": [(r"\.(lora_[AB])\.weight$", r".\1.default.weight")],
    "compiled, in DDP": [(r"^base_model\.model\.", "base_model.model._orig_mod.module.")],
}


def relayout(adapter: Path, folder: Path, rules: list[tuple[str, str]], **settings) -> Path:
    """The adapter under the key names of another layout; `settings` replace some of its configuration."""
    shutil.copytree(adapter, folder)
    weights = load_file(folder / "adapter_model.safetensors")
    renamed = {}
    for key, value in weights.items():
        for pattern, new in rules:
            key = re.sub(pattern, new, key)
        renamed[key] = value
    assert renamed.keys() != weights.keys()
    save_file(renamed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    change(folder, **settings)
    return folder


def change(folder: Path, **settings) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def lora(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    model = tiny_models.load_tiny(base)[0]
    loaded = adapters.load_adapter(model, adapter, str(base))
    return {k: v for k, v in loaded.state_dict().items() if "lora_" in k}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_layouts_load_as_the_current_one_does(layout, pair, tmp_path):
    base, adapter = pair
    other = lora(base, relayout(adapter, tmp_path / "other", LAYOUTS[layout]))
    expected = lora(base, adapter)
    assert any("visual" in key for key in expected) and any("layers.1.mlp" in key for key in expected)
    assert other.keys() == expected.keys() and all(torch.equal(other[k], expected[k]) for k in expected)
    assert all(value.any() for value in other.values())


def test_patterns_of_old_names_are_translated(pair, tmp_path):
    """Targets as a pattern or full names (ms-swift, LLaMA-Factory), and a rank and alpha of their own."""
    base, _ = pair
    targets = [f"model.language_model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    patterns = {"rank_pattern": {targets[1]: 5}, "alpha_pattern": {targets[1]: 40}}
    save_adapter(base, tmp_path / "new", target_modules=targets, **patterns)
    rules = LAYOUTS["before transformers 4.52"]
    old_targets = [t.replace("language_model.", "") for t in targets]
    old_patterns = {k: {old_targets[1]: p[targets[1]]} for k, p in patterns.items()}
    expected = merge.logits(*_probed(base, tmp_path / "new"))
    for i, wanted in enumerate((old_targets, r"^(model(?=\.).*\.(q_proj))$")):
        old = relayout(tmp_path / "new", tmp_path / f"old{i}", rules, target_modules=wanted, **old_patterns)
        assert torch.equal(merge.logits(*_probed(base, old)), expected)


def _probed(base: Path, adapter: Path):
    model, processor = tiny_models.load_tiny(base)
    return adapters.load_adapter(model, adapter, str(base)), merge.probe(processor)


def test_merge_and_eval_of_an_old_layout_answer_as_the_adapter(pair, tmp_path):
    base, adapter = pair
    old = relayout(adapter, tmp_path / "old", LAYOUTS["before transformers 4.52"])
    merge.merge(old, tmp_path / "merged")
    merge.merge(adapter, tmp_path / "expected")
    merged, expected = (load_file(tmp_path / n / "model.safetensors") for n in ("merged", "expected"))
    assert all(torch.equal(merged[k], expected[k]) for k in expected)
    unmerged = load_file(base / "model.safetensors")
    assert any(not torch.equal(merged[k], unmerged[k]) for k in unmerged)
    generator = Generator(str(old), device="cpu")
    found = {k: v for k, v in generator.model.state_dict().items() if "lora_B" in k}
    assert found and all(v.any() for v in found.values())


def refused(base: Path, adapter: Path, *words: str) -> None:
    """Everything that loads an adapter refuses it in the same words, with exit code 3."""
    for load in (
        lambda: adapters.load_adapter(tiny_models.load_tiny(base)[0], adapter, str(base)),
        lambda: merge.merge(adapter, adapter.with_name("out"), base=str(base)),
        lambda: Generator(str(adapter), base=str(base), device="cpu"),
    ):
        with pytest.raises(DataError) as e:
            load()
        text = "\n".join([e.value.message, *e.value.details, e.value.hint or ""])
        assert e.value.exit_code == 3 and all(word in text for word in words), text
    assert not adapter.with_name("out").exists()


def test_what_still_does_not_fit_is_refused_with_its_keys(pair, tmp_path):
    base, adapter = pair
    strange = relayout(adapter, tmp_path / "strange", [(r"layers\.1\.", "blocks_of_another.1.")])
    refused(base, strange, "does not fit its base", "missing: ", "unexpected: ", "blocks_of_another.1", "--base")
    part = tmp_path / "part"
    shutil.copytree(adapter, part)
    weights = load_file(part / "adapter_model.safetensors")
    lost = next(k for k in weights if "layers.1" in k)
    save_file({k: v for k, v in weights.items() if k != lost}, part / "adapter_model.safetensors")
    refused(base, part, f"missing: {lost}")


def test_another_base_of_the_same_shape_is_refused(pair, tmp_path):
    """Known by the base that the adapter names, while it is there; by the contract's signature for ever."""
    base, adapter = pair
    kind = json.loads((base / "config.json").read_text())["model_type"]
    other = tiny_models.save_tiny(tmp_path / "model", kind, seed=9)
    refused(other, adapter, "another model", str(base), "--base")
    shutil.copytree(base, tmp_path / "copy")
    assert lora(tmp_path / "copy", adapter)  # the same files in another place

    moved = tmp_path / "moved"
    shutil.copytree(adapter, moved)
    change(moved, base_model_name_or_path="/no/such/base")
    signature = adapters.base_signature(tiny_models.load_tiny(base)[0])
    assert signature == adapters.base_signature(tiny_models.load_tiny(base)[0].to(torch.bfloat16))
    contract.write(moved, {"schema": 1, "base_signature": signature})
    refused(other, moved, "another model")
    assert lora(tmp_path / "copy", moved)
    with pytest.raises(DataError, match="no model folder /no/such/base") as e:
        merge.merge(moved, tmp_path / "out")
    assert "--base" in e.value.hint


def test_an_adapter_is_no_model_to_train(pair):
    _, adapter = pair
    with pytest.raises(DataError, match="is a LoRA adapter") as e:
        load_policy(Model(name=str(adapter)))
    assert f"r1v merge {adapter} --out" in e.value.hint
