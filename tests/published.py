"""Sizes of the published models, as in their config.json files; nothing is downloaded."""

from __future__ import annotations

from typing import Any

from transformers import Qwen2_5_VLConfig, Qwen2VLConfig, Qwen3_5Config, Qwen3VLConfig


def _text(hidden, inner, layers, heads, kv, vocabulary, tied, **more):
    return {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv, "vocab_size": vocabulary, "tie_word_embeddings": tied, **more,
    }  # fmt: skip


def _vision(depth, hidden, inner, out, **more):
    return {
        "depth": depth, "hidden_size": hidden, "intermediate_size": inner, "out_hidden_size": out, "num_heads": 16,
        **more,
    }  # fmt: skip


_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}}
_WINDOWS = {"fullatt_block_indexes": [7, 15, 23, 31]}

MODELS = {
    "Qwen/Qwen2-VL-2B-Instruct": (Qwen2VLConfig, _text(1536, 8960, 28, 12, 2, 151936, True), {"depth": 32, "embed_dim": 1280, "hidden_size": 1536}),
    "Qwen/Qwen2-VL-7B-Instruct": (Qwen2VLConfig, _text(3584, 18944, 28, 28, 4, 152064, False), {"depth": 32, "embed_dim": 1280, "hidden_size": 3584}),
    "Qwen/Qwen2.5-VL-3B-Instruct": (Qwen2_5_VLConfig, _text(2048, 11008, 36, 16, 2, 151936, True, **_ROPE), _vision(32, 1280, 3420, 2048, **_WINDOWS)),
    "Qwen/Qwen2.5-VL-7B-Instruct": (Qwen2_5_VLConfig, _text(3584, 18944, 28, 28, 4, 152064, False, **_ROPE), _vision(32, 1280, 3420, 3584, **_WINDOWS)),
    "Qwen/Qwen3-VL-4B-Instruct": (Qwen3VLConfig, _text(2560, 9728, 36, 32, 8, 151936, True, head_dim=128), _vision(24, 1024, 4096, 2560) | {"deepstack_visual_indexes": [5, 11, 17]}),
    "Qwen/Qwen3-VL-8B-Instruct": (Qwen3VLConfig, _text(4096, 12288, 36, 32, 8, 151936, False, head_dim=128), _vision(27, 1152, 4304, 4096)),
    "Qwen/Qwen3.5-4B": (Qwen3_5Config, _text(2560, 9216, 32, 16, 4, 248320, True), _vision(24, 1024, 4096, 2560)),
}  # fmt: skip


def config(name: str, **text: Any):
    """The config of a published model; `text` replaces fields of its text part, such as `num_hidden_layers=2`."""
    cls, own, vision = MODELS[name]
    return cls(text_config=own | text, vision_config=vision, tie_word_embeddings=own["tie_word_embeddings"])
