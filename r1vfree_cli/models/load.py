"""The one loader of models and processors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.integrations import is_deepspeed_zero3_enabled

from ..config import schema as config
from ..core.errors import DataError, R1VError, UsageError, first_line
from ..core.process import time_limit
from ..core.prompts import build_messages
from ..run.checkpoint import merge_command, resolve

TEMPLATE_S = 10.0  # of the chat template's trial: a program that may loop for ever


def load_processor(model: config.Model, seed: int = 0):
    """The checkpoint's processor with the recipe's pixel limits, which `save_pretrained` keeps.

    Raises:
        DataError: there is no processor at that place.
    """
    where = resolve(model.name, seed, verify=False).path
    try:
        processor = AutoProcessor.from_pretrained(
            where, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except Exception as e:  # damaged files raise anything, the tokenizers library bare Exceptions
        raise DataError(f"cannot load the processor of model {model.name}: {first_line(e)}") from None
    if not hasattr(processor, "image_processor"):
        raise DataError(f"model {model.name} has no image processor", hint="r1v trains vision-language models")
    check_template(processor, model.name)
    set_pixel_limits(processor, model.min_pixels, model.max_pixels)
    processor.tokenizer.padding_side = "left"
    return processor


def check_template(processor, name: str) -> None:
    """Render a question about an image, and tokenise it.

    Raises:
        DataError: there is no chat template, it or the tokenizer is broken, it loops, or it leaves out the image.
    """
    try:
        with time_limit(TEMPLATE_S):
            text = processor.apply_chat_template(build_messages("?"), tokenize=False, add_generation_prompt=True)
    except Exception as e:  # a template is a program
        raise DataError(f"the chat template of {name} does not work: {first_line(e)}") from None
    if processor.image_token not in text:
        raise DataError(f"the chat template of {name} leaves out the image")
    try:
        processor.tokenizer(text)
    except Exception as e:  # settings of another type
        raise DataError(f"the tokenizer of {name} does not work: {first_line(e)}") from None


def set_pixel_limits(processor, min_pixels: int, max_pixels: int) -> None:
    """Set the limits (pixels an image, after resizing) through `size`: attributes alone are lost on save."""
    size = processor.image_processor.size
    limits = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    processor.image_processor.size = limits if isinstance(size, dict) else type(size)(**limits)


def load_policy(model: config.Model, seed: int = 0, *, weights: str | None = None):
    """The model, of the class its config names (never its path), in the recipe's attention and dtype, or in `weights`.

    Call it after the TRL config was built: under ZeRO-3 that is what makes `from_pretrained` shard on loading.

    Raises:
        DataError: no loadable vision-language model there.
        UsageError: flash_attention_2 was asked for and is not installed.
    """
    found = resolve(model.name, seed, verify=False)
    if found.kind == "adapter":  # transformers would load its base and ignore the keys that do not fit
        raise DataError(f"model {model.name} is a LoRA adapter", hint=f"first: {merge_command(found.path)}")
    where = found.path
    common = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    options = {"attn_implementation": attention(model), "quantization_config": _quantization(model)}
    try:
        check_size(where, AutoConfig.from_pretrained(where, **common))
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            where,
            dtype=getattr(torch, weights or model.dtype),
            use_safetensors=True,
            output_loading_info=True,
            **options,
            **common,
        )
    except (R1VError, torch.OutOfMemoryError):
        raise
    except Exception as e:  # damaged files raise anything
        raise DataError(
            f"cannot load model {model.name} as a vision-language model: {first_line(e)}",
            hint="give a hub name or a folder with config.json and *.safetensors",
        ) from None
    policy, info = loaded
    if info["missing_keys"]:
        raise DataError(
            f"model {model.name} lacks weights, which would be random", details=sorted(info["missing_keys"])[:5]
        )
    if model.freeze_vision:
        freeze_vision(policy)
    return policy


def check_size(where: str, config) -> None:
    """Stop before a folder whose config.json describes a model far larger than its weights is given memory.

    Raises:
        DataError: more than two parameters for a stored byte (four-bit weights have two).
    """
    if is_deepspeed_zero3_enabled():  # it shards while loading, and cannot build on the meta device
        return
    stored = sum(file.stat().st_size for file in Path(where).glob("*.safetensors"))
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForImageTextToText.from_config(config).parameters())
    if stored and count > 2 * stored:
        raise DataError(
            f"cannot load {where}: config.json describes {count} parameters, the weights are {stored} bytes"
        )


def round_weights(policy, dtype: str) -> None:
    """Weights held in float32 for the optimizer's sake, in the dtype that the finished model is stored in."""
    for parameter in policy.parameters():
        if parameter.dtype == torch.float32:
            parameter.data = parameter.data.to(getattr(torch, dtype))


def freeze_vision(policy) -> None:
    """No gradients for the vision tower (and its merger)."""
    for parameter in policy.model.visual.parameters():
        parameter.requires_grad_(False)


def attention(model: config.Model) -> str:
    """The attention implementation: `auto` is flash_attention_2 where it can run, else sdpa."""
    from transformers.utils import is_flash_attn_2_available

    can_flash = torch.cuda.is_available() and model.dtype != "float32" and is_flash_attn_2_available()
    if model.attention == "auto":
        return "flash_attention_2" if can_flash else "sdpa"
    if model.attention == "flash_attention_2" and not can_flash:
        raise UsageError(
            "model.attention is flash_attention_2, which cannot run here",
            hint="pip install -e '.[flash]' on a CUDA machine with bfloat16 or float16, or use attention: auto",
        )
    return model.attention


def peft_config(model: config.Model):
    """A `peft.LoraConfig` for `model.lora`, or None."""
    if model.lora is None:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=model.lora.r,
        lora_alpha=model.lora.alpha,
        lora_dropout=model.lora.dropout,
        target_modules=model.lora.target_modules,
        exclude_modules=r".*visual.*" if model.freeze_vision else None,
        task_type="CAUSAL_LM",
    )


def _quantization(model: config.Model):
    if model.lora is None or model.lora.quantize is None:
        return None
    from transformers import BitsAndBytesConfig

    if model.lora.quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, model.dtype),
    )
