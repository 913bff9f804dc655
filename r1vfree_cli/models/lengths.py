"""How many tokens, text and image, the prompt of each row takes, and the filter that drops long ones: never a cut."""

import hashlib
import io
import json
from typing import Any

from PIL import Image

from ..core import console
from ..core.errors import DataError
from ..core.files import cache_dir, remembered
from ..core.prompts import DEFAULT, Prompt, build_messages, template_hash
from .load import render

_BATCH = 512


def prompt_lengths(rows, processor, prompt: Prompt = DEFAULT) -> list[int]:
    """Tokens of each row's complete prompt: chat template, question, instruction, and images after the processor's
    resize.

    Only image headers are read. Cached by the rows' fingerprint and everything of the processor that matters.
    """
    parts = [
        rows._fingerprint,
        processor.tokenizer.backend_tokenizer.to_str(),
        str(getattr(processor, "chat_template", None)),
        json.dumps(processor.image_processor.to_dict(), sort_keys=True, default=str),
        template_hash(prompt),
    ]
    key = hashlib.sha256("\x00".join(parts).encode()).hexdigest()
    cache = cache_dir("lengths", f"{key}.json")

    def sound(found: Any) -> bool:
        return isinstance(found, list) and len(found) == len(rows) and all(type(n) is int and n > 0 for n in found)

    return remembered(cache, sound, lambda: _all_lengths(rows, processor, prompt))


def _all_lengths(rows, processor, prompt: Prompt) -> list[int]:
    import datasets

    plain = rows.with_format(None).select_columns(["images", "problem"])
    plain = plain.cast_column("images", datasets.List(datasets.Image(decode=False)))
    lengths = list[int]()
    if len(plain) > 4 * _BATCH:
        console.log(f"counting the tokens of {len(plain):,} prompts")
    for start in range(0, len(plain), _BATCH):
        batch = plain[start : start + _BATCH]
        texts = [
            render(processor, build_messages(problem, len(found or []), prompt))
            for problem, found in zip(batch["problem"], batch["images"], strict=True)
        ]
        # The template writes one placeholder an image; the processor repeats it for each of the image's tokens.
        for ids, found in zip(processor.tokenizer(texts)["input_ids"], batch["images"], strict=True):
            sizes = [_size(image) for image in found or []]
            tokens = processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"] if sizes else []
            lengths.append(len(ids) + sum(tokens) - len(sizes))
    return lengths


def _size(image: dict[str, Any]) -> tuple[int, int]:
    """(height, width) from the header."""
    with Image.open(io.BytesIO(image["bytes"]) if image.get("bytes") else image["path"]) as opened:
        return opened.height, opened.width


def drop_long_prompts(rows, processor, limit: int | None, prompt: Prompt = DEFAULT, *, longest_first: bool = False):
    """(rows whose prompt has at most `limit` tokens, all for None; number dropped). Raises DataError: nothing is left.

    `longest_first`: in that order; what fits first fits later.
    """
    if limit is None and not longest_first:
        return rows, 0
    lengths = prompt_lengths(rows, processor, prompt)
    keep = [i for i, n in enumerate(lengths) if limit is None or n <= limit]
    if not keep:
        shortest = f", the shortest prompt has {min(lengths)} tokens" if lengths else ""
        hint = "raise data.max_prompt_tokens, or lower model.max_pixels for fewer image tokens"
        what = f"no row fits data.max_prompt_tokens = {limit}: all {len(rows)} were dropped{shortest}"
        raise DataError(what, hint=hint)
    if longest_first:
        keep.sort(key=lambda i: -lengths[i])
    elif len(keep) == len(rows):
        return rows, 0
    return rows.select(keep), len(rows) - len(keep)
