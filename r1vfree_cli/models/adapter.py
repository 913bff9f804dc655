"""The one loader of LoRA adapters: key names of older transformers and of wrappers are renamed, else it is refused."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import load_file

from ..core import console
from ..core.errors import DataError, R1VError, first_line
from ..core.machine import library
from ..run import contract
from ..run.checkpoint import ADAPTER, ADAPTER_WEIGHTS, adapter_base, adapter_settings, same_weights

# Parts of a key that differ between layouts of one model: PEFT's and other wrappers' prefixes, the adapter's name, and
# `model.layers` (until transformers 4.51) against `model.language_model.layers`, `visual` against `model.visual`.
_WRAPPERS = {"base_model", "model", "language_model", "module", "_orig_mod", "pretrained_model", "default"}
_WRAPPERS |= {"_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def load_adapter(model, folder: Path | str, base: str | None = None) -> Any:
    """The PEFT model of `model` with the LoRA adapter of a folder (or of the hub) on it.

    `base`: the name that `model` was loaded by, for messages and to notice another base of the same shape.

    Raises DataError: no LoRA adapter in safetensors, keys or shapes that do not fit, or it was trained on another base.
    """
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    folder = _fetched(str(folder))
    recorded = adapter_settings(folder).get("base_model_name_or_path")
    base = adapter_base(folder, base)
    misfit = f"the adapter in {folder} does not fit its base {base}"
    hint = "the base must be the model that it was trained on: name it with --base"
    with library(f"cannot read the adapter in {folder}"):
        weights = load_file(folder / ADAPTER_WEIGHTS)
        settings = LoraConfig.from_pretrained(str(folder))
    other = _other_base(model, folder, base)
    if other is None and Path(str(recorded)).name != Path(base).name:
        unknown = f"whether {base} is that model cannot be told"
        console.warn(f"the adapter in {folder} names {recorded} as its base: {unknown}")
    if other:
        raise DataError(f"{misfit}: it was trained on {recorded}, another model", hint=hint)
    if getattr(settings, "alora_invocation_tokens", None):  # PEFT applies it after those tokens, in its own generate()
        raise DataError(f"the adapter in {folder} is an activated LoRA, which answers as its base without its tokens")
    if broken := [key for key, value in weights.items() if not value.isfinite().all()]:
        raise DataError(f"the adapter in {folder} holds NaN or infinity", details=broken[:6])
    untrained = not any(value.any() for key, value in weights.items() if "lora_A" not in key)
    for holds, why in ((untrained, "is untrained"), (not settings.lora_alpha, "has lora_alpha 0")):
        if holds:
            console.warn(f"the adapter in {folder} {why}: what it adds to its base is zero")
    _translate(settings, model, weights)
    settings.base_model_name_or_path = getattr(model, "name_or_path", None)  # it may have moved
    try:
        wrapped: Any = get_peft_model(model, settings)
        expected = set(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
        known = {_bare(key): key for key in wrapped.state_dict() if "lora_" not in key}
        known |= {_bare(key): key for key in expected}
        renamed = {key if key in expected else known.get(_bare(key), key): value for key, value in weights.items()}
        wrong = [f"missing: {key}" for key in sorted(expected - renamed.keys())]
        wrong += [f"unexpected: {key}" for key in sorted(renamed.keys() - set(known.values()))]
        wrong += ["two keys of one weight"] if len(renamed) < len(weights) else []
        if wrong:
            raise DataError(misfit, details=wrong[:6], hint=hint)
        unexpected = set_peft_model_state_dict(wrapped, renamed).unexpected_keys
        if unexpected:
            raise DataError(misfit, details=[f"unexpected: {key}" for key in unexpected[:6]], hint=hint)
    except R1VError:
        raise
    except Exception as e:  # shapes, targets that the model has not
        shapes = [line.strip() for line in str(e).splitlines() if "size mismatch" in line]
        raise DataError(f"{misfit}: {first_line(e)}", details=shapes[:6], hint=hint) from None
    return wrapped.eval()


@contextmanager
def base_of_adapter() -> Iterator[None]:
    """Loading the base of an adapter: what goes wrong is said of it, and that --base names another place."""
    try:
        yield
    except DataError as e:
        hint = "give its place with --base" + (f"; {e.hint}" if e.hint else "")
        raise DataError(f"the adapter's base model: {e.message}", details=e.details, hint=hint) from None


def base_signature(model) -> str | None:
    """A hash of one of the base's weights, in bfloat16: equal for equal models in whatever files and dtype.

    None where they are not at hand as published: quantised, float16, or sharded by ZeRO-3.
    """
    sample = None
    for name, parameter in model.named_parameters():
        kept = parameter.dtype in (torch.float32, torch.bfloat16) and parameter.ndim == 2
        if _bare(name.replace(".base_layer", "")) == "layers.0.self_attn.q_proj.weight" and kept:
            sample = parameter.detach().to("cpu", torch.bfloat16).contiguous()
    return None if sample is None else xxhash.xxh3_64(sample.view(torch.uint8).numpy().tobytes()).hexdigest()


def _fetched(name: str) -> Path:
    """The adapter's folder, fetched when it is a hub name."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    with library(f"no adapter at {name}"):
        return Path(snapshot_download(name, allow_patterns=[ADAPTER, ADAPTER_WEIGHTS, contract.FILE]))


def _bare(key: str) -> str:
    """A key without what only names its layout: `layers.0.mlp.up_proj.lora_A.weight`."""
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def _translate(settings, model, weights: dict) -> None:
    """Where the adapter speaks another layout, name its modules in `settings` as `model` does."""
    from peft.utils.other import get_pattern_key

    modules = {name for name, _ in model.named_modules()}
    adapted = {key.rpartition(".lora_")[0].removeprefix("base_model.model.") for key in weights if ".lora_" in key}
    if adapted <= modules:
        return
    named = {_bare(name): name for name in modules}
    targets = settings.target_modules
    if isinstance(targets, str) or any("." in name for name in targets or ()):  # patterns of the old names
        settings.target_modules = {named.get(_bare(name), name) for name in adapted}
        settings.exclude_modules = None
    for pattern in (settings.rank_pattern, settings.alpha_pattern):  # by names or patterns of the old layout
        found = {old: get_pattern_key(pattern, old) for old in adapted}
        values = {named.get(_bare(old), old): pattern[key] for old, key in found.items() if key in pattern}
        pattern.clear()
        pattern.update(values)


def _other_base(model, folder: Path, base: str) -> bool | None:
    """Whether `model`, loaded from `base`, is another one than the adapter was trained on; None where nothing tells.

    Told by the signature in an adapter's contract, else by the base that it names: where both places are there their
    files are compared, and of two hub names the repository's.
    """
    trained_on = (contract.read(folder) or {}).get("base_signature")
    if trained_on and (here := base_signature(model)):
        return here != trained_on
    recorded = str(adapter_settings(folder).get("base_model_name_or_path") or "")
    if not recorded:
        return None
    if Path(recorded).is_dir() and Path(base).is_dir():
        return not same_weights(Path(recorded), Path(base))
    hub = all(re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists() for name in (recorded, base))
    plain = [re.sub(r"(-unsloth)?-bnb-\dbit$", "", name.rpartition("/")[2].lower()) for name in (recorded, base)]
    return plain[0] != plain[1] if hub else None
