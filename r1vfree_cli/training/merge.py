"""One loadable model from a LoRA adapter, ZeRO shards or a complete checkpoint, checked on an image before it is kept.

`python -m r1vfree_cli.training.merge CHECKPOINT OUT [--base B] [--dtype D] [--overwrite]` prints one JSON document on
stdout: the summary, or `{"error": ...}` with the error's exit code. Everything runs in float32 on the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import pickle
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from safetensors import SafetensorError
from transformers import AutoConfig, GenerationConfig

from ..config.schema import Model
from ..core.errors import DataError, R1VError, UsageError, first_line
from ..core.files import cannot_write, lock, staged
from ..core.machine import refused
from ..core.process import die_with_parent
from ..core.prompts import build_messages, target_text
from ..models import family
from ..models.adapter import base_of_adapter, load_adapter
from ..models.load import auto_class, has_processor, load_policy, open_processor, render, round_weights
from ..models.sampling import end_tokens
from ..run import contract
from ..run.checkpoint import adapter_base, adapter_settings, is_adapter, resolve, seal
from .checkpoints import mend_generation_config, tensors_only

# Largest difference of a logit that counts as rounding, as a share of the largest logit. Merging and reloading are
# exact but for the order of float32 sums; storing in a shorter type rounds every weight.
EXACT = 1e-4
ROUNDING = {"bfloat16": 5e-2, "float16": 1e-2, "float32": EXACT}


def merge(
    checkpoint: Path, out: Path, base: str | None = None, dtype: str | None = None, overwrite: bool = False
) -> dict:
    """Write the model in `checkpoint` to `out`, so that `from_pretrained` loads it, and check what was written.

    Args:
        checkpoint: a run dir (its final model), a LoRA adapter, a DeepSpeed checkpoint, or a model.
        base: the adapter's base model, where it is not the recorded one.
        dtype: of the written weights; None: the base's, or the checkpoint's own.
        overwrite: replace a model that is in `out`.

    Returns the summary. Raises UsageError: `out` is taken, or an unknown dtype. DataError: nothing loadable there, or
    what was written answers differently; then nothing is left of it.
    """
    if dtype is not None and dtype not in ROUNDING:
        raise UsageError(f"unknown dtype {dtype!r}; allowed: {', '.join(ROUNDING)}")
    given = resolve(str(checkpoint), shards=True)
    source, kind, out = Path(given.path), given.kind, Path(out)
    if kind == "hub":
        hint = "a model of the hub needs no merge; fetch an adapter first"
        raise DataError(f"no checkpoint folder {source}", hint=hint)
    _check_out(out, source, overwrite)
    trained = contract.read(source)
    family.use((trained or {}).get("family"))
    processor = _processor(source, base)
    inputs = probe(processor)
    model, before, stored, base = _unmerged(source, kind, base, trained, inputs)
    dtype = dtype or stored
    mend_generation_config(model)
    # The written model must stop where the tokenizer's turn ends, and know its padding.
    settings, tokenizer = model.generation_config, processor.tokenizer
    settings.eos_token_id = end_tokens(model, tokenizer)
    if settings.pad_token_id is None:
        settings.pad_token_id = tokenizer.pad_token_id
    try:
        with lock(out, "model folder"), staged(out) as folder:
            _check_out(out, source, overwrite)  # another merge may have been faster
            round_weights(model, dtype)
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
            expected = logits(model.float(), inputs)
            del model
            got = _reload(folder, processor, inputs)
            _compare(got, expected, EXACT, "the written model is not the merged one")
            difference, tolerance = _compare(got, before, ROUNDING[dtype], f"storing as {dtype} changed the model")
            summary: dict[str, Any] = {"kind": kind, "source": str(source), "base": base, "dtype": dtype}
            summary |= {"max_logit_difference": difference, "tolerance": tolerance}
            if trained is not None:
                contract.write(folder, trained | {"merge": summary})
            seal(folder)
    except (OSError, SafetensorError) as e:
        raise cannot_write(out, e) from None
    files = sorted(p.name for p in out.iterdir())
    return {"out": str(out), **summary, "files": files, "contract": trained is not None}


def _check_out(out: Path, source: Path, overwrite: bool) -> None:
    if out.resolve() == source.resolve() or out.resolve() in source.resolve().parents:
        raise UsageError(f"{out} holds the checkpoint itself", hint="choose another --out")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise UsageError(f"{out} exists already", hint="choose another --out, or replace it with --overwrite")
    if not (out / "config.json").is_file():
        raise UsageError(f"{out} is not a model folder, it is not overwritten", hint="choose another --out")


def _model(name: str, revision: str | None = None) -> tuple[Any, str]:
    """(model in float32, dtype of its files); weights that are missing or do not fit are errors, not random numbers."""
    model = load_policy(Model(name=name, revision=revision, dtype="float32"))
    return model.eval(), _stored_dtype(AutoConfig.from_pretrained(resolve(name, verify=False).path, revision=revision))


def _shards(folder: Path) -> tuple[Any, str]:
    """(model whose float32 weights lie in a DeepSpeed checkpoint's shards, dtype that its config names)."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    latest = folder / "latest"  # the name of the newest shards' folder
    tag = latest.read_text(encoding="utf-8").strip() if latest.is_file() else ""
    if not tag or Path(tag).name != tag or not (folder / tag).is_dir():
        raise DataError(f"{folder} has no shards: its file `latest` names {tag or 'nothing'!r}")
    try:
        config = AutoConfig.from_pretrained(folder)
        stored = _stored_dtype(config)
        model = auto_class(config).from_config(config, dtype=torch.float32)
        with contextlib.suppress(OSError):
            model.generation_config = GenerationConfig.from_pretrained(folder)
        with tensors_only(), contextlib.redirect_stdout(sys.stderr):
            weights = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=tag)
        model.load_state_dict(weights, strict=True)
    except pickle.UnpicklingError:
        raise DataError(f"the shards in {folder} hold more than tensors; they are not loaded") from None
    except Exception as e:  # damaged files raise anything, the tokenizers library bare Exceptions
        raise DataError(f"cannot put the shards in {folder} together: {first_line(e)}") from None
    return model.eval(), stored


