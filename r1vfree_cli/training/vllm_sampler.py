"""TRL's vLLM sampler with the trainer's prompt, pixel limits, number format and weights, and a check that it had them.

TRL 1.16 hands vLLM the processor's token ids together with the raw images. In colocate mode vLLM then expands the
first of each image's tokens once more and makes its own processor of the checkpoint; nothing fails, and completions
are drawn from another prompt than they are trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate, pairwise
from unittest.mock import patch

import torch
from trl.generation import vllm_client, vllm_generation
from trl.generation.vllm_generation import VLLMGeneration
from trl.import_utils import is_vllm_available
from trl.trainer import grpo_trainer

from ..core.errors import GuardStop, R1VError, UsageError, first_line

AGAIN = "start it again, and continue with --resume, which sends it the weights"


def installed(args, processor, revision: str | None = None):
    """While the returned context is active, a GRPOTrainer that is built makes its sampler a `VLLMSampler`."""
    dtype = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    size = processor.image_processor.size
    if size.get("shortest_edge") is None:
        raise UsageError("vLLM is told the pixel limits of Qwen-VL models alone", hint="train.use_vllm: false")
    engine = {
        "dtype": dtype,  # left to vLLM, float32 weights are rounded to bfloat16
        "revision": revision,
        "mm_processor_kwargs": {"size": {k: size[k] for k in ("shortest_edge", "longest_edge")}},
        "limit_mm_per_prompt": {"video": 0},
    }
    return patch.object(grpo_trainer, "VLLMGeneration", partial(VLLMSampler, engine=engine))


class VLLMSampler(VLLMGeneration):
    """`VLLMGeneration` of which the engine's prompt is the trainer's.

    engine: keyword arguments of `vllm.LLM` that TRL does not pass; of a server they are its command's.
    """

    def __init__(self, *args, engine: dict, **kwargs):
        self._engine = engine
        super().__init__(*args, **kwargs)

    def _init_vllm(self):
        if not is_vllm_available():  # which TRL refuses
            return super()._init_vllm()
        try:
            with patch.object(vllm_generation, "LLM", partial(vllm_generation.LLM, **self._engine)):
                super()._init_vllm()
        except Exception as e:  # of many kinds: no memory, a model that it does not know, no server
            hint = "rank-*.log has all that it said; train.vllm_gpu_memory_utilization is its share of the memory, "
            hint += "train.use_vllm: false does without"
            raise UsageError(f"vLLM cannot start: {' '.join(str(e).split())[:500]}", hint=hint) from e

    def answers(self) -> bool:
        """Whether a server, if there is one, is still there; TRL's session asks for a minute before it gives up."""
        if self.mode != "server" or not self.accelerator.is_main_process:
            return True
        try:
            return bool(self.vllm_client.session.get(f"{self.vllm_client.base_url}/health").ok)
        except OSError:
            return False

    def sync_weights(self):
        super().sync_weights()
        # Images that were seen before would stay encoded by the old vision tower; TRL resets cached prefixes alone.
        if self.mode == "colocate":
            self.llm.llm_engine.reset_encoder_cache()
        elif self.accelerator.is_main_process:
            self.vllm_client.session.post(f"{self.vllm_client.base_url}/reset_encoder_cache").raise_for_status()

    def generate(self, prompts, images, num_generations, profiler=None):
        if self.mode != "colocate" or images is None:
            try:
                with patch.object(vllm_client, "parse_logprobs", _by_name(vllm_client.parse_logprobs)):
                    return super().generate(prompts, images, num_generations, profiler)
            except OSError as e:  # of the connection
                raise GuardStop(f"vLLM went away while it sampled: {first_line(e)}", hint=AGAIN) from e
        token = self.processing_class.image_token_id
        given = [collapsed(ids, self._image_tokens(x), token) for ids, x in zip(prompts, images, strict=True)]
        sampled, *rest = super().generate(given, images, num_generations, profiler)
        for ours, theirs in zip(prompts, sampled, strict=True):
            if list(theirs) != list(ours):
                found = f"{len(theirs)} tokens, not {len(ours)}"
                hint = "train.use_vllm: false; this release of vLLM expands images otherwise"
                raise R1VError(f"vLLM sampled from another prompt than is trained on: {found}", hint=hint)
        return sampled, *rest

    def _image_tokens(self, images: Sequence | None) -> list[int]:
        """How many tokens each image of a prompt becomes."""
        if not images:
            return []
        sizes = [(image.height, image.width) for image in images]
        return list(self.processing_class._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"])

    def _place_features(self, features, prompt_ids):
        if features is None:
            return None
        lengths = [place["length"] for place in features["mm_placeholders"]["image"]]
        offsets = image_offsets(prompt_ids, lengths, self.processing_class.image_token_id)
        places = [{"offset": o, "length": n} for o, n in zip(offsets, lengths, strict=True)]
        return {**features, "mm_placeholders": {**features["mm_placeholders"], "image": places}}


def _by_name(parse):
    """TRL's `parse_logprobs` of what vLLM 0.32 answers: numbers of tokens where TRL 1.16 reads `token_id:N`."""

    def parsed(choices):
        for choice in choices:
            for entry in (choice or {}).get("content") or ():
                for token in (entry, *entry["top_logprobs"]):
                    if "token_id" in token:
                        token["token"] = f"token_id:{token['token_id']}"
        return parse(choices)

    return parsed


def importance(log_ratios: torch.Tensor) -> dict[str, float]:
    """Of log importance ratios (N,): their ratios' mean and maximum, and the effective sample size as a share of N.

    (sum w)^2 / (N sum w^2), Kish 1965: 1 when sampler and trainer agree, 1/N when one completion outweighs all.
    """
    log_ratios = log_ratios.double()
    weights = (log_ratios - log_ratios.max()).exp()
    share = weights.sum() ** 2 / (len(weights) * (weights**2).sum())
    ratios = log_ratios.exp()
    return {"ratio/mean": ratios.mean().item(), "ratio/max": ratios.max().item(), "effective_sample_size": share.item()}


def image_offsets(ids: Sequence[int], lengths: Sequence[int], image_token: int) -> list[int]:
    """Where in the prompt each image's tokens begin; images may touch.

    Raises R1VError: the prompt does not hold the images' tokens, one image after the other.
    """
    places = [i for i, token in enumerate(ids) if token == image_token]
    ends = list(accumulate(lengths, initial=0))
    if len(places) != sum(lengths) or any(places[b - 1] - places[a] != b - 1 - a for a, b in pairwise(ends)):
        limits = '\'{"size": {"shortest_edge": MIN, "longest_edge": MAX}}\''
        made = f"vLLM's processor makes {' + '.join(map(str, lengths)) or 'none'} of its images"
        hint = f"a vLLM server needs the recipe's pixel limits: --mm-processor-kwargs {limits}"
        raise R1VError(f"the prompt has {len(places)} image tokens, {made}", hint=hint)
    return [places[a] for a in ends[:-1]]


def collapsed(ids: Sequence[int], lengths: Sequence[int], image_token: int) -> list[int]:
    """The prompt with one token for each image instead of `lengths`, as vLLM takes it: it expands them itself."""
    out: list[int] = []
    end = 0
    for offset, length in zip(image_offsets(ids, lengths, image_token), lengths, strict=True):
        out += [*ids[end:offset], image_token]
        end = offset + length
    return [*out, *ids[end:]]
