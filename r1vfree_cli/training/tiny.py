"""The tiny recipe's models: a Qwen2.5-VL of the real class, small enough for a CPU, with its real processor.

`python -m r1vfree_cli.training.tiny init OUT --seed S` saves it with random weights.
"""

from __future__ import annotations

import json

import torch
from tokenizers import Tokenizer, models, trainers
from transformers import (
    AddedToken,
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from .. import prompts
from ..data import shapes
from ..rewards.judge_prompt import judge_text

PIXELS = 56 * 56  # of every image: 2 x 2 visual tokens
LAYERS = 2
INIT_STD = 0.12  # the usual 0.02 learns far slower at this size

# In the order of Qwen2's vocabulary.
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
# Ordinary tokens, not special ones: decoding keeps them.
TAGS = ("<think>", "</think>", "<answer>", "</answer>")

# ChatML as Qwen-VL writes it, without a system turn: a small model should not have to read one.
CHAT_TEMPLATE = """
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'image' -%}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- elif part['type'] == 'video' -%}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
            {%- else -%}
                {{- part['text'] -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}"""


def corpus() -> list[str]:
    """Every text of the recipe, so that each of its words becomes one token."""
    things = [f"{colour} {shape}" for colour in shapes.COLOURS for shape in shapes.SHAPES]
    questions = [shapes.CAPTION_QUESTION, "How many shapes are there?"]
    questions += [f"What colour is the {s}?" for s in shapes.SHAPES] + [f"How many {s}s are there?" for s in shapes.SHAPES]
    questions += [f"Which shape is {c}?" for c in shapes.COLOURS] + [f"How many {c} shapes are there?" for c in shapes.COLOURS]
    questions += [f"Is there a {t}?" for t in things] + [f"Is the {t} above or below the {t}?" for t in things]
    answers = [a for kind in shapes.KINDS for a in shapes.ANSWERS[kind]]
    words = [*things, ", ".join(things), *answers, "Yes", "No", "user", "assistant", "system"]
    return [prompts.user_text(q) for q in questions] + [judge_text(q, a) for q in questions for a in words] + words * 2


def make_processor() -> Qwen2_5_VLProcessor:
    """The processor of the real class: byte-level BPE of the recipe's own words (any UTF-8 text still encodes)."""
    base = Qwen2Tokenizer()
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = base.backend_tokenizer.normalizer
    bpe.pre_tokenizer = base.backend_tokenizer.pre_tokenizer
    from tokenizers import pre_tokenizers

    trainer = trainers.BpeTrainer(
        vocab_size=4096,  # more than the texts have: it ends when every word is one token
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tags = "|".join(TAGS)
    import re

    bpe.train_from_iterator([re.sub(tags, " ", text) for text in corpus()], trainer)
    model = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
    )
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    size = {"shortest_edge": PIXELS, "longest_edge": PIXELS}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=size),
        chat_template=CHAT_TEMPLATE,
    )


def make_model(processor, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    ids = processor.tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(processor.tokenizer),
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
            "bos_token_id": ids("<|endoftext|>"),
            "eos_token_id": ids("<|im_end|>"),
            "pad_token_id": ids("<|endoftext|>"),
            "initializer_range": INIT_STD,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_heads": 4,
            "out_hidden_size": 128,
            "fullatt_block_indexes": [1],
            "initializer_range": INIT_STD,
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=False,
        initializer_range=INIT_STD,
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        bos_token_id=ids("<|endoftext|>"),
        pad_token_id=ids("<|endoftext|>"),
        eos_token_id=[ids("<|im_end|>"), ids("<|endoftext|>")],
    )
    return model
