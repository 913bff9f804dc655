"""The one loader of models and processors: for training, evaluation, judging and merging."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
import trl
from transformers import AutoConfig, AutoProcessor
from transformers.integrations import deepspeed, is_deepspeed_zero3_enabled
from transformers.utils import is_flash_attn_2_available
from transformers.utils.peft_utils import find_adapter_config_file

from ..config import schema as config
from ..core import console
from ..core.errors import DataError, UsageError, first_line
from ..core.machine import library
from ..core.process import time_limit
from ..core.prompts import build_messages
from ..run.checkpoint import merge_command, resolve
from . import family as families

transformers.utils.logging.disable_progress_bar()  # a line says what is loaded
# A chat template is a program: it may loop for ever, or write more than a tokenizer can take.
TEMPLATE_S = 10.0
TEMPLATE_CHARS = 4_000_000
# Around a chat template that begins the reply's thinking itself (Qwen3.5's), or ends it before it began.
_UNOPENED = """{{%- set r1v_text %}}{}{{% endset %}}
{{%- set r1v_rest = r1v_text.rsplit('<think>', 1)[-1] %}}
{{%- if '<think>' in r1v_text and not r1v_rest.replace('</think>', '', 1).strip() -%}}
    {{{{- r1v_text.rsplit('<think>', 1)[0] -}}}}
{{%- else -%}}
    {{{{- r1v_text -}}}}
{{%- endif -%}}"""
_CLOSED = """{{%- set r1v_text %}}{}{{% endset %}}
{{{{- r1v_text -}}}}
{{%- if r1v_text.rstrip().endswith('<think>') %}}{{{{- '\n</think>\n\n' -}}}}{{% endif -%}}"""


def load_policy(model: config.Model, seed: int = 0, *, weights: str | None = None):
    """The recipe's model, in its attention and dtype, or in `weights`.

    Call it after the TRL config was built: under ZeRO-3 that is what makes `from_pretrained` shard on loading.

    Raises DataError: no loadable vision-language model there. UsageError: flash_attention_2 was asked for and cannot
    run.
    """
    families.use(model.family)
    policy = load_model(
        resolve(model.name, seed, verify=False).path,
        what=f"model {model.name}",
        revision=model.revision,
        dtype=weights or model.dtype,
        trust_remote_code=model.trust_remote_code,
        attn_implementation=attention(model),
        quantization_config=trl.get_quantization_config(_trl_config(model, model.lora)) if model.lora else None,
    )
    if model.freeze_vision:
        freeze_vision(policy)
    return policy


def load_processor(model: config.Model, seed: int = 0, *, folder: str | None = None, judge: bool = False):
    """The checkpoint's processor, or that of an adapter's `folder`, with the recipe's pixel limits; of a policy or
    `judge`.

    Raises DataError: there is no processor at that place.
    """
    families.use(model.family)
    where = resolve(model.name, seed, verify=False).path
    common: dict[str, Any] = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    processor = open_processor(folder or where, what=f"model {folder or model.name}", **common)
    processor.tokenizer.padding_side = "left"
    with library(f"cannot read the config of model {model.name}"):
        family = families.of(AutoConfig.from_pretrained(where, **common))
    families.limit_pixels(family, processor, model.min_pixels, model.max_pixels)
    settle_thinking(processor, judge=judge)
    return processor


def settle_thinking(processor, *, judge: bool = False) -> None:
    """See that a prompt does not end inside `<think>`, as the chat templates of thinking models have it.

    A policy writes its `<think>` itself: the template's is taken away. A judge is read at the first word of its reply:
    its thinking is closed. `save_pretrained` keeps the change.
    """
    text = render(processor, build_messages("?"))
    opened = text.rpartition("<think>")[2].replace("</think>", "", 1).strip() == ""
    if opened and isinstance(processor.chat_template, str):
        processor.chat_template = (_CLOSED if judge else _UNOPENED).format(processor.chat_template)


def load_model(
    where: str,
    *,
    what: str,
    revision: str | None = None,
    dtype: str,
    trust_remote_code: bool = False,
    loader: str | None = None,
    foreign: tuple[str, ...] = (),
    **options: Any,
) -> Any:
    """A model from safetensors, of the class that its config names (never its path), every weight of it from the files.

    `what`: its name in errors. `loader`: the auto class; by default the family's. `foreign`: beginnings of keys that
    may lie in the files beside the model's own.

    Raises DataError: nothing loadable there, a LoRA adapter, or weights that are missing, left over or of another
    shape.
    """
    common = {"revision": revision, "trust_remote_code": trust_remote_code}
    if find_adapter_config_file(where, revision=revision):  # from_pretrained would load its base, and what fits of it
        folder = where if Path(where).is_dir() else Path(where).name
        fetch = "" if folder == where else f"hf download {where} --local-dir {folder} && "
        raise DataError(f"{what} is a LoRA adapter", hint=f"first: {fetch}{merge_command(folder)}")
    console.log(f"loading {what}")
    hint = "give a hub name or a folder with config.json and *.safetensors"
    with library(f"cannot load {what} as a vision-language model", hint=hint):
        found = AutoConfig.from_pretrained(where, **common)
        auto = getattr(transformers, loader) if loader else auto_class(found)
        check_size(where, found, auto, what)
        options |= common | {"dtype": getattr(torch, dtype), "use_safetensors": True, "output_loading_info": True}
        with torch.random.fork_rng():  # weights are initialised before they are loaded
            model, info = auto.from_pretrained(where, **options)
    lacking = [f"missing: {key}" for key in sorted(info["missing_keys"])]
    lacking += [f"of another shape: {key}" for key, *_ in sorted(info["mismatched_keys"])]
    if lacking:
        raise DataError(f"{what} lacks weights; random ones would take their place", details=lacking[:5])
    extra = [f"unexpected: {key}" for key in sorted(info["unexpected_keys"]) if not key.startswith(foreign)]
    if extra:
        raise DataError(f"{what} has weights that its config.json does not describe", details=extra[:5])
    return model


def auto_class(config) -> Any:
    """The class of transformers that makes a model of a config."""
    return getattr(transformers, families.of(config).loader)


def open_processor(where: str, *, what: str, revision: str | None = None, trust_remote_code: bool = False):
    """A processor that takes images and knows a chat template.

    Raises DataError: there is none, the template or the tokenizer is broken, loops, or leaves out the image.
    """
    with library(f"cannot load the processor of {what}"):
        processor = AutoProcessor.from_pretrained(where, revision=revision, trust_remote_code=trust_remote_code)
    if getattr(processor, "image_processor", None) is None or not hasattr(processor, "tokenizer"):
        raise DataError(f"{what} has no image processor", hint="r1v trains vision-language models")
    text = render(processor, build_messages("?"), what=what)  # a question about an image
    if processor.image_token not in text:
        raise DataError(f"the chat template of {what} leaves out the image")
    with library(f"the tokenizer of {what} does not work"):
        kept = processor.tokenizer.decode(processor.tokenizer(text).input_ids)
    if "?" not in kept:  # without its files transformers makes one with an empty vocabulary
        raise DataError(f"the tokenizer of {what} has no vocabulary", hint="is tokenizer.json there, complete?")
    return processor


def has_processor(folder: Path | str) -> bool:
    """Whether a folder (an adapter's, which may leave it to its base) holds a processor of its own."""
    return any((Path(folder) / name).is_file() for name in ("preprocessor_config.json", "processor_config.json"))


def render(processor, messages: list[dict], *, add_generation_prompt: bool = True, what: str = "") -> str:
    """A conversation as the chat template writes it. Any thread may ask.

    Raises DataError: the template, of `what`, is broken, loops, or writes without end.
    """
    told = f"the chat template of {what or f'model {processor.tokenizer.name_or_path}'}"
    try:
        with time_limit(TEMPLATE_S):
            text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as e:  # lack of memory too: it is the template that wants so much
        raise DataError(f"{told} does not work: {first_line(e)}") from None
    if len(text) > TEMPLATE_CHARS:
        raise DataError(f"{told} writes {len(text):,} characters; at most {TEMPLATE_CHARS:,} are taken")
    return text


def unsharded() -> AbstractContextManager:
    """Load a complete model also where ZeRO-3 is on, which would cut it over the ranks as it cuts the policy."""
    return patch.object(deepspeed, "_hf_deepspeed_config_weak_ref", None)


def check_size(where: str, config, auto: Any, what: str) -> None:
    """Stop before a folder whose config.json describes a model far larger than its weights is given memory.

    Raises DataError: more than two parameters for a stored byte (four-bit weights have two).
    """
    if is_deepspeed_zero3_enabled():  # it shards while loading, and cannot build on the meta device
        return
    stored = sum(file.stat().st_size for file in Path(where).glob("*.safetensors"))
    if not stored:
        return
    with torch.device("meta"):
        count = sum(p.numel() for p in auto.from_config(config).parameters())
    if count > 2 * stored:
        raise DataError(f"cannot load {what}: config.json describes {count} parameters, the weights are {stored} bytes")


def round_weights(policy, dtype: str) -> None:
    """Weights held in float32 for the optimizer's sake, in the dtype that the finished model is stored in.

    Parameters only: the rotary frequencies are computed, not stored, and do not survive a shorter type.
    """
    for parameter in policy.parameters():
        if parameter.dtype == torch.float32:
            parameter.data = parameter.data.to(getattr(torch, dtype))


def freeze_vision(policy) -> None:
    """No gradients for the vision tower (and its merger)."""
    for module in families.of(policy.config).vision_modules(policy):
        module.requires_grad_(False)


def attention(model: config.Model) -> str:
    """The attention implementation: `auto` is flash_attention_2 where it can run, else sdpa."""
    can_flash = torch.cuda.is_available() and model.dtype != "float32" and is_flash_attn_2_available()
    if model.attention == "auto":
        return "flash_attention_2" if can_flash else "sdpa"
    if model.attention == "flash_attention_2" and not can_flash:
        hint = "pip install --no-build-isolation 'flash-attn>=2.8' on a CUDA machine with bfloat16 or float16, or use attention: auto"
        raise UsageError("model.attention is flash_attention_2, which cannot run here", hint=hint)
    return model.attention


def peft_config(policy, model: config.Model):
    """A `peft.LoraConfig` for `model.lora`, which leaves a frozen vision tower alone, or None."""
    if model.lora is None:
        return None
    made: Any = trl.get_peft_config(_trl_config(model, model.lora))
    made.exclude_modules = families.of(policy.config).lora_exclusion if model.freeze_vision else None
    return made


def _trl_config(model: config.Model, lora: config.Lora) -> Any:
    """`model.lora` in TRL's words."""
    return trl.ModelConfig(
        dtype=model.dtype,  # that four-bit weights are computed in
        use_peft=True,
        lora_r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        lora_target_modules=lora.target_modules,
        load_in_4bit=lora.quantize == "4bit",
        load_in_8bit=lora.quantize == "8bit",
        use_bnb_nested_quant=True,
    )
