"""Supervised warm start with TRL's SFTTrainer: loss on the assistant's tokens and its end of turn, on nothing else.

`python -m r1vfree_cli.training.sft RUN_DIR` is one rank of a run; the launcher starts it.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import pad

from ..config.embedded import with_seed
from ..config.schema import SftRecipe
from ..core.errors import DataError
from ..core.files import read_jsonl
from ..core.prompts import DEFAULT, Prompt, build_messages, judge_messages, target_text
from ..data.load import load_rows
from ..judges.local import LocalJudge
from ..models.lengths import prompt_lengths
from ..run.attempt import Attempt
from ..run.run_dir import RunDir
from . import judging
from .checkpoints import AtomicCheckpoints
from .run import Training
from .worker import trl_config, worker

MAX_LENGTH = 4096  # tokens of a whole row, unless train.max_length says otherwise
IGNORED = -100  # the label that cross-entropy skips


class R1VSFTTrainer(AtomicCheckpoints, SFTTrainer):
    """TRL's trainer with atomic checkpoints and a loss that is the mean over the tokens of the whole batch."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        # Qwen-VL classes say False, about their own loss. TRL computes it here, and would then average the means of
        # ranks and micro-batches: rows with short answers would count for more, in a way that depends on the layout.
        self.model_accepts_loss_kwargs = True

    def _init_training_state(self, *args, **kwargs):
        found = super()._init_training_state(*args, **kwargs)
        # TRL counts tokens from 0 in every process; a resumed run goes on from the last count that was logged.
        counts = [h["num_tokens"] for h in self.state.log_history if "num_tokens" in h]
        self._total_train_tokens = int(counts[-1]) if counts else 0
        return found


def target_ids(processor, rows: list[dict]) -> list[list[int]]:
    """Token ids of each row's assistant turn, the end-of-turn token included."""
    texts = [target_text(row.get("thinking"), row["solution"]) for row in rows]
    end = processor.tokenizer.eos_token_id
    return [[*ids, end] for ids in processor.tokenizer(texts, add_special_tokens=False)["input_ids"]]


def select_rows(rows, processor, *, max_prompt_tokens: int | None, max_length: int | None, prompt: Prompt = DEFAULT):
    """(the rows that can be trained on whole, {reason: how many were dropped}).

    max_prompt_tokens, max_length: limits of the prompt and of the whole row, in text and image tokens; None: any.
    Raises DataError: nothing is left; says why.
    """
    texts = rows.with_format(None).select_columns(["problem", "solution", "thinking"])
    # Control tokens, image placeholders included, would act as such if a row's text held them.
    control = [str(token) for token in processor.tokenizer.all_special_tokens]
    reasons = [_problem(row, control) for row in texts]
    keep = [i for i, reason in enumerate(reasons) if reason is None]
    if keep and (max_prompt_tokens is not None or max_length is not None):
        lengths = prompt_lengths(rows.select(keep) if len(keep) < len(rows) else rows, processor, prompt)
        for i, length, target in zip(keep, lengths, target_ids(processor, [texts[i] for i in keep]), strict=True):
            if max_prompt_tokens is not None and length > max_prompt_tokens:
                reasons[i] = f"prompt longer than {max_prompt_tokens} tokens"
            elif max_length is not None and length + len(target) > max_length:
                reasons[i] = f"longer than {max_length} tokens"
        keep = [i for i in keep if reasons[i] is None]
    dropped = dict(Counter(reason for reason in reasons if reason))
    if not keep:
        why = ", ".join(f"{n} {reason}" for reason, n in dropped.items()) or "there are none"
        hint = "SFT needs rows with a `solution`; data.max_prompt_tokens and train.max_length set the lengths"
        raise DataError(f"no row is left to train on: {why}", hint=hint)
    return (rows if len(keep) == len(rows) else rows.select(keep)), dropped


def _problem(row: dict, control: list[str]) -> str | None:
    if not (row["solution"] or "").strip():
        return "no solution"
    text = "\n".join(part for part in row.values() if part)
    return "control tokens in the text" if any(token in text for token in control) else None


@dataclass
class Collator:
    """Rows to a batch for Qwen-VL: prompt and target side by side, padded on the right.

    Prompt and target are tokenized apart, as generation sees them. Labels are the target's ids, else -100.
    """

    processor: Any
    prompt: Prompt = DEFAULT

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        messages = [build_messages(row["problem"], len(row["images"] or []), self.prompt) for row in rows]
        return self.batch(messages, [row["images"] or [] for row in rows], target_ids(self.processor, rows))

    def batch(self, messages: list, shown: list[list], targets: list[list[int]]) -> dict[str, torch.Tensor]:
        """Conversations, the images of each, and the ids to be learnt after each."""
        images = [image for group in shown for image in group]
        prompts = self.processor(
            text=self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True),
            images=images or None,
            text_kwargs={"add_special_tokens": False},
            images_kwargs={"return_tensors": "pt"},
        )
        ids: list[list[int]] = prompts.pop("input_ids")
        prompts.pop("attention_mask")
        rows = [[*p, *t] for p, t in zip(ids, targets)]
        batch = {
            "input_ids": _padded(rows, self.processor.tokenizer.pad_token_id),  # [rows, longest row]
            "attention_mask": _padded([[1] * len(row) for row in rows], 0),
            "labels": _padded([[IGNORED] * len(p) + t for p, t in zip(ids, targets)], IGNORED),
        }
        if types := prompts.pop("mm_token_type_ids", None):  # 1 on image tokens: Qwen-VL's positions are made from it
            batch["mm_token_type_ids"] = _padded([[*p] + [0] * len(t) for p, t in zip(types, targets)], 0)
        return batch | dict(prompts)  # pixel_values: [patches, patch size], image_grid_thw: [images, 3]


