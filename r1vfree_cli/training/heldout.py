"""Accuracy on held-out rows with reference answers, greedy and sampled, measured without touching the training's RNG."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import GenerationConfig
from trl import GRPOTrainer
from trl.data_utils import prepare_multimodal_messages

from ..config import schema as config
from ..config.embedded import with_seed
from ..core.errors import DataError
from ..core.prompts import DEFAULT, Prompt, build_messages, parse
from ..data.load import load_rows
from ..models.lengths import drop_long_prompts
from ..models.sampling import keyed_draws, watch_logits
from .trainer import R1VGRPOTrainer


def heldout_rows(
    heldout: config.Heldout,
    processor,
    max_prompt_tokens: int | None,
    seed: int,
    prompt: Prompt,
    *,
    judged: bool = False,
):
    """The rows to measure on: those with a reference answer that fit the prompt limit; with `judged`, where no row has
    one, all of them.

    Raises:
        DataError: there are none.
    """
    path = with_seed(heldout.path, seed)
    rows = load_rows(path, heldout.split, heldout.limit)
    answered = [i for i, s in enumerate(rows["solution"]) if s is not None and str(s).strip()]
    if not answered and not judged:
        raise DataError(f"data.heldout {heldout.path}, split {heldout.split}, has no row with a solution")
    rows, _ = drop_long_prompts(rows.select(answered) if answered else rows, processor, max_prompt_tokens, prompt)
    return rows


@dataclass(frozen=True)
class Asked:
    """`n` questions; `get(i)` is the conversation of one and its images."""

    n: int
    get: Callable[[int], tuple[list[dict], list[Any]]]


def as_asked(rows, prompt: Prompt) -> Asked:
    """Held-out rows, an image decoded when it is fetched."""

    def get(i: int) -> tuple[list[dict], list[Any]]:
        images = rows[i]["images"] or []
        return build_messages(rows[i]["problem"], len(images), prompt), images

    return Asked(len(rows), get)


def measure(trainer: R1VGRPOTrainer, rows, prompt: Prompt = DEFAULT) -> dict[str, dict[str, float]]:
    """{"accuracy": {greedy, sampled}, "format": {greedy, sampled}}, shares of 1 over all rows; all ranks must call it.

    Sampled means the recipe's sampling, with the same random numbers at every call. An answer is right when it equals
    the reference without regard to case and surrounding space. Plain TRL generation, whatever the trainer overrides.
    """
    result: dict[str, dict[str, float]] = {"accuracy": {}, "format": {}}
    for how in ("greedy", "sampled"):
        parsed = [parse(text) for text in replies(trainer, as_asked(rows, prompt), greedy=how == "greedy")]
        right = [same(p.answer, s) for p, s in zip(parsed, rows["solution"], strict=True)]
        result["accuracy"][how] = sum(right) / len(right)
        result["format"][how] = sum(p.problem is None for p in parsed) / len(parsed)
    return result


def same(answer: str | None, solution: str) -> bool:
    return answer is not None and answer.strip().casefold() == str(solution).strip().casefold()


def replies(trainer: R1VGRPOTrainer, asked: Asked, *, greedy: bool) -> list[str]:
    """One reply to each question, on every rank; all ranks must call it. Training's random numbers stay as they are."""
    model = trainer.model
    was_training = model.training
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    model.eval()
    try:
        with torch.random.fork_rng(devices):
            return _generate_all(trainer, asked, greedy=greedy)
    finally:
        model.train(was_training)


def _generate_all(trainer: R1VGRPOTrainer, asked: Asked, *, greedy: bool) -> list[str]:
    world, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
    share = -(-asked.n // world)
    size = trainer.args.per_device_train_batch_size * (trainer.args.steps_per_generation or 1)
    texts: list[str] = []
    for start in range(rank * share, (rank + 1) * share, size):
        # Under ZeRO-3 all ranks generate together, so the last ones repeat questions that are thrown away below.
        numbers = range(start, min(start + size, (rank + 1) * share))
        batch = [asked.get(min(i, asked.n - 1)) for i in numbers]
        texts += _generate(trainer, batch, first=start, greedy=greedy)
    return gather_object(texts)[: asked.n]


def _generate(
    trainer: R1VGRPOTrainer, batch: list[tuple[list[dict], list[Any]]], *, first: int, greedy: bool
) -> list[str]:
    prompts = [prepare_multimodal_messages(messages, images=images) for messages, images in batch]
    prompt_ids, images, fields = GRPOTrainer._tokenize_prompts(trainer, prompts)
    draws = keyed_draws((trainer.args.seed, 1), range(first, first + len(batch)), trainer.max_completion_length)
    watching = watch_logits(trainer.accelerator.unwrap_model(trainer.model))
    with _greedy(trainer) if greedy else draws, watching as logits:
        ids, _ = GRPOTrainer._generate_single_turn(trainer, prompt_ids, images, fields, 1)
    trainer.stop_unless_finite(logits)
    return trainer._tokenizer.batch_decode(ids, skip_special_tokens=True)


@contextmanager
def _greedy(trainer: R1VGRPOTrainer) -> Iterator[None]:
    if trainer.use_vllm:
        backend, names = trainer.vllm_generation, ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        old = {name: getattr(backend, name) for name in names}
        backend.temperature, backend.top_p, backend.top_k, backend.min_p, backend.repetition_penalty = 0, 1, 0, 0, 1
        try:
            yield
        finally:
            for name, value in old.items():
                setattr(backend, name, value)
        return
    sampling = trainer.generation_config
    trainer.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=sampling.eos_token_id,
        pad_token_id=sampling.pad_token_id,
        bos_token_id=sampling.bos_token_id,
        suppress_tokens=sampling.suppress_tokens,
        disable_compile=True,
    )
    try:
        yield
    finally:
        trainer.generation_config = sampling
