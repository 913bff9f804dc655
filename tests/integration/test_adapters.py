"""Adapters that other versions and wrapper classes wrote: the same answers, or a refusal; never the base's score."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import tiny_models
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from r1vfree_cli.config.schema import Model
from r1vfree_cli.core.errors import DataError
from r1vfree_cli.eval.generate import Generator
from r1vfree_cli.judges.local import LocalJudge
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


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return tiny_models.save_tiny(tmp_path_factory.mktemp("plain") / "model")


def save_adapter(base: Path, folder: Path, **settings) -> None:
    model, _ = tiny_models.load_tiny(base)
    wrapped = get_peft_model(model, LoraConfig(r=3, lora_alpha=7, **settings))
    torch.manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            parameter.data += torch.randn_like(parameter) * 0.05
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
    "FSDP, checkpointed": [(r"layers\.(\d)\.", r"layers.\1._fsdp_wrapped_module._checkpoint_wrapped_module.")],
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
    expected = merge.logits(*_probed(base, tmp_path / "new"))
    written = (old_targets, old_targets[1]), (r"^(model(?=\.).*\.(q_proj))$", r"^model\.layers\.1\..*")
    for i, (wanted, layer) in enumerate(written):
        old_patterns = {k: {layer: p[targets[1]]} for k, p in patterns.items()}
        old = relayout(tmp_path / "new", tmp_path / f"old{i}", rules, target_modules=wanted, **old_patterns)
        assert torch.equal(merge.logits(*_probed(base, old)), expected)


@pytest.mark.parametrize(
    "alpha", [r"model\.layers\.1\.self_attn\.q_proj", "^model.layers.1.*", "layers.1.self_attn.q_proj"]
)
def test_an_alpha_of_its_own_counts_in_an_old_layout(alpha, plain, tmp_path):
    """No shape tells that it was not found: the adapter would be there at another strength."""
    targets = {"target_modules": ["q_proj"]}
    save_adapter(plain, tmp_path / "new", **targets, alpha_pattern={"layers.1.self_attn.q_proj": 40})
    old = relayout(tmp_path / "new", tmp_path / "old", LAYOUTS["before transformers 4.52"], alpha_pattern={alpha: 40})
    model = adapters.load_adapter(tiny_models.load_tiny(plain)[0], old, str(plain))
    layers = model.base_model.model.model.language_model.layers
    assert [layer.self_attn.q_proj.scaling["default"] for layer in layers] == [7 / 3, 40 / 3]


PARTS = {
    "DoRA": {"use_dora": True},
    "biases": {"bias": "all"},
    "a module of its own": {"modules_to_save": ["merger"]},
    "the embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "some tokens": {"trainable_token_indices": [1, 2]},
    "rank-stabilised": {"use_rslora": True},
    "PiSSA": {"init_lora_weights": "pissa"},
}


@pytest.mark.parametrize("part", PARTS)
def test_all_that_an_adapter_holds_counts_in_an_old_layout(part, plain, tmp_path):
    save_adapter(plain, tmp_path / "new", **{"target_modules": ["q_proj", "qkv"], **PARTS[part]})
    old = relayout(tmp_path / "new", tmp_path / "old", LAYOUTS["before transformers 4.52"])
    model, processor = tiny_models.load_tiny(plain)
    inputs = merge.probe(processor)
    before = merge.logits(model, inputs)
    expected = merge.logits(PeftModel.from_pretrained(model, tmp_path / "new").eval(), inputs)
    assert not torch.allclose(expected, before, atol=1e-3)
    assert torch.equal(merge.logits(*_probed(plain, old)), expected)


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


def refused(base: Path, adapter: Path, *words: str, everywhere: bool = True) -> None:
    """Everything that loads an adapter refuses it in the same words, with exit code 3."""
    loads = (
        lambda: adapters.load_adapter(tiny_models.load_tiny(base)[0], adapter, str(base)),
        lambda: merge.merge(adapter, adapter.with_name("out"), base=str(base)),
        lambda: Generator(str(adapter), base=str(base), device="cpu"),
    )
    for load in loads if everywhere else loads[:1]:
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


def test_another_base_of_the_same_shape_is_refused(pair, tmp_path, monkeypatch):
    """Known by the base that the adapter names, while it is there; by the contract's signature for ever."""
    base, adapter = pair
    kind = json.loads((base / "config.json").read_text())["model_type"]
    other = tiny_models.save_tiny(tmp_path / "model", kind, seed=9)
    refused(other, adapter, "another model", str(base), "--base")
    shutil.copytree(base, tmp_path / "copy")
    assert lora(tmp_path / "copy", adapter)  # the same files in another place

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    moved = tmp_path / "moved"
    shutil.copytree(adapter, moved)
    change(moved, base_model_name_or_path="/no/such/base")
    signature = adapters.base_signature(tiny_models.load_tiny(base)[0])
    assert signature == adapters.base_signature(tiny_models.load_tiny(base)[0].to(torch.bfloat16))
    contract.write(moved, {"schema": 1, "base_signature": signature})
    refused(other, moved, "another model")
    assert lora(tmp_path / "copy", moved)
    for gone in ("/no/such/base", "models/gone"):  # the second could be a name on the hub
        change(moved, base_model_name_or_path=gone)
        for load in (lambda: merge.merge(moved, tmp_path / "out"), lambda: Generator(str(moved), device="cpu")):
            with pytest.raises(DataError, match=f"the adapter's base model: .*{gone}") as e:
                load()
            assert e.value.hint.startswith("give its place with --base")


