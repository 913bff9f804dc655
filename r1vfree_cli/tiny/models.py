"""The tiny recipe's models: a Qwen2.5-VL of the real class, small enough for a CPU, with its real processor.

`python -m r1vfree_cli.tiny.models init OUT --seed S` saves random weights, which sft/tiny warm-starts; `judge` a judge.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AddedToken,
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
)
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from ..core import prompts
from ..core.prompts import ASK_YES_NO, RULE, judge_text
from ..data import shapes

PIXELS = 56 * 56  # of every image: 2 x 2 visual tokens
POLICY_LAYERS = 2
JUDGE_LAYERS = 3  # find what the question means, answer it, compare
INIT_STD = 0.12  # the usual 0.02 learns far slower at this size

# In the order of Qwen2's vocabulary.
_NAMES = "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end"
_NAMES += " vision_start vision_end vision_pad image_pad video_pad"
SPECIAL_TOKENS = tuple(f"<|{name}|>" for name in _NAMES.split())
# Ordinary tokens, not special ones: decoding keeps them.
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
# What stands in every prompt, each as one token: a third of the length, and far quicker to learn.
FIXED_TEXTS = (prompts.INSTRUCTION, RULE, ASK_YES_NO, '\nQuestion: "', '"\nAnswer: "', '"\n')

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
    questions += [f"What colour is the {shape}?" for shape in shapes.SHAPES]
    questions += [f"Which shape is {colour}?" for colour in shapes.COLOURS]
    questions += [f"How many {shape}s are there?" for shape in shapes.SHAPES]
    questions += [f"How many {colour} shapes are there?" for colour in shapes.COLOURS]
    questions += [f"Is there a {thing}?" for thing in things]
    questions += [f"Is the {shape} in the sky or on the ground?" for shape in shapes.SHAPES]
    answers = [answer for kind in shapes.KINDS for answer in shapes.ANSWERS[kind]]
    words = [*things, ", ".join(things), *answers, "Yes", "No", shapes.NOTHING, "user", "assistant", "system"]
    texts = [prompts.user_text(q) for q in questions] + [judge_text(q, w) for q in questions for w in words] + words
    # Tags are tokens of their own already.
    return [re.sub("|".join(TAGS), " ", text) for text in texts]


def make_processor() -> Qwen2_5_VLProcessor:
    """A processor of the real class. Its byte-level BPE has whole words for the recipe's texts and bytes for others."""
    backend = Qwen2Tokenizer().backend_tokenizer  # normalizes and splits as the real one does
    bpe = Tokenizer(models.BPE())
    bpe.normalizer, bpe.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # More than the texts have: it ends when every word is one token.
    trainer = trainers.BpeTrainer(vocab_size=4096, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(corpus() * 2, trainer)  # twice, as it merges only what it met twice
    learnt = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learnt["vocab"],
        merges=[tuple(pair) for pair in learnt["merges"]],  # type: ignore[misc] # pairs, though declared as text
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
    )
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in (*TAGS, *FIXED_TEXTS)])
    size = {"shortest_edge": PIXELS, "longest_edge": PIXELS}
    images, videos = Qwen2VLImageProcessor(size=size), Qwen2VLVideoProcessor(size=size)
    return Qwen2_5_VLProcessor(images, tokenizer, videos, chat_template=CHAT_TEMPLATE)


def make_model(processor, seed: int, *, layers: int) -> Qwen2_5_VLForConditionalGeneration:
    """A float32 model with random weights: text `layers` x 128, vision 2 x 96; an image of 28 px a side is a token."""
    ids = processor.tokenizer.convert_tokens_to_ids
    pad, end = ids("<|endoftext|>"), ids("<|im_end|>")
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(processor.tokenizer),
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
            "bos_token_id": pad,
            "eos_token_id": end,
            "pad_token_id": pad,
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
    )
    config.initializer_range = INIT_STD
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(bos_token_id=pad, pad_token_id=pad, eos_token_id=[end, pad])
    return model


def make_judge(processor, seed: int, steps: int | None = None) -> Qwen2_5_VLForConditionalGeneration:
    """A trained judge; 0 steps: an untrained one, for controls. The policy of the same seed has other weights."""
    from . import judge as tiny_judge

    model = make_model(processor, seed + 1_000_003, layers=JUDGE_LAYERS)
    steps = tiny_judge.STEPS if steps is None else steps
    if steps:
        groups = tiny_judge.by_image(shapes.iter_shapes("judge", seed))
        tiny_judge.train(model, processor, groups, steps=steps, seed=seed)
    return model


def main(argv: list[str] | None = None) -> None:
    """The command line in the module's docstring."""
    parser = argparse.ArgumentParser(prog="r1vfree_cli.tiny.models")
    parser.add_argument("piece", choices=("init", "judge"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="of the judge; 0 leaves it untrained")
    given = parser.parse_args(argv)
    processor, judge = make_processor(), given.piece == "judge"
    made = (
        make_judge(processor, given.seed, given.steps)
        if judge
        else make_model(processor, given.seed, layers=POLICY_LAYERS)
    )
    made.save_pretrained(given.out)
    processor.save_pretrained(given.out)


if __name__ == "__main__":
    main()