def _stored_dtype(config) -> str:
    name = str(getattr(config, "dtype", None) or "bfloat16").removeprefix("torch.")
    return name if name in ROUNDING else "bfloat16"


def _processor(folder: Path, base: str | None):
    """The checkpoint's processor; of an adapter without one, the base's."""
    if has_processor(folder) or not is_adapter(folder):
        return open_processor(str(folder), what=str(folder))
    place = adapter_base(folder, base)
    with base_of_adapter():
        return open_processor(place, what=place)


def _unmerged(
    source: Path, kind: str, base: str | None, trained: dict | None, inputs: dict[str, torch.Tensor]
) -> tuple[Any, torch.Tensor, str, str | None]:
    """(the model in one piece, logits of it before an adapter was merged, dtype of its files, an adapter's base)."""
    if kind != "adapter":
        model, stored = _shards(source) if kind == "shards" else _model(str(source))
        return model, logits(model, inputs), stored, base
    name = adapter_base(source, base)
    revision = None if base else adapter_settings(source).get("revision") or (trained or {}).get("revision")
    with base_of_adapter():
        model, stored = _model(name, revision)
    model = load_adapter(model, source, name)
    before = logits(model, inputs)
    try:
        model = model.merge_and_unload()
    except (RuntimeError, ValueError, NotImplementedError) as e:  # PEFT's word for kinds of LoRA that have no weights
        raise DataError(f"the adapter in {source} cannot be merged: {first_line(e)}") from None
    _compare(logits(model, inputs), before, EXACT, "merging the adapter changed the model")
    return model, before, stored, name


def probe(processor) -> dict[str, torch.Tensor]:
    """A prompt with a drawn photo-sized image and a whole reply, through the real processor."""
    image = Image.linear_gradient("L").resize((224, 168)).convert("RGB")
    pen = ImageDraw.Draw(image)
    pen.ellipse((30, 40, 110, 120), fill=(200, 30, 60))
    pen.rectangle((130, 60, 200, 140), fill=(20, 90, 210))
    text = render(processor, build_messages("What is left of the blue square?"))
    reply = target_text("There are a circle and a square.", "a red circle")
    return dict(processor(text=[text + reply], images=[image], return_tensors="pt"))


def logits(model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of the probe, [tokens, vocabulary], float32."""
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits[0].float()


def _reload(folder: Path, processor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of what was written, which must have the same end tokens, template and inputs too."""
    model, _ = _model(str(folder))
    written = _processor(folder, None)
    ends = model.generation_config.eos_token_id
    if written.tokenizer.eos_token_id not in (ends if isinstance(ends, list) else [ends]):
        raise DataError(f"the written generation config does not end at {written.tokenizer.eos_token!r}: {ends}")
    if written.tokenizer.eos_token_id != processor.tokenizer.eos_token_id:
        raise DataError("the written tokenizer has another end token")
    again = probe(written)
    if again.keys() != inputs.keys() or any(not torch.equal(again[k], inputs[k]) for k in inputs):
        raise DataError("the written processor prepares the same image and text differently")
    return logits(model, inputs)


def _compare(got: torch.Tensor, expected: torch.Tensor, share: float, what: str) -> tuple[float, float]:
    """(largest difference, tolerance); above it, or with NaN, a DataError that begins with `what`."""
    tolerance = share * max(1.0, expected.abs().max().item())
    difference = (got - expected).abs().max().item() if got.shape == expected.shape else float("inf")
    if not difference <= tolerance:
        raise DataError(f"{what}: logits differ by {difference:.3g}, allowed is {tolerance:.3g}; nothing was written")
    return difference, tolerance


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m r1vfree_cli.training.merge")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--base")
    parser.add_argument("--dtype")
    parser.add_argument("--overwrite", action="store_true")
    options: dict[str, Any] = vars(parser.parse_args(argv))
    # So that a stopped merge removes what it has begun.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
    die_with_parent(signal.SIGTERM)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            document, code = merge(**options), 0
    except Exception as e:
        error = e if isinstance(e, R1VError) else refused(e, options["out"])
        if error is None:
            raise
        document, code = {"error": error.to_dict()}, error.exit_code
    print(json.dumps(document, indent=2, ensure_ascii=False), flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
