"""A judge model in this process: scores (images, question, answer) in batches. `checkpoint` tells its kinds."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoProcessor,
)

from ..core.errors import DataError
from ..core.prompts import as_data, messages_for
from .kinds import VALUE_HEAD, checkpoint_file, detect_kind, prompt_of, unloadable

Item = tuple[Sequence[Image.Image], str, str]  # images, question, answer
Request = tuple[Sequence[Image.Image], list[dict]]  # images, messages with a placeholder for each


class LocalJudge:
    """A loaded judge.

    Args:
        model: folder or hub name.
        revision: of the hub repository.
        device: where it runs; by default the current GPU, else the CPU.
        dtype: of the weights; by default bfloat16 on a GPU, float32 on a CPU.
        batch_size: most judgements in one forward pass.

    Raises:
        DataError: the checkpoint cannot be loaded whole, sees no images, or cannot tell Yes from No.
    """

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        batch_size: int = 32,
    ):
        self.name = model
        self.kind = detect_kind(model, revision)
        self.prompt = prompt_of(self.kind)
        self.batch_size = batch_size
        self.tokens = 0  # text and image tokens of all prompts so far
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        auto = AutoModelForSequenceClassification if self.kind == "classification" else AutoModelForImageTextToText
        options = {"revision": revision, "trust_remote_code": False, "use_safetensors": True}
        try:
            self.processor = AutoProcessor.from_pretrained(model, revision=revision, trust_remote_code=False)
            with _whole_model(), torch.random.fork_rng():
                loaded, info = auto.from_pretrained(model, output_loading_info=True, dtype=dtype, **options)  # type: ignore[misc]
        except torch.OutOfMemoryError:
            raise
        except Exception as e:  # damaged files raise anything
            raise unloadable(model, e) from None
        if info["missing_keys"]:
            names = ", ".join(sorted(info["missing_keys"])[:3])
            raise DataError(f"judge {model} lacks weights ({names}, ...); random ones would judge at random")
        if getattr(self.processor, "image_processor", None) is None or not hasattr(self.processor, "tokenizer"):
            raise DataError(f"judge {model} has no image processor: it would not see the image")
        self.model = loaded.to(self.device).eval().requires_grad_(False)
        self.processor.tokenizer.padding_side = "left"
        if self.processor.tokenizer.pad_token is None:
            self.processor.tokenizer.pad_token = self.processor.tokenizer.eos_token
        if self.kind == "yes_no":
            self._yes, self._no = self._first_tokens()
        elif self.kind == "value_head":
            self._weight, self._bias = _read_value_head(model, revision, self.device)

    def score(self, items: Sequence[Item]) -> list[float]:
        """One finite score for each (images, question, answer), in order; equal items are computed once."""
        requests = [(images, messages_for(self.prompt, q, a, len(images))) for images, q, a in items]
        return self.score_messages(requests, add_generation_prompt=self.prompt == "judge")

    @torch.inference_mode()
    def score_messages(self, requests: Sequence[Request], *, add_generation_prompt: bool) -> list[float]:
        """`score` for conversations that are already written, as a server gets them. Their text stays data."""
        texts = [self._render(messages, add_generation_prompt) for _, messages in requests]
        keys = [tuple(_image_key(image) for image in images) for images, _ in requests]
        distinct = {(text, key): images for text, key, (images, _) in zip(texts, keys, requests, strict=True)}
        found: dict[tuple, float] = {}
        wanted = list(distinct)
        for start in range(0, len(wanted), self.batch_size):
            part = wanted[start : start + self.batch_size]
            scores = self._forward([t for t, _ in part], [k for _, k in part], [distinct[p] for p in part])
            found.update(zip(part, scores.tolist(), strict=True))
        return [found[text, key] for text, key in zip(texts, keys, strict=True)]

    def _render(self, messages: list[dict], add_generation_prompt: bool) -> str:
        safe = [
            {
                **m,
                "content": [{**p, "text": as_data(p["text"])} if p["type"] == "text" else p for p in m["content"]],
            }
            for m in messages
        ]
        return self.processor.apply_chat_template(safe, tokenize=False, add_generation_prompt=add_generation_prompt)

    def _forward(self, texts: list[str], keys: list[tuple], images: list[Sequence[Image.Image]]) -> torch.Tensor:
        inputs = self._inputs(texts, keys, images)
        self.tokens += int(inputs["attention_mask"].sum())
        if self.kind == "classification":
            logits = self.model(**inputs, use_cache=False).logits.float()  # (B, labels)
            return logits[:, 0] if logits.shape[-1] == 1 else logits.softmax(-1)[:, -1]
        if self.kind == "value_head":
            hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state[:, -1]  # (B, H), padded left
            return hidden.float() @ self._weight + self._bias
        logits = self.model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]  # (B, V)
        return logits[:, [self._yes, self._no]].float().softmax(-1)[:, 0]

    def _inputs(self, texts: list[str], keys: list[tuple], images: list[Sequence[Image.Image]]) -> dict[str, Any]:
        distinct = {
            k: image for ks, group in zip(keys, images, strict=True) for k, image in zip(ks, group, strict=True)
        }
        if distinct and self._encodes_apart():
            return self._inputs_encoded_once(texts, keys, distinct)
        given = {"images": [list(group) for group in images]} if distinct else {}
        return dict(self.processor(text=texts, padding=True, return_tensors="pt", **given).to(self.device))

    def _encodes_apart(self) -> bool:
        """True for the Qwen-VL family in a transformers that takes ready image features."""
        return (
            "image_grid_thw" in self.processor.model_input_names
            and hasattr(self.processor, "image_token_id")
            and hasattr(self.model.base_model, "get_image_features")
            and "mm_encoder_outputs" in inspect.signature(self.model.forward).parameters
        )

    def _inputs_encoded_once(self, texts: list[str], keys: list[tuple], distinct: dict) -> dict[str, Any]:
        """The completions of a group share their image: it is preprocessed and encoded once."""
        place = {k: i for i, k in enumerate(distinct)}
        order = [place[k] for ks in keys for k in ks]
        pixels = self.processor.image_processor(images=list(distinct.values()), return_tensors="pt").to(self.device)
        grid = pixels["image_grid_thw"]  # (images, 3): time, height, width in patches
        features = self.model.base_model.get_image_features(pixels["pixel_values"], grid, return_dict=True)
        sizes = (grid.prod(-1) // self.processor.image_processor.merge_size**2).tolist()
        # One tensor (tokens, H) per image; for Qwen3-VL also one per layer that the image enters, and image.
        features.pooler_output = tuple(features.pooler_output[i] for i in order)
        if "deepstack_features" in features:
            features.deepstack_features = [tuple(layer[i] for i in order) for layer in features.deepstack_features]
        token, counts = self.processor.image_token, iter([sizes[i] for i in order])
        full = [re.sub(re.escape(token), lambda m: m.group() * next(counts), text) for text in texts]
        inputs = dict(self.processor.tokenizer(full, padding=True, return_tensors="pt").to(self.device))
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == self.processor.image_token_id).long()
        return {**inputs, "image_grid_thw": grid[order], "mm_encoder_outputs": {"image": features}}

    def _first_tokens(self) -> tuple[int, int]:
        encode = self.processor.tokenizer.encode
        yes, no = (encode(word, add_special_tokens=False)[0] for word in ("Yes", "No"))
        if yes == no:
            raise DataError(f"judge {self.name}: its tokeniser begins Yes and No with the same token")
        return yes, no


def _image_key(image: Image.Image) -> bytes:
    digest = hashlib.sha256(f"{image.mode} {image.size}".encode())
    digest.update(image.tobytes())
    return digest.digest()


def _read_value_head(model: str, revision: str | None, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (H,) and bias () of the linear head, in float32 as TRL keeps it."""
    path = checkpoint_file(model, VALUE_HEAD, revision)
    assert path is not None
    try:
        tensors = load_file(path, device=str(device))
    except (OSError, SafetensorError) as e:
        raise unloadable(model, f"{path.name}: {e}") from None
    weight = [t for name, t in tensors.items() if name.endswith("summary.weight")]
    bias = [t for name, t in tensors.items() if name.endswith("summary.bias")]
    if len(weight) != 1 or weight[0].shape[0] != 1:
        raise DataError(f"{path.name} of judge {model} holds no v_head.summary.weight of shape (1, hidden size)")
    return weight[0][0].float(), bias[0][0].float() if bias else torch.zeros((), device=device)


@contextmanager
def _whole_model() -> Iterator[None]:
    """Load a whole model also where ZeRO-3 is on, which would cut it over the ranks as it cuts the policy."""
    from transformers.integrations import deepspeed as integration

    reference = integration._hf_deepspeed_config_weak_ref
    integration._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = reference
