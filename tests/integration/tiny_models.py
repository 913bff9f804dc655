"""Tiny models of the real Qwen-VL classes, with real processors, for tests; nothing is downloaded.

Sizes are asymmetric on purpose (heads, key-value heads, layers and widths all differ), so that a transpose shows.
The generation config carries what the published checkpoints carry, near-greedy sampling included.
"""

from __future__ import annotations

import inspect
from functools import lru_cache
from pathlib import Path

import torch
from transformers import (
    AutoProcessor,
    GenerationConfig,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

KINDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")

# Whether this transformers' models take an image's features in place of its pixels (since 5.19).
TAKES_FEATURES = "mm_encoder_outputs" in inspect.signature(Qwen2_5_VLForConditionalGeneration.forward).parameters

# The order of Qwen2's vocabulary.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

INTERNVL_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}

# ChatML as the Qwen-VL processors write it; Qwen3-VL adds no system turn of its own.
_TEMPLATE = """
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' and SYSTEM %}
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif part.type == 'video' %}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' }}
            {%- elif part.type == 'text' %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

_CORPUS = """<think></think><answer></answer> Look at the image and reason first, inside tags; then give the final
answer alone. What colour is the circle? How many squares are there? red green blue yellow square circle triangle
Yes No left right above below one two three Is there a shape in this picture? The answer is assistant user system
You are a helpful assistant."""


@lru_cache(1)
def _bpe() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A byte-level BPE vocabulary of 256 bytes and about 60 merges: every text can be encoded."""
    import json

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([_CORPUS], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def tiny_processor(kind: str = "qwen2_5_vl", *, min_pixels: int = 28 * 28, max_pixels: int = 84 * 84):
    """The real processor of `kind` with a small vocabulary; images become 1 to 9 tokens (28 px each; Qwen3: 32).

    InternVL's become 4 a tile of 56 x 56.
    """
    vocab, merges = _bpe()
    tokenizer = Qwen2Tokenizer(
        vocab=dict(vocab),
        merges=list(merges),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
        **({"extra_special_tokens": INTERNVL_TOKENS} if kind == "internvl" else {}),
    )
    if kind == "internvl":
        template = _TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<IMG_CONTEXT>")
        return InternVLProcessor(
            image_processor=GotOcr2ImageProcessor(size={"height": 56, "width": 56}, crop_to_patches=True),
            tokenizer=tokenizer,
            video_processor=InternVLVideoProcessor(),
            image_seq_length=4,
            chat_template=template.replace("SYSTEM", "false"),
        )
    size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    newer = kind in ("qwen3_vl", "qwen3_5")
    images = {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3} if newer else {}
    cls = {"qwen2_vl": Qwen2VLProcessor, "qwen2_5_vl": Qwen2_5_VLProcessor}.get(kind, Qwen3VLProcessor)
    video = Qwen3VLVideoProcessor() if newer else Qwen2VLVideoProcessor()
    return cls(
        image_processor=Qwen2VLImageProcessor(size=size, **images),
        tokenizer=tokenizer,
        video_processor=video,
        chat_template=_TEMPLATE.replace("SYSTEM", "false" if newer else "true"),
    )


def tiny_config(kind: str, processor, width: int = 48):
    """The real config class of `kind`: text 2 layers x `width` (4 heads, 2 key-value heads), vision 3 layers x 40."""
    ids = processor.tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(processor.tokenizer) + 3,  # as published: padded beyond the tokenizer
        "hidden_size": width,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [width // 48, width // 24, width // 8 - width // 48 - width // 24],
        },
        "bos_token_id": ids("<|endoftext|>"),
        "eos_token_id": ids("<|im_end|>"),
        "max_position_embeddings": 2048,
    }
    special = {
        "image_token_id": ids("<|image_pad|>"),
        "video_token_id": ids("<|video_pad|>"),
        "vision_start_token_id": ids("<|vision_start|>"),
        "vision_end_token_id": ids("<|vision_end|>"),
        "tie_word_embeddings": kind == "qwen2_vl",  # the 2B is tied
    }
    if kind == "internvl":
        del text["rope_parameters"]["mrope_section"]
        vision = {"hidden_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 72}
        vision |= {"image_size": [56, 56], "patch_size": [14, 14]}
        tied = {"tie_word_embeddings": False, "image_token_id": ids("<IMG_CONTEXT>"), "image_seq_length": 4}
        return InternVLConfig(text_config={"model_type": "qwen2"} | text, vision_config=vision, **tied)
    if kind == "qwen2_vl":
        vision = {"depth": 3, "embed_dim": 40, "hidden_size": width, "num_heads": 2, "mlp_ratio": 2}
        return Qwen2VLConfig(text_config=text, vision_config=vision, **special)
    if kind == "qwen2_5_vl":
        vision = {
            "depth": 3,
            "hidden_size": 40,
            "out_hidden_size": width,
            "num_heads": 2,
            "intermediate_size": 72,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        }
        return Qwen2_5_VLConfig(text_config=text, vision_config=vision, **special)
    if kind == "qwen3_5":
        return _hybrid_config(text, special)
    text |= {"head_dim": width // 4}
    text["rope_parameters"] |= {
        "mrope_interleaved": True,
        "mrope_section": [width // 8 - width // 24 * 2, width // 24, width // 24],
    }
    vision = {
        "depth": 3,
        "hidden_size": 40,
        "out_hidden_size": width,
        "num_heads": 2,
        "intermediate_size": 72,
        "num_position_embeddings": 36,
        "deepstack_visual_indexes": [0, 2],
    }
    return Qwen3VLConfig(text_config=text, vision_config=vision, **special)


def _hybrid_config(text: dict, special: dict) -> Qwen3_5Config:
    """A layer of linear attention and one of full attention; rotary positions on a quarter of each head."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 1], "mrope_interleaved": True}
    text |= {"head_dim": 24, "rope_parameters": rope | {"partial_rotary_factor": 0.25}}
    text |= {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2}
    text |= {"linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 12}
    vision = {"depth": 2, "hidden_size": 40, "out_hidden_size": text["hidden_size"], "num_heads": 2}
    vision |= {"intermediate_size": 72, "num_position_embeddings": 36}
    return Qwen3_5Config(text_config=text, vision_config=vision, **special)


def tiny_model(kind: str = "qwen2_5_vl", *, seed: int = 0, std: float = 0.1, processor=None, width: int = 48):
    """A float32 model of the real class of `kind` (about 100,000 weights), in evaluation mode, with its processor.

    `std` is above the usual 0.02 so that differences in inputs show in the logits. vLLM on a CPU needs heads of 32
    numbers: a `width` of 128.
    """
    processor = processor or tiny_processor(kind)
    config = tiny_config(kind, processor, width)
    config.text_config.initializer_range = config.vision_config.initializer_range = config.initializer_range = std
    cls = {
        "qwen2_vl": Qwen2VLForConditionalGeneration,
        "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
        "qwen3_vl": Qwen3VLForConditionalGeneration,
        "qwen3_5": Qwen3_5ForConditionalGeneration,
        "internvl": InternVLForConditionalGeneration,
    }[kind]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = cls(config)
    ids = processor.tokenizer.convert_tokens_to_ids
    model.generation_config = GenerationConfig(
        bos_token_id=ids("<|endoftext|>"),
        pad_token_id=ids("<|endoftext|>"),
        eos_token_id=[ids("<|im_end|>"), ids("<|endoftext|>")],
        do_sample=True,
        temperature=1e-6,
        top_k=1,
        top_p=0.001,
        repetition_penalty=1.05,
    )
    return model.eval(), processor


def save_tiny(path: Path | str, kind: str = "qwen2_5_vl", *, seed: int = 0, dtype=torch.float32, **kwargs) -> Path:
    """Write a whole model folder (weights, processor, chat template, generation config); returns its path."""
    model, processor = tiny_model(kind, seed=seed, **kwargs)
    model.to(dtype).save_pretrained(path)
    processor.save_pretrained(path)
    return Path(path)


def load_tiny(path: Path | str):
    """(model, processor) of a folder written by `save_tiny`, through the Auto classes."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(path).eval(), AutoProcessor.from_pretrained(path)


def draw(seed: int, size: tuple[int, int] = (56, 56)):
    """A PIL image (width, height) with one coloured rectangle on noise; other seeds are other images."""
    import numpy as np
    from PIL import Image, ImageDraw

    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 60, (size[1], size[0], 3), dtype=np.uint8))
    x, y = (int(v) for v in rng.integers(0, min(size) // 2, 2))
    colour = tuple(int(v) for v in rng.integers(80, 256, 3))
    ImageDraw.Draw(image).rectangle([x, y, x + min(size) // 3, y + min(size) // 3], fill=colour)
    return image


def draw_rows(n: int, *, seed: int = 0, sizes=((56, 56), (84, 56), (56, 84))) -> list[dict]:
    """`n` rows of the schema (id, images as PIL, problem, solution, thinking, source), of several sizes and lengths."""
    problems = ("What colour is the square?", "How many squares are there in this picture?", "Is there a circle?")
    answers = ("red", "two", "No, there is none")
    return [
        {
            "id": f"row-{seed}-{i}",
            "images": [draw(seed * 10_000 + i, sizes[i % len(sizes)])],
            "problem": problems[i % 3],
            "solution": answers[i % 3],
            "thinking": None if i % 2 else "I look at the shape.",
            "source": "drawn",
        }
        for i in range(n)
    ]


def write_rows(folder: Path | str, rows: list[dict], split: str = "train") -> Path:
    """A folder with `rows` (as of `draw_rows`) as one parquet file, for `data.path`; solution may be None."""
    import datasets

    text = datasets.Value("string")
    names = ("id", "problem", "solution", "thinking", "source")
    features = datasets.Features({name: text for name in names} | {"images": datasets.List(datasets.Image())})
    Path(folder).mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(Path(folder) / f"{split}-00000.parquet"))
    return Path(folder)
