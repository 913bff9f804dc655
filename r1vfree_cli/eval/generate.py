"""Generation with a local model: batches by length, each figure encoded once, the same tokens as one at a time."""

import hashlib
import io
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from ..config import schema as config
from ..core import console
from ..core.errors import DataError, UsageError
from ..judges.replies import Reply
from ..models import family as families
from ..models.adapter import base_of_adapter, load_adapter
from ..models.load import has_processor, load_policy, load_processor, render
from ..models.sampling import pin_generation, watch_logits
from ..run.checkpoint import adapter_base, is_adapter
from ..shared_prefix.prompts import encode_images, model_images
from .questions import Job

_KEPT = ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw")


@dataclass
class _Prompt:
    """A question as the processor gives it: (1, length) each, image_grid_thw (1, 3); its pixels are not kept."""

    job: Job
    figure: str  # content key of the figure, "" without one
    inputs: dict[str, torch.Tensor]

    @property
    def length(self) -> int:
        return self.inputs["input_ids"].shape[1]


class Generator:
    """A loaded model. `name` is a hub name, a folder, a LoRA folder (with its base), or an embedded name."""

    def __init__(
        self,
        name: str,
        *,
        base: str | None = None,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        device: str = "auto",
        dtype: str = "auto",
        seed: int = 0,
        **model: Any,
    ):
        """Load model and processor; `model`: its revision, family and pixel limits, as in a recipe.

        Raises DataError: no vision-language model there, or an adapter that does not fit its base. UsageError: the
        device cannot be used.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise UsageError(f"device {device} cannot be used: no CUDA device", hint="--device cpu")
        self.device = torch.device(device)
        self.dtype = dtype if dtype != "auto" else "float32" if self.device.type == "cpu" else "bfloat16"
        self.seed = seed
        local = Path(name).is_dir()
        adapter = name if is_adapter(name) or (base and not local) else None
        if is_adapter(name):
            base = adapter_base(name, base)
        wanted = config.Model(name=base if adapter and base else name, dtype=self.dtype, **model)  # type: ignore[arg-type]
        with base_of_adapter() if adapter else nullcontext():
            self.processor = load_processor(wanted, seed, folder=name if adapter and has_processor(name) else None)
            self.model = load_policy(wanted, seed)
        if adapter:
            # LoRA layers are put into the base model's modules: its own generate() runs with them.
            self.model = load_adapter(self.model, adapter, base).get_base_model()
        self.model.eval().to(self.device)
        self.reuse = families.of(self.model.config).takes_features(self.model)
        sampling: dict[str, Any] = {"max_new_tokens": max_new_tokens, "repetition_penalty": 1.0, "do_sample": False}
        if temperature:
            sampling |= {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
        pin_generation(self.model, self.processor.tokenizer, **sampling)
        self.settings = self.model.generation_config

    @torch.inference_mode()
    def run(self, jobs: list[Job], batch_size: int, done: Callable[[Job, Reply], None]) -> None:
        """Answer all jobs; `done` is called for each as its batch finishes.
        Raises DataError: a figure that the processor cannot take, or a prompt longer than the model's context."""
        features: dict[str, torch.Tensor] = {}
        prompts: list[_Prompt] = []
        with console.progress("prepare questions", len(jobs)) as bar:
            for job in jobs:
                prompts.append(self._prompt(job, features))
                bar.advance()
        # Text-only prompts apart; the longest first, so that a lack of memory shows at once.
        prompts.sort(key=lambda p: (not p.figure, -p.length, p.job.id))
        left = Counter(p.figure for p in prompts)
        with console.progress("generate", len(prompts)) as bar:
            start = 0
            while start < len(prompts):
                text_only = not prompts[start].figure
                batch = [p for p in prompts[start : start + batch_size] if (not p.figure) == text_only]
                try:
                    answers = self._generate(batch, features)
                except torch.cuda.OutOfMemoryError:
                    torch.cuda.empty_cache()
                    if batch_size == 1:
                        raise UsageError("not enough GPU memory for one question") from None
                    batch_size = max(1, len(batch) // 2)
                    console.warn(f"not enough GPU memory: going on with --batch-size {batch_size}")
                    continue
                start += len(batch)
                for prompt, answer in zip(batch, answers):
                    done(prompt.job, answer)
                    left[prompt.figure] -= 1
                    if not left[prompt.figure]:
                        features.pop(prompt.figure, None)
                bar.advance(len(batch))

    def _prompt(self, job: Job, features: dict[str, torch.Tensor]) -> _Prompt:
        """Tokens of a question. Its figure's features, (tokens, width), are computed the first time it is seen."""
        inputs = self._inputs([job])
        figure = hashlib.sha256(job.image).hexdigest() if job.image else ""
        grid = inputs.get("image_grid_thw")
        if grid is not None and self.reuse and figure not in features:
            pixels = inputs["pixel_values"].to(self.device, self.model.dtype)
            # Kept outside the accelerator: hundreds of figures wait for their batch.
            features[figure] = encode_images(self.model.base_model, pixels, grid.to(self.device)).cpu()
        prompt = _Prompt(job, figure, {key: inputs[key] for key in _KEPT if key in inputs})
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if context and prompt.length + self.settings.max_new_tokens > context:
            what = f"{job.id}: {prompt.length} prompt tokens and {self.settings.max_new_tokens} new ones exceed the "
            hint = "nothing is ever cut; lower --max-pixels or --max-new-tokens"
            raise DataError(f"{what}model's context of {context}", hint=hint)
        return prompt

    def _inputs(self, jobs: list[Job]) -> dict[str, Any]:
        texts = [render(self.processor, job.messages) for job in jobs]
        images = [Image.open(io.BytesIO(job.image)).convert("RGB") for job in jobs if job.image]
        try:
            return dict(self.processor(text=texts, images=images or None, padding=True, return_tensors="pt"))
        except ValueError as e:
            raise DataError(f"the processor refuses {', '.join(j.id for j in jobs[:3])}: {e}") from None

    def _generate(self, batch: list[_Prompt], features: dict[str, torch.Tensor]) -> list[Reply]:
        if self.settings.do_sample:
            # Seeded by content: the same batch samples the same replies, whatever ran before it.
            key = hashlib.sha256("\n".join([str(self.seed), *(p.job.id for p in batch)]).encode()).digest()
            torch.manual_seed(int.from_bytes(key[:8], "big") >> 1)
        if batch[0].figure and not self.reuse:
            inputs = {k: v.to(self.device) for k, v in self._inputs([p.job for p in batch]).items()}
        else:
            inputs = self._padded(batch)
            if batch[0].figure:
                encoded = torch.cat([features[p.figure] for p in batch]).to(self.device)
                inputs |= model_images(self.model.base_model, encoded, None, encoded=True)
        with watch_logits(self.model) as logits:
            out = self.model.generate(**inputs, generation_config=self.settings)
        if not logits.usable:
            what = "the model computes NaN: its logits are not finite, or all alike"
            raise DataError(what, hint="its weights are damaged")
        width = inputs["input_ids"].shape[1]
        return [self._answer(p, row[width:].tolist()) for p, row in zip(batch, out)]

    def _padded(self, batch: list[_Prompt]) -> dict[str, Any]:
        """input_ids, attention_mask, mm_token_type_ids: (batch, longest), padded on the left; image_grid_thw: (batch, 3)."""
        inputs = {}
        for key in batch[0].inputs:
            rows = [p.inputs[key] for p in batch]
            pad = self.settings.pad_token_id if key == "input_ids" else 0
            if key == "image_grid_thw":
                inputs[key] = torch.cat(rows)
            else:
                inputs[key] = pad_sequence([r[0] for r in rows], True, padding_value=pad, padding_side="left")
        return {k: v.to(self.device) for k, v in inputs.items()}

    def _answer(self, prompt: _Prompt, tokens: list[int]) -> Reply:
        ends = self.settings.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        end = next((i for i, token in enumerate(tokens) if token in ends), None)
        kept = tokens[:end]
        text = self.processor.tokenizer.decode(kept, skip_special_tokens=True)
        finish, cause = "length" if end is None else "stop", None if text.strip() else "empty"
        return Reply(text, "", finish, prompt.length, len(kept), cause)