def test_what_would_answer_as_the_base_is_refused_or_said(plain, tmp_path, capsys):
    targets = {"target_modules": ["q_proj"]}
    save_adapter(plain, tmp_path / "invoked", **targets)
    change(tmp_path / "invoked", alora_invocation_tokens=[5], task_type="CAUSAL_LM")
    refused(plain, tmp_path / "invoked", "activated LoRA", everywhere=False)
    save_adapter(plain, tmp_path / "rank", **targets)
    change(tmp_path / "rank", r=8)
    refused(
        plain,
        tmp_path / "rank",
        "does not fit its base",
        "layers.0.self_attn.q_proj.lora_A",
        "[8, 48]",
        everywhere=False,
    )
    weights = load_file(tmp_path / "invoked" / "adapter_model.safetensors")
    save_adapter(plain, tmp_path / "twice", **targets)
    both = weights | {key.replace("language_model.", ""): value * 3 for key, value in weights.items()}
    save_file(both, tmp_path / "twice" / "adapter_model.safetensors")
    refused(plain, tmp_path / "twice", "two keys of one weight", everywhere=False)
    save_adapter(plain, tmp_path / "zero", **targets)
    nan = {key: value * float("nan") if "lora_B" in key else value for key, value in weights.items()}
    save_file(nan, tmp_path / "twice" / "adapter_model.safetensors")
    refused(plain, tmp_path / "twice", "holds NaN or infinity", "lora_B", everywhere=False)
    zero = {key: value * ("lora_A" in key) for key, value in weights.items()}
    save_file(zero, tmp_path / "zero" / "adapter_model.safetensors")
    capsys.readouterr()
    lora(plain, tmp_path / "zero")
    assert "is untrained: what it adds to its base is zero" in capsys.readouterr().err
    save_file(weights, tmp_path / "zero" / "adapter_model.safetensors")
    change(tmp_path / "zero", lora_alpha=0)
    lora(plain, tmp_path / "zero")
    assert "has lora_alpha 0: what it adds to its base is zero" in " ".join(capsys.readouterr().err.split())
    for named, told in (("Qwen/Qwen2-VL-2B-Instruct", True), (None, True), (f"/gone/{plain.name}", False)):
        change(tmp_path / "zero", base_model_name_or_path=named)
        lora(plain, tmp_path / "zero")
        assert (f"names {named} as its base: whether" in capsys.readouterr().err) == told


def test_an_adapter_without_weights_of_its_own_is_not_merged(plain, tmp_path):
    save_adapter(plain, tmp_path / "bias", target_modules=["o_proj"], lora_bias=True)
    with pytest.raises(DataError, match=r"cannot be merged: .*lora_bias"):
        merge.merge(tmp_path / "bias", tmp_path / "out")


def test_an_adapter_is_no_model_to_train_or_to_judge(pair, tmp_path, monkeypatch):
    """Also where a complete model lies beside it, or on the hub: transformers would load what fits of it."""
    base, adapter = pair
    both = tmp_path / "both"
    shutil.copytree(base, both)
    shutil.copytree(adapter, both, dirs_exist_ok=True)
    cached = tmp_path / "hub" / "models--org--both"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("a" * 40)
    shutil.copytree(both, cached / "snapshots" / ("a" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, merges in ((adapter, f"r1v merge {adapter} --out"), (both, f"merge {both}"), ("org/both", "merge both")):
        for load in (load_policy, LocalJudge):
            with pytest.raises(DataError, match="is a LoRA adapter") as e:
                load(Model(name=str(name)) if load is load_policy else str(name))
            assert merges in e.value.hint