@dataclass
class JudgeCollator(Collator):
    """A sequence for each answer, right or wrong; what is learnt is Yes or No, where a judge is read."""

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        encode = self.processor.tokenizer.encode
        said = {name: encode(word, add_special_tokens=False)[:1] for name, word in (("right", "Yes"), ("wrong", "No"))}
        judged = [(row, row[name], said[name]) for row in rows for name in said if row[name] is not None]
        shown = [row["images"] or [] for row, *_ in judged]
        messages = [judge_messages(row["problem"], answer, len(i)) for (row, answer, _), i in zip(judged, shown)]
        return self.batch(messages, shown, [verdict for *_, verdict in judged])


def _padded(rows: list[list[int]], value: int) -> torch.Tensor:
    return pad([torch.tensor(row) for row in rows], value)


def sft_config(recipe: SftRecipe, run: RunDir) -> SFTConfig:
    """TRL's config: the recipe's `train` by name, and what r1v decides. Build it before the model (ZeRO-3).

    Raises UsageError: TRL or transformers refuses a combination.
    """
    given = dict(recipe.train.model_extra or {})
    # Lengths are ours: rows are dropped and counted. TRL would cut through image tokens.
    given.pop("max_length", None)
    defaults = {"dataloader_num_workers": 1 if recipe.launch.on_cpu else 4, "disable_tqdm": True}
    return trl_config(SFTConfig, recipe, run, **(defaults | given), max_length=None, use_cpu=recipe.launch.on_cpu)


class SftTraining(Training):
    """Adds the targets: rows without one are dropped, and the loss is on them alone."""

    stage = "sft"

    def config(self) -> SFTConfig:
        return sft_config(self.recipe, self.run)

    def select(self, rows) -> tuple[Any, dict[str, int]]:
        recipe, seed = self.recipe, self.args.seed
        choose = functools.partial(
            select_rows,
            processor=self.processor,
            max_prompt_tokens=recipe.data.max_prompt_tokens,
            max_length=(recipe.train.model_extra or {}).get("max_length", MAX_LENGTH),
            prompt=recipe.policy_prompt,
        )
        rows, dropped = choose(rows)
        if self.attempt.trial:  # a step of them alone: what fits then fits later
            lengths = prompt_lengths(rows, self.processor, recipe.policy_prompt)
            targets = target_ids(self.processor, list(rows.select_columns(["solution", "thinking"])))
            totals = [length + len(target) for length, target in zip(lengths, targets, strict=True)]
            order = sorted(range(len(rows)), key=totals.__getitem__, reverse=True)
            rows = rows.select(
                order[: self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size]
            )
        if recipe.role == "judge":
            other = recipe.wrong
            wrong = choose(load_rows(with_seed(other.path, seed), other.split, other.limit))[0] if other else None
            rows = judging.with_verdicts(rows, wrong, seed, recipe.policy_prompt)
        return rows, dropped

    def make_trainer(self, **common: Any) -> R1VSFTTrainer:
        collate = JudgeCollator if self.recipe.role == "judge" else Collator
        collator = collate(self.processor, self.recipe.policy_prompt)
        return R1VSFTTrainer(data_collator=collator, train_dataset=self.rows, **common)

    def figures(self) -> dict[str, Any]:
        """Steps, and the first and the last loss and token accuracy."""
        lines = [line for _, line in read_jsonl(self.run.metrics)] if self.run.metrics.is_file() else []
        figures: dict[str, Any] = {"stage": "sft", "steps": self.trainer.state.global_step}
        for key in ("loss", "mean_token_accuracy"):
            if values := [line[key] for line in lines if isinstance(line.get(key), int | float)]:
                figures[key] = {"first": values[0], "last": values[-1]}
        return figures | (self._judge_figures() if self.recipe.role == "judge" else {})

    def _judge_figures(self) -> dict[str, Any]:
        """How well the finished judge tells right from wrong on held-out rows. An adapter has to be merged first."""
        recipe, heldout = self.recipe, self.recipe.data.heldout
        if heldout is None or recipe.model.lora:
            return {}
        rows = load_rows(with_seed(heldout.path, self.args.seed), heldout.split, heldout.limit)
        rows, _ = select_rows(rows, self.processor, max_prompt_tokens=recipe.data.max_prompt_tokens, max_length=None)
        pixels = recipe.model.min_pixels, recipe.model.max_pixels
        device = "cpu" if recipe.launch.on_cpu else None
        judge = LocalJudge(str(self.run.final), device=device, dtype=recipe.model.dtype, pixels=pixels)
        return judging.measure(judge, rows, self.args.seed)


def main(recipe: SftRecipe, attempt: Attempt) -> None:
    """`SftTraining.main` on every rank."""
    SftTraining(recipe, attempt).main()


if __name__ == "__main__":
    worker("sft", main)
